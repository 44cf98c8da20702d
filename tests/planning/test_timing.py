"""Is a predicted step what the arithmetic of its lanes says, in the limits that can be computed by hand?"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mics.errors import ConfigError, TopologyError
from hf_mics.planning.cluster import Cluster, Link, Range
from hf_mics.planning.collective_times import unit_loads
from hf_mics.planning.instances import instance_cluster
from hf_mics.planning.schedule import Segment, Stage, micro_step_s
from hf_mics.planning.timing import Implementation, System, predict, predict_at, step_flops, time_notes
from hf_mics.planning.workload import ModelShape, Workload
from hf_mics.throughput import flops_per_token
from hf_mics.topology import Topology, valid_partition_sizes

GPT = ModelShape(
    name="gpt",
    family="gpt",
    num_layers=6,
    hidden_size=1024,
    ffn_size=4096,
    num_heads=16,
    vocab_size=50257,
    context_length=1024,
)
WORKLOAD = Workload(model=GPT, seq_length=512, micro_batch=2, accumulation=4)
CLUSTER = instance_cluster("p4d.24xlarge", nodes=4)
SIZES = valid_partition_sizes(32, 8)
FREE = Link(bandwidth_bytes_per_s=Range.over(1e30), latency_s=Range.over(0.0))


def link(bytes_per_s: float, latency_s: float = 0.0) -> Link:
    return Link(bandwidth_bytes_per_s=Range.over(bytes_per_s), latency_s=Range.over(latency_s))


def exact(**changes: object) -> Cluster:
    """CLUSTER with every constant known: free links, half the peak, no time for the optimizer."""
    known = {
        "intra_node": FREE,
        "inter_node": FREE,
        "compute_efficiency": Range.over(0.5),
        "update_bytes_per_s": None,
        "ring_lockstep": Range.over(0.0),
    }
    return replace(CLUSTER, **(known | changes))


def seconds(cluster: Cluster, **arguments: object) -> float:
    step = predict(WORKLOAD, cluster, **arguments).step_s
    assert step.low == step.high
    return step.low


def padded_bytes(p: int, width: int = 2) -> int:
    return width * sum(unit.padded_numel(p) for unit in GPT.units)


@pytest.mark.parametrize("system", get_args(System))
@pytest.mark.parametrize("p", SIZES)
def test_on_free_links_every_system_takes_its_computing_time(system: System, p: int):
    # 6 N tokens and attention forward and backward, and the layers' forward once more.
    model, recomputed = step_flops(WORKLOAD)
    expected = (model + recomputed) / (0.5 * 312e12)
    assert seconds(exact(), system=system, partition_size=p) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_of_the_usual_formula_and_a_third_more_with_recomputed_layers(checkpointing: bool):
    workload = replace(WORKLOAD, activation_checkpointing=checkpointing)
    tokens = 2 * 512 * 4
    usual = tokens * flops_per_token(GPT.num_parameters, 6, 1024, 512)
    model, recomputed = step_flops(workload)
    # The usual formula also counts biases, norms and positions: 0.6 % of this small model.
    assert model == pytest.approx(usual, rel=0.01)
    head = 6.0 * tokens * 50257 * 1024
    assert recomputed == pytest.approx((model - head) / 3 if checkpointing else 0.0, rel=1e-12)


@pytest.mark.parametrize(("family", "decoders"), [("bert", 0), ("llama", 0), ("t5", 6)])
def test_other_families_compute_about_six_flops_per_parameter_and_token(family: str, decoders: int):
    model = replace(GPT, family=family, num_decoder_layers=decoders, tied_embeddings=family != "llama")
    workload = replace(WORKLOAD, model=model, activation_checkpointing=False)
    tokens = 2 * 512 * 4
    parameters = model.num_parameters - (0 if model.tied_embeddings else 50257 * 1024)
    attention = 12.0 * 1024 * 512 * (6 + 2 * decoders)
    assert step_flops(workload)[0] == pytest.approx(tokens * (6.0 * parameters + attention), rel=0.01)


def test_hop_1_inside_a_node_alone_takes_its_bytes_over_the_slow_link():
    """So slow that computing hides behind it: layers are gathered twice and scattered, the root gathered once."""
    p, bandwidth = 8, 1e6
    root, layers = GPT.units[0].padded_numel(p), sum(unit.padded_numel(p) for unit in GPT.units[1:])
    volume = 4 * 2 * 7 / 8 * (2 * root + 3 * layers)
    found = seconds(exact(intra_node=link(bandwidth), compute_efficiency=Range.over(1.0)), partition_size=p)
    assert found == pytest.approx(volume / bandwidth, rel=1e-3)


@pytest.mark.parametrize(("p", "edges"), [(8, 8), (1, 1), (32, 0)])
def test_hop_2_alone_takes_its_bytes_over_the_node_s_interface_once_per_step(p: int, edges: int):
    """Rings of 4 nodes: each of the node's p shards crosses 2 (r-1)/r times, together the whole model."""
    replicas = 32 // p
    volume = 2 * (replicas - 1) / replicas * padded_bytes(p)
    hop1 = 4 * 3 * padded_bytes(p) * 24 / 32 if p == 32 else 0
    bandwidth = 1e6
    found = seconds(exact(inter_node=link(bandwidth)), partition_size=p)
    if edges:
        assert found == pytest.approx(volume / bandwidth, rel=1e-3)
    else:
        # The root is gathered once a micro-step, not twice.
        assert found == pytest.approx((hop1 - 4 * GPT.units[0].padded_numel(p) * 2 * 24 / 32) / bandwidth, rel=1e-3)


