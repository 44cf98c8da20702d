"""How does a job that is asked to end (SIGTERM) stop at the same optimizer step on every rank?"""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


class StopRequest:
    """SIGTERM as a flag, about which all ranks agree once per optimizer step.

    Clouds and schedulers send SIGTERM to announce that they take a node back, to one process or to all, once or more;
    launchers pass it on. While this listens, the signal does not end the process.
    """

    def __init__(self) -> None:
        self._received = False
        self._former: Callable[[int, FrameType | None], Any] | int | None = None
        self._listening = False

    def listen(self) -> None:
        """From now on SIGTERM is noted; a second call changes nothing."""
        if self._listening:
            return
        if threading.current_thread() is not threading.main_thread():
            warnings.warn("SIGTERM will not be noted: training does not run in the main thread.", stacklevel=2)
            return
        self._former = signal.signal(signal.SIGTERM, self._note)
        self._listening = True

    def ignore(self) -> None:
        """Gives SIGTERM back to whoever had it before."""
        if self._listening:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._former is None else self._former)
            self._listening = False

    def _note(self, *_: Any) -> None:
        self._received = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank has received SIGTERM; the same answer on all, from an all-reduce of one number."""
        flag = torch.tensor(int(self._received), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
