"""How are parameters gathered and gradients scattered inside a partition group? (MiCS section 3.3)

`MiCSAllGather` and `MiCSReduceScatter` plug into FSDP2's `set_custom_all_gather` / `set_custom_reduce_scatter`. Inside
one node they are the flat collective. A group that spans m nodes of k ranks runs in two stages:

- all-gather: k parallel gathers of m ranks between nodes into one buffer of m shards (1/k of the unit), then m gathers
  of k ranks inside the node, each straight into its final place. No reorder copy: shard order is node-major.
- reduce-scatter, the mirror image: m reduce-scatters inside the node, then one between nodes.

On GPUs the stages are the backend's own collectives, the m small ones in one coalesced launch. On CPUs ranks exchange
slices, each sent straight to the rank that needs it. gloo's reduce-scatter is an all-reduce in disguise (twice the
bytes), so ranks add up what they receive, in fp32 and in rank order; and its all-gather takes up to twice the time
inside a node. Between nodes gathers stay gloo's ring, of which a flat group sends fewer bytes over the NICs.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from hf_mics._torch_compat import (
    AllGather,
    ReduceScatter,
    all_gather_single,
    coalesced,
    premul_factor,
    reduce_scatter_single,
)
from hf_mics.errors import MiCSError
from hf_mics.meter import TrafficMeter
from hf_mics.process_groups import HopGroups


class MiCSAllGather(AllGather):
    """All-gather of a unit's parameters over the partition group.

    Args:
        groups: the rank's process groups.
        meter: where calls and bytes are counted.
    """

    def __init__(self, groups: HopGroups, meter: TrafficMeter) -> None:
        self._groups = groups
        self._meter = meter

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialized buffer, freed by the allocator when FSDP2 drops it."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Fills `output_tensor` (p shards) with every rank's `input_tensor` (one shard), in rank order.

        `input_tensor` may be a view of this rank's own place in `output_tensor`. Returns a Work when `async_op`.
        """
        inter, intra = self._groups.inter_node, self._groups.intra_node
        # With reshard_after_forward=N FSDP2 gathers a second time over a smaller group of its own.
        if inter is None or intra is None or group.size() != self._groups.partition.size():
            self._meter.add("all_gather", "partition", bytes_sent=_bytes(input_tensor) * (group.size() - 1))
            with self._meter.timed("hop1", output_tensor.device):
                if output_tensor.device.type == "cpu" and self._groups.topology.nodes_per_partition == 1:
                    return _run(_gather_inside(output_tensor, input_tensor, group), output_tensor.device, async_op)
                return all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        m, k = inter.size(), intra.size()
        shard_bytes = _bytes(input_tensor)
        self._meter.add("all_gather", "inter_node", bytes_sent=shard_bytes * (m - 1))
        self._meter.add("all_gather", "intra_node", calls=m, bytes_sent=shard_bytes * m * (k - 1))
        with self._meter.timed("hop1", output_tensor.device):
            return _run(self._stages(output_tensor, input_tensor, inter, intra), output_tensor.device, async_op)

    @staticmethod
    def _stages(
        output: torch.Tensor, shard: torch.Tensor, inter: dist.ProcessGroup, intra: dist.ProcessGroup
    ) -> Iterator[dist.Work]:
        m, numel = inter.size(), shard.numel()
        columns = torch.empty(m, numel, dtype=shard.dtype, device=shard.device)
        places = output.view(m, intra.size() * numel)
        if output.device.type == "cpu":
            yield all_gather_single(columns.view(-1), shard, group=inter, async_op=True)
            for place, column in zip(places, columns, strict=True):
                yield from _gather_inside(place, column, intra)
            return
        all_gather_single(columns.view(-1), shard, group=inter)
        with coalesced(intra):
            for place, column in zip(places, columns, strict=True):
                all_gather_single(place, column, group=intra)