def test_a_ring_through_both_links_is_as_slow_as_the_one_inside_the_node():
    """Flat gathers of 32, and hop 2 where replicas share a node: all that a GPU sends goes over its own link."""
    slow = exact(intra_node=link(1e6))
    root = GPT.units[0].padded_numel(32)
    volume = 4 * 2 * 31 / 32 * (2 * root + 3 * (padded_bytes(32, 1) - root))
    assert seconds(slow, partition_size=32, hierarchical=False) == pytest.approx(volume / 1e6, rel=1e-3)
    assert seconds(slow, partition_size=1) == pytest.approx(2 * 31 / 32 * padded_bytes(1) / 1e6, rel=1e-3)


def test_latency_is_paid_per_step_of_each_algorithm():
    """m-1 between nodes, and inside k-1 hierarchically or p-m flat; 2 log2(r) for NCCL's all-reduce."""
    one_layer = replace(GPT, num_layers=1)
    workload = replace(WORKLOAD, model=one_layer, accumulation=1)
    slow = exact(inter_node=link(1e30, 10.0), intra_node=link(1e30, 100.0), compute_efficiency=Range.over(1.0))

    def whole_seconds(**arguments: object) -> int:
        return round(predict(workload, slow, **arguments).step_s.low)

    # Root: gathered and reduced; layer: gathered twice and reduced: 5 in a row, each 3 x 10 + 7 x 100.
    assert whole_seconds(partition_size=32) == 5 * (3 * 10 + 7 * 100)
    assert whole_seconds(partition_size=32, hierarchical=False) == 5 * (3 * 10 + 28 * 100)
    slow = replace(slow, inter_node=link(1e30, 100.0), intra_node=link(1e30, 10.0))
    assert whole_seconds(partition_size=32, hierarchical=False) == 5 * (3 * 100 + 28 * 10)
    # In lockstep every step takes as long as the slowest link's.
    slow = replace(slow, ring_lockstep=Range.over(1.0))
    assert whole_seconds(partition_size=32, hierarchical=False) == 5 * 31 * 100
    slow = exact(inter_node=link(1e30, 10.0), intra_node=link(1e30, 100.0), compute_efficiency=Range.over(1.0))
    # Hop 2 alone, of the layer and then of the root, over 32 ranks.
    assert whole_seconds(partition_size=1) == 2 * 2 * 5 * 10
    # Over gloo the 4 gathers and scatters inside a node run one by one, and hop 2 is a ring.
    slow = replace(slow, backend="gloo")
    assert whole_seconds(partition_size=32) == 5 * (3 * 10 + 4 * 7 * 100)
    assert whole_seconds(partition_size=1) == 2 * 2 * 31 * 10


def test_a_staged_scatter_is_a_staged_gather_backwards():
    topology = Topology(world_size=32, node_size=8, partition_size=32)
    loads = unit_loads(topology, 3200, 3200, hierarchical=True, backend="nccl")
    assert [load.lane for load in loads.gather] == ["inter_node", "intra_node"]
    assert [load.lane for load in loads.reduce] == ["intra_node", "inter_node"]


