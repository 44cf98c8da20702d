"""How many bytes will one optimizer step move, per rank and through each node's network interface?

The prediction counts what the engine sends, with the volumes of MiCS sections 3.2 to 3.4 (arXiv 2205.00119):
(p-1)/p of the model per gather, of which (p-k)/p crosses nodes when it runs hierarchically, and twice (r-1)/r of a
shard per hop 2. Which of a rank's bytes cross nodes depends on the backend, see `node_bytes`. It leaves out headers,
the gradient norm's few bytes, and everything the user's script sends itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_mics.meter import Key, Phase, Tally
from hf_mics.topology import Topology

Backend = Literal["nccl", "gloo"]

_NIC_PHASES: dict[str, Phase] = {
    "hop1_all_gather": "all_gather",
    "hop1_reduce_scatter": "reduce_scatter",
    "hop2_all_reduce": "all_reduce",
}


@dataclass(frozen=True, kw_only=True)
class UnitShape:
    """One FSDP2 communication unit (usually a transformer layer), as bytes on the wire.

    Args:
        name: the module's name.
        gather_bytes: bytes of the unit's padded, gathered parameters, all shards together.
        reduce_bytes: bytes of the unit's padded gradients in the wire dtype, all shards together.
        gathers_per_micro_step: 2 when parameters are freed after forward, 1 when they stay until backward.
    """

    name: str
    gather_bytes: int
    reduce_bytes: int
    gathers_per_micro_step: int


@dataclass(frozen=True)
class StepTraffic:
    """Traffic of one optimizer step: tallies of one rank, and bytes leaving one node's network interface.

    `nic_bytes` has the keys hop1_all_gather, hop1_reduce_scatter and hop2_all_reduce; each is the average over nodes.
    """

    per_rank: dict[Key, Tally]
    nic_bytes: dict[str, float]

    @property
    def hop1_bytes(self) -> int:
        """Bytes that one rank sends in hop 1, gathers and reduce-scatters together."""
        return sum(t.bytes_sent for (phase, _), t in self.per_rank.items() if phase != "all_reduce")

    @property
    def hop2_bytes(self) -> int:
        """Bytes that one rank sends in hop 2."""
        return sum(t.bytes_sent for (phase, _), t in self.per_rank.items() if phase == "all_reduce")


def predict(
    topology: Topology,
    units: Sequence[UnitShape],
    *,
    micro_steps: int,
    hierarchical: bool = True,
    backend: Backend = "nccl",
) -> StepTraffic:
    """What one optimizer step of `micro_steps` micro-steps moves, hop 2 only at its accumulation boundary."""
    per_rank: dict[Key, Tally] = {}

    def add(key: Key, calls: int, bytes_sent: int) -> None:
        if calls:
            per_rank[key] = per_rank.get(key, Tally()) + Tally(calls, bytes_sent)

    p, r = topology.partition_size, topology.replication_size
    m = topology.nodes_per_partition
    staged = hierarchical and topology.is_hierarchical
    for unit in units:
        gathers = unit.gathers_per_micro_step * micro_steps if p > 1 else 0
        scatters = micro_steps if p > 1 and unit.reduce_bytes else 0
        hop1: tuple[tuple[Phase, int, int], ...] = (
            ("all_gather", gathers, unit.gather_bytes),
            ("reduce_scatter", scatters, unit.reduce_bytes),
        )
        for phase, calls, size in hop1:
            if staged:
                inter, intra = _staged_bytes(size, p, m)
                add((phase, "inter_node"), calls, calls * inter)
                add((phase, "intra_node"), calls * m, calls * intra)
            else:
                add((phase, "partition"), calls, calls * (size - size // p))
        if r > 1 and unit.reduce_bytes:
            add(("all_reduce", "replication"), 1, all_reduce_bytes(unit.reduce_bytes // p, r))
    nic_bytes = {
        name: node_bytes(topology, {key: tally for key, tally in per_rank.items() if key[0] == phase}, backend=backend)
        for name, phase in _NIC_PHASES.items()
    }
    return StepTraffic(per_rank, nic_bytes)


def node_bytes(topology: Topology, tallies: Mapping[Key, Tally], *, backend: Backend) -> float:
    """Bytes that left each node's network interface, averaged over nodes, when every rank sent `tallies`.

    A ring sends over the interface along the edges that leave the node, and equal volumes flow along all of them. That
    is how NCCL runs every collective, and gloo all-gathers and all-reduces. Over gloo the engine scatters by an
    exchange, in which p-k of each rank's p-1 slices go straight to other nodes: k (p-k)/p of a unit per node where a
    ring takes (p-1)/p. Of two-stage collectives, the stage between nodes crosses as a whole, the one inside not at all.
    """
    p, k = topology.partition_size, topology.node_size
    total = 0.0
    for (phase, scope), tally in tallies.items():
        if backend == "gloo" and (phase, scope) == ("reduce_scatter", "partition"):
            total += tally.bytes_sent * k * max(0, p - k) / (p - 1)
        else:
            total += tally.bytes_sent * topology.edges_per_node(scope)
    return total


def all_reduce_bytes(size: int, ranks: int) -> int:
    """Bytes that each of `ranks` ranks sends to all-reduce a buffer of `size` bytes: 2 (n-1)/n of it."""
    return 2 * size * (ranks - 1) // ranks


def _staged_bytes(size: int, p: int, m: int) -> tuple[int, int]:
    """(between nodes, inside the node) bytes that one rank sends to gather or scatter `size` bytes in two stages."""
    shard, k = size // p, p // m
    return (m - 1) * shard, m * (k - 1) * shard
