"""How do ranks come by the same thing when one of them has to make it?

All of it works with any or no distributed set-up that accelerate knows. An error of the main process is raised on every
rank, so that nobody waits for a rank that has already given up.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_mics.errors import ConfigError, MiCSError

T = TypeVar("T")


def broadcast_from_main(build: Callable[[], T]) -> T:
    """Calls `build` on the main process and returns its (picklable) result on every rank.

    Raises:
        ConfigError: `build` raised it, on the main process.
        RuntimeError: `build` raised something else there, in its words; on the main process as it is.
    """
    state = PartialState()
    message: list[object] = [None, None]
    failure: Exception | None = None
    if state.is_main_process:
        try:
            message[0] = build()
        except Exception as error:
            failure = error
            told = f"the main process raised {type(error).__name__}: {error}"
            message[1] = error if isinstance(error, ConfigError) else RuntimeError(told)
    if state.num_processes > 1:
        broadcast_object_list(message)
    error_of_main = failure or message[1]
    if isinstance(error_of_main, Exception):
        raise error_of_main
    return cast(T, message[0])


def main_process_first(build: Callable[[], T]) -> T:
    """Calls `build` on the main process, then on the others, which find what it left in the file caches.

    Raises:
        ConfigError: `build` raised it, on the main process or on this one.
    """
    state = PartialState()
    results: list[T] = []
    broadcast_from_main(lambda: results.append(build()))
    return results[0] if state.is_main_process else build()


def make_output_dir(path: str | Path) -> None:
    """Makes the folder on the main process and tries to write there, before a run spends hours on what it cannot keep.

    Raises:
        ConfigError: on every rank, that it cannot be written.
    """
    broadcast_from_main(partial(_make_writable, Path(path)))


def _make_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        raise ConfigError(
            f"--output_dir cannot be written: {error}. Expected a folder, there or to be made, on a disk with space; "
            f"got {str(path)!r}."
        ) from None


@contextlib.contextmanager
def mistakes_told_once() -> Iterator[None]:
    """Around a recipe: a mistake of the user's is one message of the first rank and exit code 2, no tracebacks."""
    try:
        yield
    except MiCSError as error:
        if os.environ.get("RANK", "0") != "0":
            # The launcher ends all ranks as soon as one has ended, and the first may still be starting. If it does not,
            # the mistake is of this rank alone.
            time.sleep(1 if dist.is_initialized() else 5)
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        sys.last_value = error  # as after a traceback: others may still be in a collective
        sys.exit(2)
