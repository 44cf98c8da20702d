"""Which metrics does the repository ship, and how are they loaded without the hub?"""

from __future__ import annotations

from pathlib import Path

import evaluate

from hf_mics.errors import ConfigError


def load_metric(name: str) -> evaluate.Metric:
    """Loads a metric module of this folder through `evaluate`.

    Call it on the main process only and feed it gathered values: `evaluate` copies the module into its cache, which
    concurrent ranks would race for. Values are kept in memory, so no cache file is shared between runs either.

    Raises:
        ConfigError: there is no such metric.
    """
    folder = Path(__file__).parent
    names = sorted(path.stem for path in folder.glob("[a-z]*.py"))
    if name not in names:
        raise ConfigError(f"unknown metric: expected one of {', '.join(names)}, got {name!r}.")
    return evaluate.load(str(folder / f"{name}.py"), keep_in_memory=True)
