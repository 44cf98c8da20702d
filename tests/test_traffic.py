"""Does the prediction agree with volumes worked out by hand?"""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_mics.meter import Tally, TrafficMeter
from hf_mics.topology import Topology, valid_partition_sizes
from hf_mics.traffic import UnitShape, all_reduce_bytes, node_bytes, predict


def unit(gather: int = 800, reduce: int = 400, gathers: int = 2, name: str = "layer") -> UnitShape:
    return UnitShape(name=name, gather_bytes=gather, reduce_bytes=reduce, gathers_per_micro_step=gathers)


def topology(world: int, node: int, partition: int) -> Topology:
    return Topology(world_size=world, node_size=node, partition_size=partition)


def test_groups_inside_a_node_gather_and_scatter_every_micro_step_and_all_reduce_once():
    """(4, 2, 2): 800 bytes gathered by 2 ranks: each sends its half, 400, twice in each of 3 micro-steps.

    400 bytes of gradients scattered by 2 ranks: each sends half, 200, in each of 3. Hop 2 sums shards of 200 bytes
    over 2 replicas: 2 (2-1)/2 x 200 = 200, once. Nodes are whole partition groups, so only hop 2 leaves a node: each
    of its 2 ranks sends 200.
    """
    traffic = predict(topology(4, 2, 2), [unit()], micro_steps=3)
    assert traffic.per_rank == {
        ("all_gather", "partition"): Tally(6, 2400),
        ("reduce_scatter", "partition"): Tally(3, 600),
        ("all_reduce", "replication"): Tally(1, 200),
    }
    assert traffic.hop1_bytes == 3000
    assert traffic.hop2_bytes == 200
    assert traffic.nic_bytes == {"hop1_all_gather": 0.0, "hop1_reduce_scatter": 0.0, "hop2_all_reduce": 400.0}


def test_a_group_that_spans_nodes_moves_only_the_staged_share_between_them():
    """(4, 2, 4), staged: shards of 200 bytes. Between 2 nodes each rank sends its shard once: 200. Inside the node, 2
    columns of 2 ranks: 2 x 200 = 400 in 2 calls. A node's interface carries its 2 ranks' 200 bytes: 400 of the 800,
    the paper's (4-2)/4. Flat, the ring's one outgoing edge carries (4-1)/4: 600. One group: no hop 2.
    """
    staged = predict(topology(4, 2, 4), [unit(gathers=1)], micro_steps=1)
    assert staged.per_rank == {
        ("all_gather", "inter_node"): Tally(1, 200),
        ("all_gather", "intra_node"): Tally(2, 400),
        ("reduce_scatter", "inter_node"): Tally(1, 100),
        ("reduce_scatter", "intra_node"): Tally(2, 200),
    }
    assert staged.nic_bytes == {"hop1_all_gather": 400.0, "hop1_reduce_scatter": 200.0, "hop2_all_reduce": 0.0}
    flat = predict(topology(4, 2, 4), [unit(gathers=1)], micro_steps=1, hierarchical=False)
    assert flat.per_rank == {
        ("all_gather", "partition"): Tally(1, 600),
        ("reduce_scatter", "partition"): Tally(1, 300),
    }
    assert flat.nic_bytes == {"hop1_all_gather": 600.0, "hop1_reduce_scatter": 300.0, "hop2_all_reduce": 0.0}


def test_over_gloo_a_flat_scatter_is_an_exchange_which_crosses_more():
    """(4, 2, 4), flat: each rank has 3 slices of 100 bytes to send, 2 of them to the other node; 2 ranks send 400.

    A ring's one outgoing edge would carry 300. The gather is a ring on either; staged, both are the same.
    """
    over_gloo = predict(topology(4, 2, 4), [unit(gathers=1)], micro_steps=1, hierarchical=False, backend="gloo")
    assert over_gloo.nic_bytes == {"hop1_all_gather": 600.0, "hop1_reduce_scatter": 400.0, "hop2_all_reduce": 0.0}
    on_nccl = predict(topology(4, 2, 4), [unit(gathers=1)], micro_steps=1, hierarchical=False)
    assert over_gloo.per_rank == on_nccl.per_rank
    staged = [predict(topology(4, 2, 4), [unit()], micro_steps=1, backend=backend) for backend in ("gloo", "nccl")]
    assert staged[0] == staged[1]


def test_bytes_that_were_counted_cross_nodes_as_the_prediction_says():
    for partition in (1, 2, 8):
        t = topology(8, 2, partition)
        for hierarchical, backend in ((True, "gloo"), (False, "gloo"), (False, "nccl")):
            traffic = predict(t, [unit()], micro_steps=2, hierarchical=hierarchical, backend=backend)
            assert node_bytes(t, traffic.per_rank, backend=backend) == sum(traffic.nic_bytes.values())


def test_a_partition_of_one_rank_is_plain_data_parallelism():
    """(4, 2, 1): nothing to gather; each rank sends 2 (4-1)/4 x 400 = 600 bytes of gradients, once per step.

    The ring 0 1 2 3 leaves each node over one edge, which carries those 600 bytes.
    """
    traffic = predict(topology(4, 2, 1), [unit()], micro_steps=5)
    assert traffic.per_rank == {("all_reduce", "replication"): Tally(1, 600)}
    assert traffic.nic_bytes["hop2_all_reduce"] == 600.0


def test_nodes_of_one_rank_communicate_flat():
    """(4, 1, 2): a group spans 2 nodes, but two stages would be the flat ring again."""
    traffic = predict(topology(4, 1, 2), [unit(gathers=1)], micro_steps=1)
    assert traffic.per_rank[("all_gather", "partition")] == Tally(1, 400)
    assert traffic.nic_bytes["hop1_all_gather"] == 400.0


