"""How do gradients cross between partition groups? Hop 2 of the two-hop synchronization (MiCS section 3.4)

FSDP2 issues hop 2 itself, `dist.all_reduce(shard, group=...)`, overlapped with backward in its own stream.
`ReplicationGroup` stands in for that group: it casts to the wire dtype, lets the real group reduce, and casts back.

CPUs have no streams: there FSDP2's call would stop backward until the slow links are done. A unit whose result nobody
reads before the end of backward is therefore deferred: its all-reduce runs in gloo's own threads, below the backward of
the units that follow, and `finish` waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from hf_mics.meter import TrafficMeter
from hf_mics.traffic import all_reduce_bytes


class ReplicationGroup(dist.ProcessGroup):
    """A process group whose all-reduce travels in `wire_dtype`, is counted, and costs nothing for a single replica.

    Args:
        inner: the group that communicates.
        wire_dtype: the dtype that travels; the tensors that go in and come out keep theirs.
        meter: where calls and bytes are counted.
    """

    def __init__(self, inner: dist.ProcessGroup, wire_dtype: torch.dtype, meter: TrafficMeter) -> None:
        super().__init__(inner.rank(), inner.size())  # type: ignore[call-arg]
        self.inner = inner
        self.wire_dtype = wire_dtype
        self.defers = False
        """Whether the next all-reduce may still run when its call returns, until `finish`."""
        self._meter = meter
        self._error: Exception | None = None
        self._running: list[tuple[dist.Work, torch.Tensor, torch.Tensor]] = []

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        """All-reduces the one tensor in `tensors` in place; if it `defers`, by the time of `finish`."""
        if self.inner.size() == 1:
            return _Done()
        (tensor,) = tensors
        wire = tensor.to(self.wire_dtype)
        size = all_reduce_bytes(wire.numel() * wire.element_size(), self.inner.size())
        self._meter.add("all_reduce", "replication", bytes_sent=size)
        try:
            with self._meter.timed("hop2", tensor.device):
                work = self.inner.allreduce([wire], opts)
                # FSDP2 calls synchronously in its own stream; NCCL orders that stream itself and returns None.
                if work is not None and self.defers:
                    self._running.append((work, tensor, wire))
                    return _Done()
                if work is not None:
                    work.wait()
        except Exception as error:
            self._error = error
            raise
        if wire is not tensor:
            tensor.copy_(wire)
        return _Done()

    def finish(self) -> None:
        """Waits for the deferred all-reduces; then their tensors hold the result."""
        running, self._running = self._running, []
        for work, tensor, wire in running:
            with self._meter.timed("hop2", tensor.device):
                work.wait()
            if wire is not tensor:
                tensor.copy_(wire)

    @contextmanager
    def unmasked_errors(self) -> Iterator[None]:
        """Inside, an error of the real group is raised as it was.

        torch's all_reduce describes the group of a failed call from its registry, in which ours is not, and would raise
        "process group is not initialized" over the network's own error.
        """
        self._error = None
        try:
            yield
        except ValueError:
            if self._error is None:
                raise
            raise self._error from None

    def getBackendName(self) -> str:
        """The name under which torch reports this group in its error messages."""
        return "mics"


class _Done(dist.Work):
    def wait(self, timeout: Any = None) -> bool:
        return True
