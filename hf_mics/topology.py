"""Which ranks talk to which? Partition groups, replication groups and their subgroups, as pure arithmetic.

Vocabulary, used everywhere in the project (MiCS, arXiv 2205.00119, section 3):

- *partition group*: `partition_size` = p consecutive ranks that together hold one copy of the model state.
- *replication group*: the world_size / p ranks, one of each partition group, that hold the same shard.
- *inter-node subgroup* and *intra-node subgroup*: a partition group that spans m = p / k nodes of k ranks gathers in
  two stages, k parallel gathers of m ranks between nodes, then gathers of k ranks inside each node.

Ranks are in natural order, `rank = group * p + node_in_group * k + local_rank`, because `torch.distributed.new_group`
sorts its ranks: any other order would silently permute the shards.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from functools import cached_property

from hf_mics.errors import TopologyError
from hf_mics.meter import Scope

Group = tuple[int, ...]
MOST_RANKS = 2**20
"""The largest world_size that is taken for one."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The groups that `world_size` ranks on nodes of `node_size` form at `partition_size`.

    Args:
        world_size: ranks in the job, at most `MOST_RANKS`.
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
        require_world_size(world)
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

    def edges_per_node(self, scope: Scope) -> int:
        """Directed edges that leave one node, of the rings in rank order over all groups of one kind.

        A ring moves the same bytes along every edge, so this number times the bytes per edge is what leaves a node's
        network interface.
        """
        spans = self.nodes_per_partition > 1
        if scope == "partition":
            return 1 if spans else 0
        if scope == "inter_node":
            return self.node_size if spans else 0
        if scope == "replication" and self.replication_size > 1 and self.node_count > 1:
            # A shard's ring visits every node that holds it once, whether or not it stays for several ranks.
            return self._partition_ranks_per_node
        return 0

    def draw(self, max_nodes: int = 16, max_ranks: int = 32) -> str:
        """The layout as text: one row per node; `A0` is the rank with shard 0 of partition group A.

        A column of equal digits across letters is a replication group. Rows beyond `max_nodes` and ranks of a node
        beyond `max_ranks` are left out and said.
        """
        nodes, ranks = min(self.node_count, max_nodes), min(self.node_size, max_ranks)
        cells = [[self._cell(node * self.node_size + local) for local in range(ranks)] for node in range(nodes)]
        width = max(len(name) for row in cells for name, _ in row)
        label = len(f"node {nodes - 1}")
        more = f" ... and {self.node_size - ranks} more" if self.node_size > ranks else ""
        rows = []
        for node, row in enumerate(cells):
            text = " ".join(f"{name:<{width}}{' |' if ends else '  '}" for name, ends in row)
            rows.append(f"{f'node {node}':<{label}}  | {text.rstrip()}{more}")
        if self.node_count > max_nodes:
            rows.append(f"... and {self.node_count - max_nodes} more nodes")
        rows.append(self._legend())
        return "\n".join(rows)

    def _cell(self, rank: int) -> tuple[str, bool]:
        """(a rank's name in the drawing, whether its group ends with it, there or on its node)."""
        shard = self.shard_index(rank)
        ends = shard == self.partition_size - 1 or (rank + 1) % self.node_size == 0
        return f"{_letters(self.partition_index(rank))}{shard}", ends

    def _legend(self) -> str:
        letters = ", ".join(_letters(i) for i in range(min(self.replication_size, 3)))
        letters += ", ..." if self.replication_size > 3 else ""
        if self.replication_size == 1:
            return "letter = partition group (A alone, no replicas), digit = shard"
        return (
            f"letter = partition group ({letters}), digit = shard; "
            f"the {self.replication_size} ranks with one digit form a replication group"
        )


def valid_partition_sizes(world_size: int, node_size: int) -> tuple[int, ...]:
    """Every partition size that `Topology` accepts for these sizes, ascending."""
    small = [p for p in range(1, math.isqrt(world_size) + 1) if world_size % p == 0]
    divisors = sorted({*small, *(world_size // p for p in small)})
    return tuple(p for p in divisors if node_size % p == 0 or p % node_size == 0)


def require_world_size(world_size: int) -> None:
    """Raises TopologyError if there are more ranks than any job has; whoever walks them would not come back."""
    if world_size > MOST_RANKS:
        raise TopologyError(
            f"world_size must be at most {MOST_RANKS} ranks, got {reprlib.repr(world_size)}: correct the number of "
            "nodes, or of ranks on each."
        )


def _letters(index: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA, as spreadsheet columns."""
    name = ""
    index += 1
    while index:
        index, digit = divmod(index - 1, 26)
        name = chr(ord("A") + digit) + name
    return name
