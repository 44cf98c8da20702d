"""How do ranks come by the same thing when one of them has to make it?

Both functions work with any or no distributed set-up that accelerate knows. A `ConfigError` of the main process is
raised on every rank, so that nobody waits for a rank that has already given up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_mics.errors import ConfigError

T = TypeVar("T")


def broadcast_from_main(build: Callable[[], T]) -> T:
    """Calls `build` on the main process and returns its (picklable) result on every rank.

    Raises:
        ConfigError: `build` raised it, on the main process.
    """
    state = PartialState()
    message: list[object] = [None, None]
    if state.is_main_process:
        try:
            message[0] = build()
        except ConfigError as error:
            message[1] = error
    if state.num_processes > 1:
        broadcast_object_list(message)
    result, error_of_main = message
    if isinstance(error_of_main, ConfigError):
        raise error_of_main
    return result  # type: ignore[return-value]


def main_process_first(build: Callable[[], T]) -> T:
    """Calls `build` on the main process, then on the others, which find what it left in the file caches.

    Raises:
        ConfigError: `build` raised it, on the main process or on this one.
    """
    state = PartialState()
    results: list[T] = []
    broadcast_from_main(lambda: results.append(build()))
    return results[0] if state.is_main_process else build()
