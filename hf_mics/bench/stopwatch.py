"""How long does this rank wait for communication, and for which collective?"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch.distributed as dist

from hf_mics._torch_compat import collective_of


class WaitStopwatch:
    """Adds up the seconds that this process spends in communication, by collective, from construction on.

    Every library here that is written in Python waits for gloo in `Work.wait`; gloo's sends are partly carried out by
    whoever starts them, so starting counts too. What is not counted is computation, and communication that runs below
    it. DDP waits in C++, inside backward, and is not seen. Waiting for a slower rank counts as communication.

    Attributes:
        seconds: by collective: all_gather, reduce_scatter, all_reduce, exchange, other.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        wait = dist.Work.wait

        def timed(work: Any, *args: Any, **kwargs: Any) -> Any:
            with self._counted(collective_of(work)):
                return wait(work, *args, **kwargs)

        cast(Any, dist.Work).wait = timed
        for name in ("isend", "irecv"):
            setattr(dist, name, self._counted("exchange")(getattr(dist, name)))

    @contextmanager
    def _counted(self, collective: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[collective] += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """A copy of `seconds`."""
        return dict(self.seconds)
