"""How long does this rank wait for communication, and for which collective?"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch.distributed as dist

from hf_mics._torch_compat import collective_of


class WaitStopwatch:
    """Adds up the seconds that this process spends in `Work.wait`, by collective, from construction on.

    Every library here that is written in Python waits for gloo there, so what is not counted is computation, and
    communication that runs below it. DDP waits in C++, inside backward, and is not seen. Waiting for a slower rank
    counts as communication.

    Attributes:
        seconds: by collective: all_gather, reduce_scatter, all_reduce, other.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        wait = dist.Work.wait

        def timed(work: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return wait(work, *args, **kwargs)
            finally:
                self.seconds[collective_of(work)] += time.perf_counter() - start

        dist.Work.wait = timed  # type: ignore[assignment,method-assign]

    def read(self) -> dict[str, float]:
        """A copy of `seconds`."""
        return dict(self.seconds)
