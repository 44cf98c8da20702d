"""Is the traffic planned from a model's shape what the engine counts when the real model trains?"""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hf_mics import apply_mics, mics_engine
from hf_mics.meter import Tally
from hf_mics.planning.models import find_model, shape_of_config
from hf_mics.planning.step_traffic import phase_traffic, predict_step
from hf_mics.planning.workload import ModelShape, Workload
from hf_mics.topology import Topology
from hf_mics.traffic import node_bytes
from hf_mics.wrapping import plan_units
from tests import tiny
from tests.on_ranks import Layout, on_ranks

# The layouts of the parity suite.
LAYOUTS = (Layout(4, 2, 2), Layout(4, 2, 4), Layout(4, 1, 2), Layout(4, 4, 2), Layout(6, 2, 2), Layout(8, 2, 4))
MODELS = ("gpt2", "bert", "llama", "t5")
MICRO_STEPS = 2


def shard(model: nn.Module, layout: Layout, precision: str) -> nn.Module:
    dtype = torch.bfloat16 if precision == "bf16" else None
    # As accelerate sets it.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype, output_dtype=dtype)
    plan = plan_units(model)
    for _, module in plan.layers + plan.embeddings:
        fully_shard(module, mesh=layout.mesh, reshard_after_forward=True, mp_policy=policy)
    for _, module in plan.heads:
        fully_shard(module, mesh=layout.mesh, reshard_after_forward=False, mp_policy=policy)
    return fully_shard(model, mesh=layout.mesh, mp_policy=policy)


@on_ranks(*LAYOUTS)
def test_planned_bytes_and_calls_are_those_that_the_engine_counts(layout: Layout):
    topology = Topology(world_size=layout.world, node_size=layout.node, partition_size=layout.partition)
    for name, precision, hierarchical in product(MODELS, ("fp32", "bf16"), (True, False)):
        if not hierarchical and not topology.is_hierarchical:
            continue
        model = tiny.build(name)
        shape = shape_of_config(model.config.to_dict(), name)
        model = shard(model, layout, precision)
        apply_mics(model, node_size=layout.node, hierarchical=hierarchical)
        rows = tiny.token_rows(2, seed=dist.get_rank())
        for micro_step in range(MICRO_STEPS):
            model.set_requires_gradient_sync(micro_step == MICRO_STEPS - 1)
            model(input_ids=rows, labels=rows).loss.backward()
        workload = Workload(
            model=shape,
            seq_length=tiny.TOKENS,
            micro_batch=2,
            accumulation=MICRO_STEPS,
            precision=precision,  # type: ignore[arg-type]
        )
        engine = mics_engine(model)
        counted = engine.meter.read()
        planned = predict_step(workload, topology, hierarchical=hierarchical, backend="gloo")
        assert planned.per_rank == counted, (name, precision)
        assert planned == engine.predict_step(MICRO_STEPS), "the interface's bytes too, by the engine's own backend"
        by_phase = phase_traffic(workload, topology, hierarchical=hierarchical, backend="gloo")
        sent = sum(phase.per_gpu for phase in by_phase.values())
        assert sent == pytest.approx(sum(tally.bytes_sent for tally in counted.values()))
        crossed = sum(phase.nic_per_node for phase in by_phase.values())
        assert crossed == pytest.approx(node_bytes(topology, counted, backend="gloo"))


# One layer of 16 wide and a tied table of 32: numbers small enough to work out by hand.
SMALL = ModelShape(
    name="small",
    family="llama",
    num_layers=1,
    hidden_size=16,
    ffn_size=32,
    num_heads=2,
    vocab_size=32,
    context_length=8,
)
ROOT, LAYER = 32 * 16 + 16, 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16


def small(accumulation: int = 3) -> Workload:
    return Workload(model=SMALL, seq_length=8, accumulation=accumulation, precision="bf16")


def topology(world: int, node: int, partition: int) -> Topology:
    return Topology(world_size=world, node_size=node, partition_size=partition)


def test_phases_and_links_add_up():
    """(4, 2, 4), staged, bf16: shards are quarters. Forward gathers root and layer, backward the layer alone.

    Between 2 nodes a GPU sends its own quarter once, inside the node 2 quarters to 1 other: 3 quarters in all, of which
    the node's 2 GPUs put 2 quarters on the interface.
    """
    phases = phase_traffic(small(1), topology(4, 2, 4))
    forward = phases["hop1_all_gather_forward"]
    assert forward.per_gpu == pytest.approx(2 * (ROOT + LAYER) * 3 / 4)
    assert forward.nic_per_node == pytest.approx(2 * (ROOT + LAYER) * 2 / 4)
    assert forward.nvlink_per_gpu == pytest.approx(2 * (ROOT + LAYER) * 2 / 4)
    assert phases["hop1_all_gather_backward"].per_gpu == pytest.approx(2 * LAYER * 3 / 4)
    assert phases["hop1_reduce_scatter"].per_gpu == pytest.approx(2 * (ROOT + LAYER) * 3 / 4)
    assert phases["hop2_all_reduce"] == (0, 0, 0), "one group holds all ranks"


def test_peers_differ_from_mics_in_what_the_design_says():
    mics = predict_step(small(), topology(4, 2, 2))
    hybrid = predict_step(small(), topology(4, 2, 2), system="hsdp")
    assert hybrid.hop1_bytes == mics.hop1_bytes
    assert hybrid.hop2_bytes == 3 * mics.hop2_bytes, "an all-reduce in each of 3 micro-steps"
    assert hybrid.nic_bytes == {phase: (3 if "hop2" in phase else 1) * size for phase, size in mics.nic_bytes.items()}
    spanning = predict_step(small(), topology(4, 2, 4), system="hsdp")
    assert spanning == predict_step(small(), topology(4, 2, 4), hierarchical=False), "flat, as FSDP2's own"
    zero3 = predict_step(small(), topology(4, 2, 4), system="zero3")
    assert set(zero3.per_rank) == {("all_gather", "partition"), ("reduce_scatter", "partition")}, "flat"
    zero2 = predict_step(small(), topology(4, 2, 4), system="zero2")
    assert zero2.per_rank["all_gather", "partition"] == Tally(2, 2 * (ROOT + LAYER) * 3 // 4), "once per step"
    assert zero2.per_rank["reduce_scatter", "partition"] == zero3.per_rank["reduce_scatter", "partition"]
    ddp = predict_step(small(), topology(4, 2, 1), system="ddp")
    assert ddp.per_rank == {("all_reduce", "replication"): Tally(2, 4 * (ROOT + LAYER) * 2 * 3 // 4)}, "fp32, once"


def test_hop_1_grows_with_micro_steps_and_hop_2_does_not():
    one, four = (phase_traffic(small(steps), topology(8, 4, 4)) for steps in (1, 4))
    assert four["hop1_reduce_scatter"].per_gpu == 4 * one["hop1_reduce_scatter"].per_gpu
    assert four["hop2_all_reduce"] == one["hop2_all_reduce"]


def test_gigantic_groups_move_almost_the_whole_model_per_gather():
    """GPT 175B over 512 GPUs in bf16: (512-1)/512 of 349 GB per gather, padding aside."""
    workload = Workload(model=find_model("gpt-175b"), seq_length=2048)
    phases = phase_traffic(workload, topology(512, 8, 512), hierarchical=False)
    whole = 2 * workload.model.num_parameters
    assert phases["hop1_all_gather_forward"].per_gpu == pytest.approx(whole * 511 / 512, rel=1e-3)
