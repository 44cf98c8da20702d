"""Which ranks talk to which: partition groups, replication groups and their subgroups, as pure arithmetic.

Vocabulary, used everywhere in the project (MiCS, arXiv 2205.00119, section 3):

- *partition group*: `partition_size` = p consecutive ranks that together hold one copy of the model state.
- *replication group*: the world_size / p ranks, one of each partition group, that hold the same shard.
- *inter-node subgroup* and *intra-node subgroup*: a partition group that spans m = p / k nodes of k ranks gathers in
  two stages, k parallel gathers of m ranks between nodes, then gathers of k ranks inside each node.

Ranks are in natural order, `rank = group * p + node_in_group * k + local_rank`, because `torch.distributed.new_group`
sorts its ranks: any other order would silently permute the shards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from hf_mics.errors import TopologyError

Group = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The groups that `world_size` ranks on nodes of `node_size` form at `partition_size`.

    Args:
        world_size: ranks in the job.
        node_size: ranks on each node (k); every node has the same number.
        partition_size: ranks in a partition group (p). Divides `world_size`, and divides `node_size` or is a multiple
            of it. 1 is plain data parallelism, `world_size` is full sharding.

    Raises:
        TopologyError: a size is not a positive integer, or one of the rules above is broken; the message holds the
            equation and the partition sizes that would do.
    """

    world_size: int
    node_size: int
    partition_size: int

    def __post_init__(self) -> None:
        for name in ("world_size", "node_size", "partition_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TopologyError(f"{name} must be a positive integer, got {value!r}.")
        world, node, partition = self.world_size, self.node_size, self.partition_size
        if world % node:
            raise TopologyError(
                f"node_size must divide world_size, so that every node has as many ranks: got world_size {world} = "
                f"{world // node} x {node} + {world % node}. Launch the same number of processes on every node."
            )
        choices = ", ".join(map(str, valid_partition_sizes(world, node)))
        if world % partition:
            raise TopologyError(
                f"partition_size must divide world_size: got world_size {world} = {world // partition} x {partition} "
                f"+ {world % partition}. Valid partition sizes for {world} ranks on nodes of {node}: {choices}."
            )
        if node % partition and partition % node:
            raise TopologyError(
                f"partition_size must divide node_size or be a multiple of it, so that no partition group straddles "
                f"part of a node: got partition_size {partition} on nodes of {node}. Valid partition sizes for "
                f"{world} ranks on nodes of {node}: {choices}."
            )

    @property
    def node_count(self) -> int:
        """Nodes in the job."""
        return self.world_size // self.node_size

    @property
    def replication_size(self) -> int:
        """Ranks in a replication group, which is the number of partition groups."""
        return self.world_size // self.partition_size

    @property
    def nodes_per_partition(self) -> int:
        """Nodes that one partition group touches (m); 1 when the group lies within a node."""
        return max(1, self.partition_size // self.node_size)

    @property
    def is_hierarchical(self) -> bool:
        """Whether two-stage collectives differ from flat ones: groups of several nodes with several ranks each."""
        return self.nodes_per_partition > 1 and self.node_size > 1

    @cached_property
    def partition_groups(self) -> tuple[Group, ...]:
        """Every partition group; ranks ascending, groups by first rank."""
        p = self.partition_size
        return tuple(tuple(range(first, first + p)) for first in range(0, self.world_size, p))

    @cached_property
    def replication_groups(self) -> tuple[Group, ...]:
        """Every replication group; the i-th holds the i-th shard."""
        p = self.partition_size
        return tuple(tuple(range(shard, self.world_size, p)) for shard in range(p))

    @cached_property
    def inter_node_groups(self) -> tuple[Group, ...]:
        """For each partition group and local rank, the ranks with that local rank on the group's nodes.

        Groups of one rank when a partition group lies within a node.
        """
        ranks_per_node = self._partition_ranks_per_node
        return tuple(group[local::ranks_per_node] for group in self.partition_groups for local in range(ranks_per_node))

    @cached_property
    def intra_node_groups(self) -> tuple[Group, ...]:
        """For each partition group and node, the group's ranks on that node."""
        size = self._partition_ranks_per_node
        return tuple(
            group[start : start + size]
            for group in self.partition_groups
            for start in range(0, self.partition_size, size)
        )

    @property
    def _partition_ranks_per_node(self) -> int:
        return min(self.partition_size, self.node_size)

    def node_of(self, rank: int) -> int:
        """The node on which `rank` runs."""
        if not 0 <= rank < self.world_size:
            raise TopologyError(f"rank must be in 0..{self.world_size - 1}, got {rank}.")
        return rank // self.node_size

    def partition_index(self, rank: int) -> int:
        """Which partition group `rank` belongs to."""
        self.node_of(rank)
        return rank // self.partition_size

    def shard_index(self, rank: int) -> int:
        """Which shard `rank` holds, 0 <= shard < partition_size."""
        self.node_of(rank)
        return rank % self.partition_size

    def edges_between_nodes(self, groups: Iterable[Group]) -> int:
        """Directed ring edges of `groups` that leave a node, over all nodes.

        A ring over a group in rank order moves the same bytes along every edge, so this number times the bytes per
        edge is what leaves all nodes' network interfaces together.
        """
        return sum(
            self.node_of(rank) != self.node_of(following)
            for group in groups
            if len(group) > 1
            for rank, following in zip(group, group[1:] + group[:1], strict=True)
        )

    def draw(self, max_nodes: int = 16) -> str:
        """The layout as text: one row per node; `A0` is the rank with shard 0 of partition group A.

        A column of equal digits across letters is a replication group. Rows beyond `max_nodes` are left out and said.
        """
        cells = [f"{_letters(self.partition_index(r))}{self.shard_index(r)}" for r in range(self.world_size)]
        width = max(map(len, cells))
        label = len(f"node {self.node_count - 1}")
        rows = []
        for node in range(min(self.node_count, max_nodes)):
            ranks = range(node * self.node_size, (node + 1) * self.node_size)
            row = " ".join(cells[r].ljust(width) + (" |" if self._ends_group(r) else "  ") for r in ranks)
            rows.append(f"{f'node {node}':<{label}}  | {row.rstrip()}")
        if self.node_count > max_nodes:
            rows.append(f"... and {self.node_count - max_nodes} more nodes")
        rows.append(self._legend())
        return "\n".join(rows)

    def _legend(self) -> str:
        letters = ", ".join(_letters(i) for i in range(min(self.replication_size, 3)))
        letters += ", ..." if self.replication_size > 3 else ""
        if self.replication_size == 1:
            return "letter = partition group (A alone, no replicas), digit = shard"
        return (
            f"letter = partition group ({letters}), digit = shard; "
            f"the {self.replication_size} ranks with one digit form a replication group"
        )

    def _ends_group(self, rank: int) -> bool:
        return self.shard_index(rank) == self.partition_size - 1 or (rank + 1) % self.node_size == 0


def valid_partition_sizes(world_size: int, node_size: int) -> tuple[int, ...]:
    """Every partition size that `Topology` accepts for these sizes, ascending."""
    return tuple(
        p for p in range(1, world_size + 1) if world_size % p == 0 and (node_size % p == 0 or p % node_size == 0)
    )


def _letters(index: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA, as spreadsheet columns."""
    name = ""
    index += 1
    while index:
        index, digit = divmod(index - 1, 26)
        name = chr(ord("A") + digit) + name
    return name
