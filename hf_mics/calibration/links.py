"""How long do the engine's own collectives take inside and between nodes, over message sizes?

Every probe runs a stage of hop 1 or hop 2 as training does: the same classes, on all groups of the job at once, so that
ranks share their node's network interface as they will.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hf_mics.calibration.timing_loop import Call, sampled_s
from hf_mics.collectives import MiCSAllGather, MiCSReduceScatter
from hf_mics.hop2 import ReplicationGroup
from hf_mics.meter import TrafficMeter
from hf_mics.planning.collective_times import Load, UnitLoads, unit_loads
from hf_mics.process_groups import HopGroups, hop_groups
from hf_mics.topology import Topology
from hf_mics.traffic import Backend

_DTYPE = torch.float32
_SMALLEST_BYTES = 1 << 14
_GROWTH = 4


class LinkPoint(NamedTuple):
    """A collective that was timed at one size.

    `seconds` holds one value for each sample; `loads` is what it puts on the links, stage by stage.
    """

    name: str
    unit_bytes: int
    loads: tuple[Load, ...]
    seconds: list[float]


class _Probe(NamedTuple):
    """A collective to time: `loads(unit_loads)` is what it puts on the links, `prepare(elements)` its call."""

    name: str
    topology: Topology
    hierarchical: bool
    loads: Callable[[UnitLoads], tuple[Load, ...]]
    prepare: Callable[[int], Call]


def measure_links(
    node_size: int,
    device: torch.device,
    *,
    largest_bytes: int,
    limit_s: float,
    samples: int,
    rounds: int,
    progress: Callable[[], object],
) -> list[LinkPoint]:
    """Times every collective at growing unit sizes; a collective of all ranks.

    The samples of a size are taken in several rounds over everything, so that they lie minutes rather than moments
    apart and hold what changes on the machine and in the network meanwhile.

    Args:
        node_size: ranks per node (k).
        largest_bytes: of the largest unit, all shards together.
        limit_s: sizes stop growing once a call takes longer.
        samples: per size and round.
        rounds: how often everything is gone through.
        progress: called after every round.

    Returns:
        LinkPoints named all_gather, reduce_scatter and all_reduce on one lane each, from which links are fitted; and,
        on several nodes of several ranks, flat and hierarchical gathers over the whole job, to compare with the fit.
    """
    backend: Backend = "gloo" if device.type == "cpu" else "nccl"
    probes = list(_probes(node_size, device))
    points: dict[tuple[int, int], LinkPoint] = {}
    for _ in range(rounds):
        for number, probe in enumerate(probes):
            size = _SMALLEST_BYTES
            while size <= largest_bytes:
                elements = size // _DTYPE.itemsize // dist.get_world_size() * dist.get_world_size()
                unit_bytes = elements * _DTYPE.itemsize
                seconds = sampled_s(probe.prepare(elements), device, samples=samples, sample_s=limit_s / 10)
                loads = unit_loads(
                    probe.topology, unit_bytes, unit_bytes, hierarchical=probe.hierarchical, backend=backend
                )
                point = LinkPoint(probe.name, unit_bytes, probe.loads(loads), [])
                points.setdefault((number, size), point).seconds.extend(seconds)
                if sorted(seconds)[len(seconds) // 2] > limit_s:
                    break
                size *= _GROWTH
        progress()
    return list(points.values())


def _probes(node_size: int, device: torch.device) -> Iterator[_Probe]:
    world = dist.get_world_size()
    nodes = world // node_size
    inside = Topology(world_size=world, node_size=node_size, partition_size=node_size)
    whole = Topology(world_size=world, node_size=node_size, partition_size=world)
    by_node = _mesh(device, nodes, node_size)
    node_groups = hop_groups(by_node, 1, inside, hierarchical=True)
    if node_size > 1:
        yield _Probe(
            "all_gather", inside, True, lambda u: u.gather, _gather(node_groups, node_groups.partition, device)
        )
        yield _Probe("reduce_scatter", inside, True, lambda u: u.reduce, _scatter(node_groups, device, node_size))
    if nodes == 1:
        return
    yield _Probe("all_reduce", inside, True, lambda u: u.hop2, _all_reduce(by_node.get_group(0), device, node_size))
    across = HopGroups(Topology(world_size=nodes, node_size=1, partition_size=nodes), by_node.get_group(0))
    # A group between nodes handles the k-th part of a unit: m of its p shards.
    yield _Probe(
        "all_gather", whole, True, lambda u: u.gather[:1], _gather(across, across.partition, device, share=node_size)
    )
    yield _Probe(
        "reduce_scatter", whole, True, lambda u: u.reduce[-1:], _scatter(across, device, nodes, share=node_size)
    )
    if node_size > 1:
        row = _mesh(device, 1, world)
        for name, hierarchical in (("hierarchical gather", True), ("flat gather", False)):
            groups = hop_groups(row, 1, whole, hierarchical=hierarchical)
            yield _Probe(name, whole, hierarchical, lambda u: u.gather, _gather(groups, groups.partition, device))


def _mesh(device: torch.device, rows: int, columns: int) -> DeviceMesh:
    names = (f"measure_{rows}x{columns}_rows", f"measure_{rows}x{columns}_columns")
    return init_device_mesh(device.type, (rows, columns), mesh_dim_names=names)


def _gather(groups: HopGroups, group: dist.ProcessGroup, device: torch.device, share: int = 1) -> Callable[[int], Call]:
    gather = MiCSAllGather(groups, TrafficMeter())

    def prepare(elements: int) -> Call:
        output = torch.zeros(elements // share, dtype=_DTYPE, device=device)
        shard = torch.zeros(output.numel() // group.size(), dtype=_DTYPE, device=device)
        return lambda: gather(output, shard, group)

    return prepare


def _scatter(groups: HopGroups, device: torch.device, ranks: int, share: int = 1) -> Callable[[int], Call]:
    scatter = MiCSReduceScatter(groups, TrafficMeter(), _DTYPE)

    def prepare(elements: int) -> Call:
        whole = torch.zeros(elements // share, dtype=_DTYPE, device=device)
        output = torch.zeros(whole.numel() // ranks, dtype=_DTYPE, device=device)
        return lambda: scatter(output, whole, groups.partition, dist.ReduceOp.AVG)

    return prepare


def _all_reduce(replication: dist.ProcessGroup, device: torch.device, node_size: int) -> Callable[[int], Call]:
    hop2 = ReplicationGroup(replication, _DTYPE, TrafficMeter())

    def prepare(elements: int) -> Call:
        shard = torch.zeros(elements // node_size, dtype=_DTYPE, device=device)
        return lambda: dist.all_reduce(shard, group=hop2)

    return prepare
