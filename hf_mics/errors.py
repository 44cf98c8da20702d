"""Which errors does hf_mics raise for its users?

Every message says what was wrong, what was expected, what was got, and the fix. All of them are raised on every
rank alike, before the collective that would otherwise hang.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MiCSError(Exception):
    """Base of every error that hf_mics raises on purpose."""


class ConfigError(MiCSError, ValueError):
    """A setting, a file or a call of the user's that cannot work as given."""


class TopologyError(MiCSError, ValueError):
    """Sizes or rank layouts from which no partition groups can be formed."""


class WindowError(MiCSError, RuntimeError):
    """An accumulation window used in a way that would lose gradients."""


class LossError(MiCSError, RuntimeError):
    """A loss that is not finite, found before the optimizer step that would have spread it into the weights."""


class CheckpointError(MiCSError, RuntimeError):
    """A checkpoint that could not be written, or cannot be resumed by this run."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The names in `known` that are near to `word`, as a sentence for a message; empty if there are none."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