class MiCSReduceScatter(ReduceScatter):
    """Reduce-scatter of a unit's gradients over the partition group: hop 1 of the two-hop synchronization.

    What travels has `wire_dtype`; what comes out has the dtype that FSDP2 accumulates in, which the engine sets to
    fp32, so that micro-steps add up in fp32 whatever travels.

    Args:
        groups: the rank's process groups.
        meter: where calls and bytes are counted.
        wire_dtype: the dtype that travels.
    """

    def __init__(self, groups: HopGroups, meter: TrafficMeter, wire_dtype: torch.dtype) -> None:
        self._groups = groups
        self._meter = meter
        self.wire_dtype = wire_dtype
        self._numel_in_flight: int | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The input buffer in the wire dtype, then the output buffer in `dtype`.

        FSDP2 asks for both through this one method, input first. Handing out the input in the wire dtype lets its
        copy-in write what will travel: no second copy of a whole unit, and bf16 gradients are never widened.
        """
        numel = int(size[0])
        ranks = self._groups.partition.size()
        if ranks == 1:
            return torch.empty(numel, dtype=dtype, device=device)
        if self._numel_in_flight is not None and numel * ranks == self._numel_in_flight:
            self._numel_in_flight = None
            return torch.empty(numel, dtype=dtype, device=device)
        self._numel_in_flight = numel
        return torch.empty(numel, dtype=self.wire_dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Leaves in `output_tensor` (one shard) the reduction over ranks of their slices of `input_tensor` (p shards).

        `op` is SUM, AVG or PREMUL_SUM. The slices are added node by node, in rank order. Returns a Work when
        `async_op`.

        Raises:
            MiCSError: another operation.
        """
        _check_operation(op)
        wire = input_tensor.to(self.wire_dtype)
        shard_bytes = _bytes(wire) // group.size()
        inter, intra = self._groups.inter_node, self._groups.intra_node
        if inter is None or intra is None:
            self._meter.add("reduce_scatter", "partition", bytes_sent=shard_bytes * (group.size() - 1))
            stages = self._flat(output_tensor, wire, group, op)
        else:
            m, k = inter.size(), intra.size()
            self._meter.add("reduce_scatter", "intra_node", calls=m, bytes_sent=shard_bytes * m * (k - 1))
            self._meter.add("reduce_scatter", "inter_node", bytes_sent=shard_bytes * (m - 1))
            stages = self._staged(output_tensor, wire, inter, intra, op)
        with self._meter.timed("hop1", output_tensor.device):
            return _run(stages, output_tensor.device, async_op)

    def _flat(self, output: torch.Tensor, wire: torch.Tensor, group: dist.ProcessGroup, op: Any) -> Iterator[dist.Work]:
        if wire.device.type == "cpu":
            slices = yield from _exchanged(wire, group)
            # The same order of additions as the staged path, so that both agree to the last bit in fp32.
            nodes = self._groups.topology.nodes_per_partition
            if nodes == 1:
                _combine(slices, op, output)
                return
            k = len(slices) // nodes
            sums = torch.empty(nodes, output.numel(), dtype=_sum_dtype(wire.dtype), device=wire.device)
            for node, total in enumerate(sums):
                _combine(slices[node * k : (node + 1) * k], op, total)
            _combine(sums, _second_operation(op), output)
            return
        _scatter_into(output, wire, group, op)

    def _staged(
        self,
        output: torch.Tensor,
        wire: torch.Tensor,
        inter: dist.ProcessGroup,
        intra: dist.ProcessGroup,
        op: Any,
    ) -> Iterator[dist.Work]:
        m, k = inter.size(), intra.size()
        shard = output.numel()
        # One row for each node of the group: what this node's ranks together contribute to that node's shards.
        rows = torch.empty(m, shard, dtype=wire.dtype, device=wire.device)
        blocks = wire.view(m, k * shard)
        if wire.device.type == "cpu":
            for row, block in zip(rows, blocks, strict=True):
                slices = yield from _exchanged(block, intra)
                _combine(slices, op, row)
            slices = yield from _exchanged(rows.view(-1), inter)
            _combine(slices, _second_operation(op), output)
            return
        with coalesced(intra):
            for row, block in zip(rows, blocks, strict=True):
                reduce_scatter_single(row, block, group=intra, op=op)
        _scatter_into(output, rows.view(-1), inter, _second_operation(op))


# On GPUs the stages below run as synchronous calls, which torch orders on the current stream without stopping the CPU:
# FSDP2 has already put us on its communication stream, and `_StreamWork` on a side stream. Nothing is left to yield.
# On CPUs every stage is started, yielded, and waited for by whoever drives the generator.


def _gather_inside(output: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup) -> Iterator[dist.Work]:
    """All-gather on CPUs of one node."""
    places = output.view(group.size(), -1)
    works = _exchange(list(places), [shard] * len(places), group)
    mine = places[group.rank()]
    if mine.data_ptr() != shard.data_ptr():
        mine.copy_(shard)
    yield from works