def test_units_add_up_and_frozen_units_send_no_gradients():
    traffic = predict(topology(4, 2, 2), [unit(), unit(gather=80, reduce=0, gathers=1)], micro_steps=2)
    assert traffic.per_rank == {
        ("all_gather", "partition"): Tally(4 + 2, 1600 + 80),
        ("reduce_scatter", "partition"): Tally(2, 400),
        ("all_reduce", "replication"): Tally(1, 200),
    }


def test_an_all_reduce_sends_twice_all_but_one_nth():
    assert [all_reduce_bytes(400, ranks) for ranks in (1, 2, 4, 8)] == [0, 400, 600, 700]
    assert all_reduce_bytes(7, 3) == int(2 * 2 / 3 * 7), "rounded once, at the end"


@st.composite
def spanning(draw: st.DrawFn) -> Topology:
    node = draw(st.integers(2, 8))
    partition = node * draw(st.integers(2, 6))
    return topology(partition * draw(st.integers(1, 4)), node, partition)


@given(spanning(), st.integers(1, 5), st.integers(1, 3))
def test_hierarchical_saves_exactly_the_papers_factor(t: Topology, micro_steps: int, shard: int):
    """(p-k)/p against (p-1)/p of what is gathered and scattered, and nothing of hop 2."""
    p, k = t.partition_size, t.node_size
    units = [unit(gather=16 * shard * p, reduce=8 * shard * p, gathers=2), unit(gather=4 * p, reduce=4 * p, gathers=1)]
    staged = predict(t, units, micro_steps=micro_steps)
    flat = predict(t, units, micro_steps=micro_steps, hierarchical=False)
    gathered = micro_steps * (2 * units[0].gather_bytes + units[1].gather_bytes)
    scattered = micro_steps * (units[0].reduce_bytes + units[1].reduce_bytes)
    for phase, volume in (("hop1_all_gather", gathered), ("hop1_reduce_scatter", scattered)):
        assert staged.nic_bytes[phase] == pytest.approx(volume * (p - k) / p, rel=1e-12)
        assert flat.nic_bytes[phase] == pytest.approx(volume * (p - 1) / p, rel=1e-12)
    assert staged.nic_bytes["hop2_all_reduce"] == flat.nic_bytes["hop2_all_reduce"]
    assert staged.hop1_bytes == flat.hop1_bytes, "staging moves bytes off the network interface, it does not save any"


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    node = draw(st.integers(1, 8))
    world = node * draw(st.integers(1, 8))
    return topology(world, node, draw(st.sampled_from(valid_partition_sizes(world, node))))


@given(topologies(), st.integers(1, 6))
def test_hop_2_does_not_grow_with_micro_steps_and_hop_1_does_not_grow_with_the_cluster(t: Topology, micro_steps: int):
    units = [unit(gather=16 * t.partition_size, reduce=8 * t.partition_size)]
    one, many = predict(t, units, micro_steps=1), predict(t, units, micro_steps=micro_steps)
    assert many.hop2_bytes == one.hop2_bytes
    assert many.hop1_bytes == micro_steps * one.hop1_bytes
    larger = topology(2 * t.world_size, t.node_size, t.partition_size)
    if t.partition_size in valid_partition_sizes(2 * t.world_size, t.node_size):
        assert predict(larger, units, micro_steps=micro_steps).hop1_bytes == many.hop1_bytes


def test_the_meter_adds_up_by_phase_and_scope_until_reset():
    meter = TrafficMeter()
    meter.add("all_gather", "partition", bytes_sent=5)
    meter.add("all_gather", "partition", calls=2, bytes_sent=7)
    meter.add("all_reduce", "replication", bytes_sent=1)
    read = meter.read()
    assert read == {("all_gather", "partition"): Tally(3, 12), ("all_reduce", "replication"): Tally(1, 1)}
    meter.add("all_gather", "partition", bytes_sent=1)
    assert read["all_gather", "partition"] == Tally(3, 12), "what was read must not change afterwards"
    meter.reset()
    assert meter.read() == {}


def test_the_published_factors_follow_from_what_ranks_send():
    """Per unit of gathered bytes, over gloo: (p-k)/p per node hierarchical, (p-1)/p flat (MiCS section 3.3)."""
    gloo = functools.partial(node_bytes, backend="gloo")
    topology = Topology(world_size=8, node_size=2, partition_size=8)
    unit = 8 * 1000
    flat = gloo(topology, {("all_gather", "partition"): Tally(1, 7 * 1000)})
    staged = gloo(
        topology, {("all_gather", "inter_node"): Tally(1, 3 * 1000), ("all_gather", "intra_node"): Tally(4, 4 * 1000)}
    )
    assert flat / unit == 7 / 8
    assert staged / unit == 6 / 8
    # Each of a node's two ranks sends 6 of its 7 slices to other nodes.
    assert gloo(topology, {("reduce_scatter", "partition"): Tally(1, 7 * 1000)}) / unit == 12 / 8
    assert node_bytes(topology, {("reduce_scatter", "partition"): Tally(1, 7 * 1000)}, backend="nccl") / unit == 7 / 8
    inside = Topology(world_size=8, node_size=2, partition_size=2)
    assert gloo(inside, {("reduce_scatter", "partition"): Tally(1, 1000)}) == 0
    smaller_than_a_node = Topology(world_size=8, node_size=4, partition_size=2)
    assert gloo(smaller_than_a_node, {("reduce_scatter", "partition"): Tally(1, 1000)}) == 0
    # Two replication groups of four, one edge of each leaves every node.
    assert gloo(inside, {("all_reduce", "replication"): Tally(1, 1500)}) == 3000
