"""How many bytes will one optimizer step move, per rank and through each node's network interface?

The prediction counts what the engine sends, with the volumes of MiCS sections 3.2 to 3.4 (arXiv 2205.00119):
(p-1)/p of the model per gather, of which (p-k)/p crosses nodes when it runs hierarchically, and twice (r-1)/r of a
shard per hop 2. It leaves out headers, the gradient norm's few bytes, and everything the user's script sends itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hf_mics.meter import Key, Tally
from hf_mics.topology import Group, Topology


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
    topology: Topology, units: Sequence[UnitShape], *, micro_steps: int, hierarchical: bool = True
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
        for phase, calls, size in (
            ("all_gather", gathers, unit.gather_bytes),
            ("reduce_scatter", scatters, unit.reduce_bytes),
        ):
            if staged:
                inter, intra = _staged_bytes(size, p, m)
                add((phase, "inter_node"), calls, calls * inter)  # type: ignore[arg-type]
                add((phase, "intra_node"), calls * m, calls * intra)  # type: ignore[arg-type]
            else:
                add((phase, "partition"), calls, calls * (size - size // p))  # type: ignore[arg-type]
        if r > 1 and unit.reduce_bytes:
            add(("all_reduce", "replication"), 1, all_reduce_bytes(unit.reduce_bytes // p, r))
    return StepTraffic(per_rank, _nic_bytes(topology, units, micro_steps, staged))


def node_bytes(topology: Topology, tallies: Mapping[Key, Tally]) -> float:
    """Bytes that left each node's network interface, averaged over nodes, when every rank sent `tallies`.

    Collectives are taken for rings, along whose edges equal volumes flow; see `StepTraffic.nic_bytes`.
    """
    groups = {
        "partition": topology.partition_groups,
        "inter_node": topology.inter_node_groups,
        "intra_node": (),
        "replication": topology.replication_groups,
    }
    return sum(t.bytes_sent * _edges_per_node(topology, groups[scope]) for (_, scope), t in tallies.items())


def all_reduce_bytes(size: int, ranks: int) -> int:
    """Bytes that each of `ranks` ranks sends to all-reduce a buffer of `size` bytes: 2 (n-1)/n of it."""
    return 2 * size * (ranks - 1) // ranks


def _staged_bytes(size: int, p: int, m: int) -> tuple[int, int]:
    """(between nodes, inside the node) bytes that one rank sends to gather or scatter `size` bytes in two stages."""
    shard, k = size // p, p // m
    return (m - 1) * shard, m * (k - 1) * shard


def _nic_bytes(topology: Topology, units: Iterable[UnitShape], micro_steps: int, staged: bool) -> dict[str, float]:
    """Bytes leaving one node's interface per optimizer step, from the groups' ring edges that cross nodes."""
    gathered = scattered = reduced = 0
    for unit in units:
        gathered += unit.gather_bytes * unit.gathers_per_micro_step * micro_steps
        scattered += unit.reduce_bytes * micro_steps
        reduced += unit.reduce_bytes
    p, r = topology.partition_size, topology.replication_size
    groups = topology.inter_node_groups if staged else topology.partition_groups
    # Along every edge of a flat ring (p-1)/p of the unit flows; in the staged form each of the k rings between nodes
    # carries one shard from each of its m members.
    share = (topology.nodes_per_partition - 1) / p if staged else (p - 1) / p
    return {
        "hop1_all_gather": gathered * share * _edges_per_node(topology, groups),
        "hop1_reduce_scatter": scattered * share * _edges_per_node(topology, groups),
        "hop2_all_reduce": 2 * (r - 1) / r * reduced / p * _edges_per_node(topology, topology.replication_groups),
    }


def _edges_per_node(topology: Topology, groups: Iterable[Group]) -> float:
    return topology.edges_between_nodes(groups) / topology.node_count
