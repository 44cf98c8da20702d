"""How long does this rank spend in the collectives of hop 1 and hop 2?

On CPUs the time that blocks training: from the call to its return, and for a hop 2 that runs below the backward what is
left of it at the end. On GPUs the time between two events around the collective in the stream that runs it, which other
streams may overlap with compute; nothing waits for the device until the clock is read. Both hold what a rank waits for
slower ranks. Collectives launched with `async_op=True` count with their launch alone; FSDP2 launches none unless told
to.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_mics.meter import Hop

# Finished pairs of events are added up before more than this many are held; a step of a large model has thousands.
_MAX_PENDING = 256


class CollectiveClock:
    """Adds up seconds per hop while `running`; hand it to `TrafficMeter.clock`."""

    def __init__(self) -> None:
        self.running = False
        self._seconds: dict[Hop, float] = {"hop1": 0.0, "hop2": 0.0}
        self._pending: deque[tuple[Hop, Any, Any]] = deque()
        self._free: list[Any] = []

    @contextmanager
    def span(self, hop: Hop, device: torch.device) -> Iterator[None]:
        """Times what runs inside, on the CPU or in the current stream of `device`."""
        if not self.running:
            yield
        elif device.type == "cpu":
            start = time.perf_counter()
            yield
            self._seconds[hop] += time.perf_counter() - start
        else:
            begin, end = self._event(device), self._event(device)
            begin.record()
            yield
            end.record()
            self._pending.append((hop, begin, end))
            if len(self._pending) > _MAX_PENDING:
                self._add_up(wait=False)

    def read(self) -> dict[Hop, float]:
        """Seconds per hop since the start or the last `reset`; waits for the device."""
        self._add_up(wait=True)
        return dict(self._seconds)

    def reset(self) -> None:
        """Starts again from zero."""
        self._add_up(wait=True)
        self._seconds = {"hop1": 0.0, "hop2": 0.0}

    def _event(self, device: torch.device) -> Any:
        return self._free.pop() if self._free else torch.get_device_module(device).Event(enable_timing=True)

    def _add_up(self, *, wait: bool) -> None:
        while self._pending:
            hop, begin, end = self._pending[0]
            if wait:
                end.synchronize()
            elif not end.query():
                return
            self._seconds[hop] += begin.elapsed_time(end) / 1e3
            self._free += [begin, end]
            self._pending.popleft()