def _exchanged(wire: torch.Tensor, group: dist.ProcessGroup) -> Generator[dist.Work, None, list[torch.Tensor]]:
    """Returns what every rank of `group` has in `wire` for this one, in rank order; its own is a view of `wire`."""
    slices = list(wire.view(group.size(), -1))
    received = [part if rank == group.rank() else torch.empty_like(part) for rank, part in enumerate(slices)]
    yield from _exchange(received, slices, group)
    return received


def _exchange(
    received: Sequence[torch.Tensor], sent: Sequence[torch.Tensor], group: dist.ProcessGroup
) -> list[dist.Work]:
    """Starts to send `sent[i]` to rank i of `group` and to receive `received[i]` from it, for all others."""
    # Every rank sends to its successor first, so that no rank is sent to by all others at once.
    others = [(group.rank() + step) % group.size() for step in range(1, group.size())]
    works = [dist.irecv(received[rank], group=group, group_src=rank) for rank in reversed(others)]
    works += [dist.isend(sent[rank], group=group, group_dst=rank) for rank in others]
    return [work for work in works if work is not None]


class _StagedWork(dist.Work):
    """A collective of several stages as one Work: `wait` runs the stages that are left."""

    def __init__(self, stages: Iterator[dist.Work]) -> None:
        super().__init__()
        self._stages = stages
        self._running: dist.Work | None = next(stages, None)

    def wait(self, timeout: Any = None) -> bool:
        """Blocks until the last stage is done. Every rank must wait for its works in the same order."""
        while self._running is not None:
            self._running.wait()
            self._running = next(self._stages, None)
        return True

    def is_completed(self) -> bool:
        """Whether nothing is left to wait for."""
        return self._running is None


class _StreamWork(dist.Work):
    """A collective that was issued on a side stream: `wait` orders the current stream after it."""

    def __init__(self, stages: Iterator[dist.Work], device: torch.device) -> None:
        super().__init__()
        self._device_module = torch.get_device_module(device)
        side = _side_stream(device)
        side.wait_stream(self._device_module.current_stream())
        with self._device_module.stream(side):
            for work in stages:
                work.wait()
            self._event = side.record_event()

    def wait(self, timeout: Any = None) -> bool:
        """Makes the current stream wait; the CPU goes on."""
        self._device_module.current_stream().wait_event(self._event)
        return True

    def is_completed(self) -> bool:
        """Whether the device has finished."""
        return self._event.query()


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.get_device_module(device).Stream(device)


def _run(stages: Iterator[dist.Work], device: torch.device, async_op: bool) -> dist.Work | None:
    if not async_op:
        for work in stages:
            work.wait()
        return None
    return _StagedWork(stages) if device.type == "cpu" else _StreamWork(stages, device)


def _scatter_into(output: torch.Tensor, wire: torch.Tensor, group: dist.ProcessGroup, op: Any) -> None:
    """The backend's reduce-scatter in the wire dtype, in the current stream, then widened into `output`."""
    reduced = output if output.dtype == wire.dtype else torch.empty_like(output, dtype=wire.dtype)
    reduce_scatter_single(reduced, wire, group=group, op=op)
    if reduced is not output:
        output.copy_(reduced)


def _combine(rows: Sequence[torch.Tensor] | torch.Tensor, op: Any, output: torch.Tensor) -> None:
    """Reduces `rows`, one of each rank, in rank order, in fp32 or, if they are wider, in their own dtype."""
    dtype = _sum_dtype(rows[0].dtype)
    # A pass over a shard costs as much as the loopback does: the sum is formed in its place.
    total = output if output.dtype == dtype else torch.empty_like(output, dtype=dtype)
    if rows[0].dtype == dtype and len(rows) > 1:
        torch.add(rows[0], rows[1], out=total)
        rest = rows[2:]
    else:
        total.copy_(rows[0])
        rest = rows[1:]
    for row in rest:
        total += row
    if op == ReduceOp.AVG:
        total /= len(rows)
    elif (factor := premul_factor(op)) is not None:
        total *= factor
    if total is not output:
        output.copy_(total)


def _sum_dtype(wire: torch.dtype) -> torch.dtype:
    return torch.promote_types(wire, torch.float32)


def _second_operation(op: Any) -> Any:
    """AVG of averages is the average; every other operation has done its scaling in the first stage."""
    return ReduceOp.AVG if op == ReduceOp.AVG else ReduceOp.SUM


def _check_operation(op: Any) -> None:
    if op not in (ReduceOp.SUM, ReduceOp.AVG) and premul_factor(op) is None:
        raise MiCSError(f"reduce-scatter over a partition group knows SUM, AVG and PREMUL_SUM, got {op}.")


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
