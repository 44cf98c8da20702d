"""Do the groups partition the ranks as MiCS says, and do the paper's traffic factors fall out of them?"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_mics.errors import TopologyError
from hf_mics.meter import Scope
from hf_mics.topology import MOST_RANKS, Group, Topology, valid_partition_sizes


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    node_size = draw(st.integers(1, 12))
    world_size = node_size * draw(st.integers(1, 12))
    partition_size = draw(st.sampled_from(valid_partition_sizes(world_size, node_size)))
    return Topology(world_size=world_size, node_size=node_size, partition_size=partition_size)


def subgroups_of(group: tuple[int, ...], groups: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
    return [other for other in groups if set(other) <= set(group)]


@given(topologies())
def test_every_rank_is_in_exactly_one_group_of_each_kind(t: Topology):
    kinds = (t.partition_groups, t.replication_groups, t.inter_node_groups, t.intra_node_groups)
    for groups in kinds:
        assert sorted(rank for group in groups for rank in group) == list(range(t.world_size))


@given(topologies())
def test_groups_have_their_sizes(t: Topology):
    p, k, m = t.partition_size, t.node_size, t.nodes_per_partition
    assert {len(g) for g in t.partition_groups} == {p}
    assert {len(g) for g in t.replication_groups} == {t.replication_size} == {t.world_size // p}
    assert {len(g) for g in t.inter_node_groups} == {m}
    assert {len(g) for g in t.intra_node_groups} == {min(p, k)}
    assert m * min(p, k) == p
    assert t.node_count * k == t.world_size
    assert t.is_hierarchical == (p > k > 1)


@given(topologies())
def test_groups_are_in_natural_rank_order(t: Topology):
    for groups in (t.partition_groups, t.replication_groups, t.inter_node_groups, t.intra_node_groups):
        assert all(list(group) == sorted(group) for group in groups)
        firsts = [group[0] for group in groups]
        assert firsts == sorted(firsts)
    assert all(group == tuple(range(group[0], group[-1] + 1)) for group in t.partition_groups)


@given(topologies())
def test_a_rank_is_named_by_its_partition_group_and_shard(t: Topology):
    for rank in range(t.world_size):
        assert t.partition_groups[t.partition_index(rank)][t.shard_index(rank)] == rank
        assert t.replication_groups[t.shard_index(rank)][t.partition_index(rank)] == rank
        # rank = group * p + node_in_group * k + local_rank
        inside = t.shard_index(rank)
        node_in_group, local = divmod(inside, t.node_size)
        assert rank == t.partition_index(rank) * t.partition_size + node_in_group * t.node_size + local


@given(topologies())
def test_inter_and_intra_node_groups_form_a_grid_over_each_partition_group(t: Topology):
    for group in t.partition_groups:
        inter, intra = subgroups_of(group, t.inter_node_groups), subgroups_of(group, t.intra_node_groups)
        for groups in (inter, intra):
            assert sorted(rank for g in groups for rank in g) == list(group)
        assert all(len(set(a) & set(b)) == 1 for a, b in product(inter, intra))
        assert all(len({t.node_of(rank) for rank in g}) == 1 for g in intra)
        assert all(len({t.node_of(rank) for rank in g}) == len(g) for g in inter)
        assert len({rank % t.node_size for g in inter for rank in g[:1]}) == len(inter), "one group per local rank"


@given(topologies())
def test_the_papers_traffic_factors_fall_out_of_the_groups(t: Topology):
    """Bytes through one node's interface per gather of one unit of 1 byte, times the units gathered at once there.

    A flat ring moves (p-1)/p of the unit along every edge and a group that spans nodes leaves each of its nodes over
    one edge. In the staged form each of the k rings between nodes moves m-1 of the p shards along every edge:
    k (m-1)/p = (p-k)/p.
    """
    p, k, m = t.partition_size, t.node_size, t.nodes_per_partition
    flat = t.edges_per_node("partition") * Fraction(p - 1, p)
    staged = t.edges_per_node("inter_node") * Fraction(m - 1, p)
    if m == 1:
        assert flat == staged == 0, "a group inside a node sends nothing between nodes"
    else:
        assert flat == Fraction(p - 1, p)
        assert staged == Fraction(p - k, p)
        assert staged <= flat
    assert t.edges_per_node("intra_node") == 0


def test_edges_that_leave_a_node_agree_with_a_walk_along_every_ring():
    """Of every node, in every layout of up to 6 nodes of up to 12 ranks."""
    for node_size, nodes in product(range(1, 13), range(1, 7)):
        for p in valid_partition_sizes(node_size * nodes, node_size):
            t = Topology(world_size=node_size * nodes, node_size=node_size, partition_size=p)
            kinds: dict[Scope, tuple[Group, ...]] = {
                "partition": t.partition_groups,
                "replication": t.replication_groups,
                "inter_node": t.inter_node_groups,
                "intra_node": t.intra_node_groups,
            }
            for scope, groups in kinds.items():
                leaving = Counter(
                    t.node_of(rank)
                    for group in groups
                    for rank, following in zip(group, group[1:] + group[:1], strict=True)
                    if t.node_of(rank) != t.node_of(following)
                )
                assert {leaving[node] for node in range(nodes)} == {t.edges_per_node(scope)}, (t, scope)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 70))
def test_valid_partition_sizes_are_those_that_the_constructor_takes(world_size: int, node_size: int, partition: int):
    if world_size % node_size:
        with pytest.raises(TopologyError, match="node_size must divide world_size"):
            Topology(world_size=world_size, node_size=node_size, partition_size=partition)
        return
    valid = valid_partition_sizes(world_size, node_size)
    assert valid == tuple(sorted(valid))
    assert {1, world_size, node_size} <= set(valid)
    if partition in valid:
        Topology(world_size=world_size, node_size=node_size, partition_size=partition)
    else:
        with pytest.raises(TopologyError) as caught:
            Topology(world_size=world_size, node_size=node_size, partition_size=partition)
        assert f": {', '.join(map(str, valid))}." in str(caught.value)


def test_an_error_names_the_sizes_and_the_valid_choices():
    with pytest.raises(TopologyError) as caught:
        Topology(world_size=8, node_size=4, partition_size=3)
    assert "world_size 8 = 2 x 3 + 2" in str(caught.value)
    assert "Valid partition sizes for 8 ranks on nodes of 4: 1, 2, 4, 8." in str(caught.value)
    with pytest.raises(TopologyError) as caught:
        Topology(world_size=24, node_size=4, partition_size=6)
    assert "partition_size 6 on nodes of 4" in str(caught.value)
    assert "Valid partition sizes for 24 ranks on nodes of 4: 1, 2, 4, 8, 12, 24." in str(caught.value)
    with pytest.raises(TopologyError) as caught:
        Topology(world_size=10, node_size=4, partition_size=2)
    assert "world_size 10 = 2 x 4 + 2" in str(caught.value)


@pytest.mark.parametrize("name", ["world_size", "node_size", "partition_size"])
@pytest.mark.parametrize("bad", [0, -2, 2.0, "2", True, None])
def test_a_size_that_is_no_positive_integer_is_refused_by_name(name: str, bad: object):
    sizes = {"world_size": 4, "node_size": 2, "partition_size": 2, name: bad}
    with pytest.raises(TopologyError, match=f"{name} must be a positive integer, got {bad!r}"):
        Topology(**sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_world_is_refused(rank: int):
    t = Topology(world_size=4, node_size=2, partition_size=2)
    for question in (t.node_of, t.partition_index, t.shard_index):
        with pytest.raises(TopologyError, match=rf"rank must be in 0\.\.3, got {rank}"):
            question(rank)


@given(topologies())
def test_the_drawing_shows_every_rank_once_on_its_node(t: Topology):
    *rows, legend = t.draw(max_nodes=t.node_count).splitlines()
    assert len(rows) == t.node_count
    cells = [cell for row in rows for cell in row.partition("|")[2].replace("|", " ").split()]
    assert len(cells) == len(set(cells)) == t.world_size
    assert [row.split()[1] for row in rows] == [str(node) for node in range(t.node_count)]
    shards = [int(cell.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")) for cell in cells]
    # A replication group is a digit: reading the cells in rank order gives back every replication group.
    for shard, group in enumerate(t.replication_groups):
        assert tuple(rank for rank, digit in enumerate(shards) if digit == shard) == group
    told = f"the {t.replication_size} ranks with one digit" if t.replication_size > 1 else "no replicas"
    assert told in legend


def test_sizes_that_no_job_has_are_refused_and_the_largest_is_drawn_in_few_characters():
    with pytest.raises(TopologyError, match="at most 1048576 ranks, got 8000000000: correct the number of nodes"):
        Topology(world_size=8 * 10**9, node_size=8, partition_size=8)
    for node_size in (8, MOST_RANKS):
        largest = Topology(world_size=MOST_RANKS, node_size=node_size, partition_size=node_size)
        assert len(largest.draw()) < 5000
    assert largest.draw().splitlines()[0].endswith(" A31 ... and 1048544 more")
    assert len(valid_partition_sizes(MOST_RANKS, 8)) == 21


def test_the_drawing_of_groups_inside_a_node():
    assert Topology(world_size=8, node_size=4, partition_size=2).draw() == (
        "node 0  | A0   A1 | B0   B1 |\n"
        "node 1  | C0   C1 | D0   D1 |\n"
        "letter = partition group (A, B, C, ...), digit = shard; the 4 ranks with one digit form a replication group"
    )


def test_the_drawing_of_groups_that_span_nodes():
    assert Topology(world_size=8, node_size=2, partition_size=4).draw() == (
        "node 0  | A0   A1 |\n"
        "node 1  | A2   A3 |\n"
        "node 2  | B0   B1 |\n"
        "node 3  | B2   B3 |\n"
        "letter = partition group (A, B), digit = shard; the 2 ranks with one digit form a replication group"
    )


def test_the_drawing_says_how_many_nodes_it_leaves_out():
    text = Topology(world_size=40, node_size=2, partition_size=2).draw(max_nodes=3)
    assert text.splitlines()[3] == "... and 17 more nodes"
    assert len(text.splitlines()) == 5
