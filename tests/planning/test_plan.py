"""Is the partition size that a plan chooses the one that the design calls for?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hf_mics.errors import ConfigError
from hf_mics.planning.instances import instance_cluster
from hf_mics.planning.models import find_model
from hf_mics.planning.plan import DEFAULT_RESERVE_BYTES, Plan, Request, make_plan
from hf_mics.planning.workload import ModelShape, Workload


def request(model: str, instance: str, nodes: int, **other: Any) -> Request:
    settings: dict[str, Any] = {"seq_length": 512, "micro_batch": 8, "accumulation": 4, "precision": "fp16"}
    workload = Workload(model=find_model(model), **(settings | other))
    return Request(workload=workload, cluster=instance_cluster(instance, nodes))


# What the flags do not say, of a GPT.
LONG = {"seq_length": 2048, "micro_batch": 1, "accumulation": 1, "precision": "bf16"}


# The groups that are remembered of the MiCS evaluation on p3dn.24xlarge (docs/planning.md says how far that goes), and
# GPT 100B on 512 A100 of 40 GB: 16 bytes of state for each of 100e9 parameters are 25 GB at 64 GPUs, before any buffer.
@pytest.mark.parametrize(
    ("model", "instance", "nodes", "settings", "expected"),
    [
        *(
            (model, "p3dn.24xlarge", 16, {"accumulation": steps}, expected)
            for model, expected in {"bert-10b": 8, "bert-15b": 16, "bert-20b": 16, "bert-50b": 64}.items()
            for steps in (1, 4)
        ),
        ("gpt-100b", "p4d.24xlarge", 64, {}, 128),
        ("gpt-100b", "p4d.24xlarge", 64, LONG | {"micro_batch": 2, "accumulation": 4}, 128),
        ("gpt-100b", "p4d.24xlarge", 64, LONG | {"micro_batch": 2}, 128),
        ("gpt-100b", "p4d.24xlarge", 64, LONG | {"accumulation": 4}, 128),
        ("gpt-100b", "p4d.24xlarge", 64, LONG, 64),
    ],
)
def test_the_choice_is_the_smallest_group_that_holds_the_model(
    model: str, instance: str, nodes: int, settings: dict[str, Any], expected: int
):
    plan = make_plan(request(model, instance, nodes, **settings))
    assert plan.choice.partition_size == expected
    fitting = [candidate.partition_size for candidate in plan.candidates if candidate.fits]
    assert min(fitting) == expected
    assert f"{expected} is the smallest partition group in which the model fits" in plan.reason
    assert plan.runner_up is not None
    assert plan.runner_up.partition_size > expected


def plan_of(**other: Any) -> Plan:
    return make_plan(request("bert-10b", "p3dn.24xlarge", 16, **other))


def test_every_size_that_forms_groups_is_a_candidate():
    plan = plan_of()
    assert [candidate.partition_size for candidate in plan.candidates] == [1, 2, 4, 8, 16, 32, 64, 128]
    totals = [candidate.total_bytes for candidate in plan.candidates]
    assert totals == sorted(totals, reverse=True), "larger groups need less of every GPU"
    for candidate in plan.candidates:
        fits = candidate.total_bytes <= plan.request.cluster.accelerator.memory_bytes
        assert candidate.fits == fits
        assert candidate.fits or "GB too much" in candidate.why_not


def test_of_sizes_whose_times_differ_by_less_than_1_percent_the_smallest_is_chosen():
    plan = make_plan(request("gpt2-xl", "p4d.24xlarge", 1))
    middles = {candidate.partition_size: candidate.middle_s for candidate in plan.candidates}
    assert min(middles, key=middles.__getitem__) == 8
    assert middles[1] > 1.01 * middles[8] > middles[2]
    assert plan.choice.partition_size == 2


def test_traffic_is_that_of_the_cluster_s_own_backend():
    """Over gloo a flat group's scatter is an exchange, which crosses nodes more often than NCCL's ring."""
    nccl = replace(plan_of().request, hierarchical=False)
    gloo = replace(nccl, cluster=replace(nccl.cluster, backend="gloo"))
    ring, exchange = (make_plan(r).candidates[-1].traffic["hop1_reduce_scatter"] for r in (nccl, gloo))
    assert exchange.nic_per_node == pytest.approx(ring.nic_per_node * 8 * 120 / 127)


def test_what_would_change_the_choice_does():
    plan = plan_of()
    assert any(text.endswith("more on every GPU: 4 would fit") for text in plan.would_change)
    missing = float(plan.would_change[0].split()[0])
    roomier = replace(plan.request.cluster.accelerator, memory_bytes=32e9 + (missing + 0.1) * 1e9)
    changed = make_plan(replace(plan.request, cluster=replace(plan.request.cluster, accelerator=roomier)))
    assert next(c.partition_size for c in changed.candidates if c.fits) == 4


@pytest.mark.parametrize("reserve_bytes", [DEFAULT_RESERVE_BYTES, 10e9])
def test_a_model_that_fits_nowhere_says_by_how_much_and_what_would_help(reserve_bytes: float):
    def plan_on(nodes: int) -> Plan:
        asked = request("gpt-175b", "p4d.24xlarge", nodes, seq_length=2048, micro_batch=1)
        return make_plan(replace(asked, reserve_bytes=reserve_bytes))

    with pytest.raises(ConfigError) as error:
        plan_on(2)
    words = str(error.value)
    assert "174.6B parameters) fits at no partition size on 2 x 8 A100-40GB" in words
    assert "GB too much" in words
    nodes = int(words.rpartition(" nodes")[0].rpartition(" ")[2])
    assert plan_on(nodes).choice.fits
    with pytest.raises(ConfigError, match="fits at no partition size"):
        plan_on(nodes // 2)


def test_activation_checkpointing_is_named_where_it_would_make_the_model_fit():
    with pytest.raises(ConfigError, match=r"It would fit with: activation checkpointing; or micro-batch 1"):
        make_plan(request("bert-20b", "p3dn.24xlarge", 4, micro_batch=16, activation_checkpointing=False))


def test_what_would_make_it_fit_is_only_what_does():
    short = request("gpt-175b", "p4d.24xlarge", 2, seq_length=2048, micro_batch=1)
    # 16 bytes for each of 174.6e9 parameters on the hosts of two nodes.
    with pytest.raises(ConfigError, match=r"optimizer state \(1397 GB of a node's memory\); or 32 nodes\.$"):
        make_plan(short)
    # Copies of all parameters, on every GPU: no sequence is short enough, and no number of nodes is enough.
    for system in ("ddp", "zero2"):
        with pytest.raises(ConfigError, match=r"fit with: MiCS in partition groups of 64\.$"):
            make_plan(replace(request("gpt-175b", "p4de.24xlarge", 16, **LONG), system=system))  # type: ignore[arg-type]
    long = ModelShape(
        name="long",
        family="gpt",
        num_layers=2,
        hidden_size=1024,
        ffn_size=4096,
        num_heads=8,
        vocab_size=50000,
        context_length=2**18,
    )
    settings: dict[str, Any] = {"cluster": instance_cluster("p4d.24xlarge", 1)}
    with pytest.raises(ConfigError, match="It would fit with: ") as error:
        make_plan(Request(workload=Workload(model=long, seq_length=2**18), **settings))
    tokens = int(str(error.value).partition("sequences of ")[2].strip("."))
    assert make_plan(Request(workload=Workload(model=long, seq_length=tokens), **settings)).choice.fits
    with pytest.raises(ConfigError, match="fits at no partition size"):
        make_plan(Request(workload=Workload(model=long, seq_length=2 * tokens), **settings))


def test_flat_collectives_are_named_where_they_are_predicted_to_be_faster():
    plan = make_plan(request("gpt-175b", "p4de.24xlarge", 16, **(LONG | {"accumulation": 4})))
    flat = make_plan(replace(plan.request, hierarchical=False))
    assert flat.choice.partition_size == plan.choice.partition_size == 64
    faster = plan.choice.middle_s / flat.choice.middle_s - 1
    assert faster > 0.01
    assert plan.would_change[-1] == f"one-stage collectives, --flat: 64 would be {faster:.0%} faster"
    assert not any("--flat" in text for text in flat.would_change)
    # Groups inside a node have one stage anyway.
    assert not any("--flat" in text for text in plan_of().would_change)


def test_a_larger_group_than_the_smallest_is_said_to_be_faster_by_how_much():
    plan = make_plan(request("gpt2", "p4d.24xlarge", 2, micro_batch=1, accumulation=1))
    smallest = next(candidate for candidate in plan.candidates if candidate.fits)
    faster = smallest.middle_s / plan.choice.middle_s - 1
    assert f"8 is {faster:.0%} faster than the smallest group that fits (1)" in plan.reason


def test_fast_networks_are_said_to_have_nothing_to_win():
    slow = plan_of().network
    assert slow.startswith("MiCS is predicted to be")
    fast = make_plan(request("llama-8b", "p5.48xlarge", 8, seq_length=8192, micro_batch=1, precision="bf16")).network
    assert "nothing to win on this network" in fast
    assert "x the speed of sharding over all 64 GPUs (ZeRO-3), whose gathers hide behind computing" in fast
    filled = make_plan(request("gpt-100b", "p4d.24xlarge", 16, **LONG)).network
    assert "as the model fills 8 of 16 nodes, so that both wait for the network" in filled
    assert make_plan(request("bert-10b", "p3dn.24xlarge", 1)).network == "", "there is no network on one node"


def test_what_mics_has_to_win_is_said_of_the_collectives_that_were_asked_for():
    staged = request("bert-50b", "p3dn.24xlarge", 16)
    assert make_plan(staged).network.startswith("MiCS is predicted to be 1.")
    flat = make_plan(replace(staged, hierarchical=False))
    assert flat.choice.partition_size > 8
    assert flat.network != make_plan(staged).network


@pytest.mark.parametrize(("system", "sizes"), [("zero3", [128]), ("hsdp", [1, 2, 4, 8, 16, 32, 64, 128])])
def test_peers_are_planned_with_their_own_groups(system: str, sizes: list[int]):
    plan = make_plan(replace(plan_of().request, system=system))  # type: ignore[arg-type]
    assert [candidate.partition_size for candidate in plan.candidates] == sizes
    assert plan.network == ""


def test_ddp_is_refused_where_a_whole_replica_does_not_fit():
    with pytest.raises(ConfigError, match="at best, with ddp at 1, a GPU needs") as error:
        make_plan(replace(plan_of().request, system="ddp"))
    assert "offload" not in str(error.value), "DistributedDataParallel has none"


def test_a_measured_memory_takes_the_place_of_the_closed_form():
    base = plan_of()
    tight = replace(base.choice.memory, memory_bytes={**base.choice.memory.memory_bytes, "activations": 40e9})
    asked = []

    def measure(workload: Workload, topology: Any) -> Any:
        asked.append(topology.partition_size)
        return tight if topology.partition_size < 32 else base.candidates[-1].memory

    plan = make_plan(replace(base.request, memory=measure))
    assert asked == [1, 2, 4, 8, 16, 32, 64, 128]
    assert plan.choice.partition_size == 32


def test_costs_follow_from_the_price_and_the_speed():
    plan = make_plan(replace(plan_of().request, price_per_hour=36.0))
    low, high = plan.choice.cost_per_billion_tokens(16).ends
    # 16 nodes at 36 an hour are 0.16 a second.
    assert low == pytest.approx(0.16 * 1e9 / plan.choice.time.tokens_per_s.high)
    assert high == pytest.approx(0.16 * 1e9 / plan.choice.time.tokens_per_s.low)
