"""How do all ranks learn that one of them failed, before any of them waits for it?"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from hf_mics.errors import CheckpointError, MiCSError

T = TypeVar("T")


def together(what: str, do: Callable[[], T]) -> T:
    """Calls `do()` on every rank and returns this rank's result, unless it raised on some rank; a collective.

    Args:
        what: what could not be done, for the message.

    Raises:
        CheckpointError: on every rank alike, with what the first rank that failed said.
    """
    result: Any = None
    failure: str | None = None
    cause: BaseException | None = None
    try:
        result = do()
    except MiCSError as error:
        failure, cause = str(error), error
    except (Exception, CheckpointException) as error:
        rank, reason = _first_failure(error)
        failure, cause = f"{what}: rank {rank} ({socket.gethostname()}) says {reason}", error
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, failure)
    for said in everyone:
        if said is not None:
            raise CheckpointError(said) from cause
    return result


def main_decides(decide: Callable[[], T]) -> T:
    """What `decide()` returns on rank 0, on every rank; a collective.

    Raises:
        CheckpointError: `decide()` raised.
    """
    said: list[Any] = [None, None]
    cause: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            said[0] = decide()
        except (MiCSError, OSError) as error:
            said[1] = str(error)
        except Exception as error:  # a mistake of this program's: the others wait for word all the same
            said[1], cause = f"{type(error).__name__}: {error}", error
    dist.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise CheckpointError(said[1]) from cause
    return said[0]


def _first_failure(error: BaseException) -> tuple[int, str]:
    """The rank that failed and what it said; torch.distributed.checkpoint tells every rank who failed."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = min(error.failures.items())
        return rank, f"{type(error).__name__}: {error}"
    return dist.get_rank(), f"{type(error).__name__}: {error}"