@settings(max_examples=40)
@given(
    p=st.sampled_from(SIZES),
    system=st.sampled_from(get_args(System)),
    name=st.sampled_from(sorted(CLUSTER.constants)),
    speeds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_no_constant_that_gets_better_makes_a_step_slower(p, system, name, speeds, flags):
    at = dict.fromkeys(CLUSTER.constants, 0.3)
    slow, fast = (
        predict_at(
            WORKLOAD,
            CLUSTER,
            CLUSTER.rates(at | {name: speed}),
            system=system,
            partition_size=p,
            hierarchical=flags[0],
            two_hop=flags[1],
        ).step_s
        for speed in sorted(speeds)
    )
    assert fast <= slow * (1 + 1e-12)


@settings(max_examples=40)
@given(p=st.sampled_from(SIZES), speeds=st.lists(st.floats(0, 1), min_size=7, max_size=7))
def test_the_range_holds_every_point_inside_the_constants_ranges(p, speeds):
    step = predict(WORKLOAD, CLUSTER, partition_size=p)
    rates = CLUSTER.rates(dict(zip(CLUSTER.constants, speeds, strict=True)))
    point = predict_at(WORKLOAD, CLUSTER, rates, partition_size=p)
    assert step.step_s.low * (1 - 1e-12) <= point.step_s <= step.step_s.high * (1 + 1e-12)
    assert point.step_s == pytest.approx(point.compute_s + point.update_s + point.exposed_s)


@pytest.mark.parametrize(("two_hop", "times"), [(True, 1), (False, 4)])
def test_links_are_held_for_what_they_carry_hidden_or_not(two_hop: bool, times: int):
    """Hop 2 of (4 replicas, 8): 2 x 3/4 of the model once a step, or in each of 4 micro-steps; hop 1 in every one."""
    cluster = exact(intra_node=link(1e9), inter_node=link(1e9))
    step = predict(WORKLOAD, cluster, partition_size=8, two_hop=two_hop)
    root = GPT.units[0].padded_numel(8)
    layers = padded_bytes(8, 1) - root
    assert step.inter_node_s.low == pytest.approx(times * 2 * 3 / 4 * padded_bytes(8) / 1e9)
    assert step.intra_node_s.low == pytest.approx(4 * 2 * 7 / 8 * (2 * root + 3 * layers) / 1e9)


@pytest.mark.parametrize("p", SIZES)
def test_two_hop_is_never_slower_and_is_the_same_without_replicas_or_accumulation(p: int):
    once, always = (predict(WORKLOAD, CLUSTER, partition_size=p, two_hop=two_hop).step_s for two_hop in (True, False))
    assert once.low <= always.low
    assert once.high <= always.high
    assert (once == always) == (p == 32)
    single = replace(WORKLOAD, accumulation=1)
    assert predict(single, CLUSTER, partition_size=p) == predict(single, CLUSTER, partition_size=p, two_hop=False)


@pytest.mark.parametrize("p", SIZES)
def test_hierarchical_and_flat_are_the_same_inside_a_node_and_differ_beyond(p: int):
    staged, flat = (predict(WORKLOAD, CLUSTER, partition_size=p, hierarchical=h) for h in (True, False))
    assert (staged == flat) == (p <= 8)


def test_peers_are_the_corresponding_cases_of_mics():
    assert predict(WORKLOAD, CLUSTER, system="zero3", partition_size=1) == predict(
        WORKLOAD, CLUSTER, partition_size=32, hierarchical=False
    )
    assert predict(WORKLOAD, CLUSTER, system="hsdp", partition_size=8) == predict(
        WORKLOAD, CLUSTER, partition_size=8, hierarchical=False, two_hop=False
    )
    # DDP's gradients are fp32: twice the bytes of hop 2 at partition size 1.
    bound = exact(inter_node=link(1e6))
    ddp, mics = seconds(bound, system="ddp", partition_size=8), seconds(bound, partition_size=1)
    assert ddp == pytest.approx(2 * mics, rel=1e-3)


def test_zero2_gathers_parameters_once_a_step_and_scatters_gradients_in_every_micro_step():
    found = seconds(exact(inter_node=link(1e6)), system="zero2", partition_size=1)
    assert found == pytest.approx((4 + 1) * padded_bytes(32) * 31 / 32 / 1e6, rel=1e-3)


def test_the_optimizer_reads_and_writes_28_bytes_for_each_of_a_shard_s_parameters():
    cluster = exact(update_bytes_per_s=Range.over(1e9))
    step = predict(WORKLOAD, cluster, partition_size=8)
    assert step.update_s.low == pytest.approx(28 * padded_bytes(8, 1) / 8 / 1e9)
    assert step.step_s.low == pytest.approx(step.compute_s.low + step.update_s.low)


def test_each_of_the_model_s_tensors_costs_the_optimizer_its_time_besides():
    cluster = exact(update_bytes_per_s=Range.over(1e30), update_s_per_tensor=Range.over(1e-3))
    # GPT-2's layer has 12 tensors; the root two embeddings and the last norm's two.
    assert predict(WORKLOAD, cluster, partition_size=8).update_s.low == pytest.approx((6 * 12 + 4) * 1e-3)


def test_the_head_computes_at_its_own_efficiency_where_that_was_measured():
    head = 4 * 2 * 512 * 6.0 * 50257 * 1024
    model, recomputed = step_flops(WORKLOAD)
    expected = (model + recomputed - head) / (0.5 * 312e12) + head / (0.1 * 312e12)
    assert seconds(exact(head_efficiency=Range.over(0.1)), partition_size=8) == pytest.approx(expected)


def test_over_gloo_the_engine_s_hop_2_alone_runs_beside_backward():
    layer = Segment(
        1.0, 2.0, *(2 * ((Stage("intra_node", 3.0),),)), (Stage("intra_node", 4.0),), (Stage("inter_node", 5.0),)
    )
    in_turn = 3 * (1 + 3) + 3 * (3 + 2 + 4)
    assert micro_step_s([layer] * 3, hop2=True, overlap=False, hop2_beside=True) == in_turn + 5, (
        "the last one's is left"
    )
    slow = layer._replace(hop2=(Stage("inter_node", 20.0),))
    assert micro_step_s([slow] * 3, hop2=True, overlap=False, hop2_beside=True) == 3 * (1 + 3) + 9 + 3 * 20
    once = replace(WORKLOAD, accumulation=1)
    gloo = exact(backend="gloo", inter_node=link(1e9))
    mics, hybrid = (predict(once, gloo, system=s, partition_size=8).step_s.low for s in ("mics", "hsdp"))
    assert mics < hybrid, "the same volumes, but plain FSDP2 waits for its all-reduce"


def test_without_overlap_every_collective_adds_its_time():
    layer = Segment(
        1.0, 2.0, *(2 * ((Stage("intra_node", 3.0),),)), (Stage("intra_node", 4.0),), (Stage("inter_node", 5.0),)
    )
    assert micro_step_s([layer] * 3, hop2=True, overlap=False) == 3 * (1 + 2 + 3 + 3 + 4 + 5)
    assert micro_step_s([layer] * 3, hop2=False, overlap=False) == 3 * (1 + 2 + 3 + 3 + 4)


def test_with_overlap_a_hidden_layer_costs_only_the_first_gather_and_the_last_reduction():
    layer = Segment(
        5.0, 10.0, *(2 * ((Stage("intra_node", 3.0),),)), (Stage("intra_node", 4.0),), (Stage("inter_node", 5.0),)
    )
    # First gathers of forward and of backward, then computing, then the last scatter and its hop 2.
    assert micro_step_s([layer] * 3, hop2=True, overlap=True) == 3 + 15 + 3 + 30 + 4 + 5


def test_more_calls_per_unit_and_no_overlap_cost_time():
    best = predict(WORKLOAD, CLUSTER, partition_size=32).step_s
    worse = predict(WORKLOAD, CLUSTER, partition_size=32, implementation=Implementation(calls_per_unit=4)).step_s
    worst = predict(
        WORKLOAD, CLUSTER, partition_size=32, implementation=Implementation(calls_per_unit=4, overlap=False)
    ).step_s
    assert best.low < worse.low < worst.low


def test_throughput_and_utilization_follow_from_the_step():
    step = predict(WORKLOAD, CLUSTER, partition_size=8)
    model, recomputed = step_flops(WORKLOAD)
    assert step.tokens_per_s.high == pytest.approx(32 * 2 * 512 * 4 / step.step_s.low)
    assert step.tflops_per_gpu.low == pytest.approx((model + recomputed) / step.step_s.high / 1e12)
    assert step.utilization.low == pytest.approx(model / step.step_s.high / 312e12)


def test_what_a_prediction_cannot_know_is_noted():
    offload = replace(WORKLOAD, cpu_offload=True, precision="fp32")
    notes = " ".join(time_notes(offload, CLUSTER))
    assert "CPU offload" in notes
    assert "fp32" in notes
    assert predict(offload, CLUSTER, partition_size=8).update_s == Range(0.0, 0.0)
    assert "optimizer" in next(time_notes(WORKLOAD, exact()))
    assert list(time_notes(WORKLOAD, CLUSTER)) == []


def test_unknown_systems_and_sizes_that_form_no_groups_are_refused():
    with pytest.raises(ConfigError, match="mics, zero3"):
        predict(WORKLOAD, CLUSTER, system="zero4", partition_size=8)  # type: ignore[arg-type]
    with pytest.raises(TopologyError, match="Valid partition sizes"):
        predict(WORKLOAD, CLUSTER, partition_size=12)
