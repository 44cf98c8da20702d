"""How long does this rank wait for communication, and for which collective?"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch.distributed as dist

from hf_mics._torch_compat import collective_of
from hf_mics.hop2 import ReplicationGroup


class WaitStopwatch:
    """Adds up the seconds that this process spends in `Work.wait`, by collective, from construction on.

    Every library here that is written in Python waits for gloo there, so what is not counted is computation. DDP waits
    in C++, inside backward, and is not seen. Waiting for a slower rank counts as communication.

    Attributes:
        seconds: by collective: all_gather, reduce_scatter, all_reduce, other. Everything inside hf_mics's hop 2 counts
            as all_reduce, whatever it is made of.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._in_hop2 = False
        self._watch_waits()
        self._watch_hop2()

    def read(self) -> dict[str, float]:
        """A copy of `seconds`."""
        return dict(self.seconds)

    def _watch_waits(self) -> None:
        wait = dist.Work.wait

        def timed(work: Any, *args: Any, **kwargs: Any) -> Any:
            phase = "all_reduce" if self._in_hop2 else collective_of(work)
            start = time.perf_counter()
            try:
                return wait(work, *args, **kwargs)
            finally:
                self.seconds[phase] += time.perf_counter() - start

        dist.Work.wait = timed  # type: ignore[assignment,method-assign]

    def _watch_hop2(self) -> None:
        allreduce = ReplicationGroup.allreduce

        def marked(group: Any, *args: Any, **kwargs: Any) -> Any:
            self._in_hop2 = True
            try:
                return allreduce(group, *args, **kwargs)
            finally:
                self._in_hop2 = False

        ReplicationGroup.allreduce = marked  # type: ignore[assignment,method-assign]
