"""How are tables shown whole in a terminal that is narrower than they are?"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

# More than any table takes.
_WIDE = 1000


def widen(console: Console, *tables: Table) -> None:
    """Makes `console` at least as wide as `tables`.

    Rich would cut numbers and bars off to fit them into fewer columns. A narrower terminal folds whole lines instead,
    and loses nothing.
    """
    wide = console.options.update(width=_WIDE)
    console.width = max(console.width, *(console.measure(table, options=wide).maximum for table in tables))
