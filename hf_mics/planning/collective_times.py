"""How long do the collectives of one communication unit take, on which link, stage by stage?

Bytes are those that `hf_mics.traffic` says the engine moves; steps are those of the algorithms that the backends run:
rings for gathers and scatters, trees for NCCL's all-reduce and a ring for gloo's. Where the engine exchanges slices
over gloo instead, a step is a message to another rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from hf_mics.meter import Phase, Scope
from hf_mics.planning.cluster import Lane, Rates
from hf_mics.planning.schedule import Stage, Stages
from hf_mics.topology import Topology
from hf_mics.traffic import Backend, StepTraffic, UnitShape, predict


@dataclass(frozen=True)
class Load:
    """What one stage of a collective carries on one link.

    Args:
        phase: the collective. `lane`: the link that it holds.
        steps: how often its latency is paid. `inner_steps`: how often that of the link inside a node, on a ring that
            goes through both.
        nic_bytes: that leave one node. `rank_bytes`: that one rank sends to ranks of its own node or onto the ring.
    """

    phase: Phase
    lane: Lane
    steps: int
    nic_bytes: float = 0.0
    rank_bytes: float = 0.0
    inner_steps: int = 0

    def timed(self, rates: Rates, calls: int) -> Stage:
        """The stage's duration when the unit's bytes travel in `calls` calls. A ring is as slow as its slowest link."""
        latency_s, bandwidth = rates.link(self.phase, self.lane)
        waited_s, seconds = self.steps * latency_s, self.rank_bytes / bandwidth
        if self.lane == "inter_node":
            inner_latency_s, inner_bandwidth = rates.link(self.phase, "intra_node")
            slower_s = max(latency_s, inner_latency_s) - inner_latency_s
            waited_s += self.inner_steps * (inner_latency_s + rates.ring_lockstep * slower_s)
            seconds = max(self.nic_bytes / bandwidth, self.rank_bytes / inner_bandwidth)
        return Stage(self.lane, calls * waited_s + seconds)


@dataclass(frozen=True)
class UnitLoads:
    """The stages of one unit's all-gather, reduce-scatter and hop 2."""

    gather: tuple[Load, ...]
    reduce: tuple[Load, ...]
    hop2: tuple[Load, ...]


def timed(loads: tuple[Load, ...], rates: Rates, calls: int = 1) -> Stages:
    """Every stage of a collective, with its duration."""
    return tuple(load.timed(rates, calls) for load in loads)


@lru_cache(maxsize=4096)
def unit_loads(
    topology: Topology, gather_bytes: int, reduce_bytes: int, *, hierarchical: bool, backend: Backend
) -> UnitLoads:
    """What gathering and reducing a unit once puts on the links.

    Args:
        gather_bytes, reduce_bytes: of the unit as it travels, padded, all shards together.
        backend: gloo runs the m gathers inside a node one by one, and its flat reduce-scatter (ours, an exchange)
            sends every slice straight to its owner; NCCL coalesces the gathers, and its reduce-scatter is a ring.
    """
    unit = UnitShape(name="", gather_bytes=gather_bytes, reduce_bytes=reduce_bytes, gathers_per_micro_step=1)
    traffic = predict(topology, [unit], micro_steps=1, hierarchical=hierarchical, backend=backend)
    gather = _hop1(topology, traffic, "all_gather", backend)
    reduce = _hop1(topology, traffic, "reduce_scatter", backend)
    # The mirror image of a gather: inside the node first.
    return UnitLoads(gather, reduce[::-1], _hop2(topology, traffic, backend))


def _hop1(topology: Topology, traffic: StepTraffic, phase: Phase, backend: Backend) -> tuple[Load, ...]:
    p, m = topology.partition_size, topology.nodes_per_partition
    k = p // m
    nic_bytes = traffic.nic_bytes[f"hop1_{phase}"]
    if (phase, "inter_node") in traffic.per_rank:
        passes = 1 if backend == "nccl" else m
        return (
            Load(phase, "inter_node", m - 1, nic_bytes=nic_bytes),
            Load(phase, "intra_node", passes * (k - 1), rank_bytes=_sent(traffic, phase, "intra_node")),
        )
    sent = _sent(traffic, phase, "partition")
    if not sent:
        return ()
    if m == 1:
        return (Load(phase, "intra_node", p - 1, rank_bytes=sent),)
    rank_bytes = sent if k > 1 else 0.0
    return (Load(phase, "inter_node", m - 1, nic_bytes=nic_bytes, rank_bytes=rank_bytes, inner_steps=p - m),)


def _hop2(topology: Topology, traffic: StepTraffic, backend: Backend) -> tuple[Load, ...]:
    sent = _sent(traffic, "all_reduce", "replication")
    if not sent:
        return ()
    r = topology.replication_size
    steps = 2 * (math.ceil(math.log2(r)) if backend == "nccl" else r - 1)
    nic_bytes = traffic.nic_bytes["hop2_all_reduce"]
    if not nic_bytes:
        return (Load("all_reduce", "intra_node", steps, rank_bytes=sent),)
    shares_node = topology.partition_size < topology.node_size
    return (Load("all_reduce", "inter_node", steps, nic_bytes=nic_bytes, rank_bytes=sent if shares_node else 0.0),)


def _sent(traffic: StepTraffic, phase: Phase, scope: Scope) -> int:
    tally = traffic.per_rank.get((phase, scope))
    return tally.bytes_sent if tally else 0
