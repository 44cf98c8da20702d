"""Do launched ranks train, measure, and survive a job that fails? On the loopback, without namespaces."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_mics.bench.configuration import Configuration
from hf_mics.bench.launching import Outcome, launch
from hf_mics.bench.records import merge
from hf_mics.bench.reference import expect

MICS = Configuration(
    system="mics", partition_size=2, nodes=2, rate_mbit=None, model="gpt2-short", micro_steps=2, steps=4, tokens=8
)
JOBS = {
    "mics": MICS,
    "broken": replace(MICS, nodes=3, partition_size=3, node_size=1),  # 3 ranks: the launch has 4
    "one-hop": replace(MICS, two_hop=False),
    "fsdp2": replace(MICS, system="fsdp2", partition_size=None),
    "hybrid": replace(MICS, system="accelerate-hybrid-no-sync"),
    "transformers": replace(MICS, system="transformers-hybrid"),
    "bound": replace(MICS, system="no-communication", partition_size=None),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("launch")
    return dict(zip(JOBS, launch(None, list(JOBS.values()), folder, timeout_s=60), strict=True))


def test_a_job_that_fails_says_why_and_the_next_ones_run(outcomes: dict[str, Outcome]):
    assert "TopologyError" in str(outcomes["broken"].failure)
    assert {name for name, outcome in outcomes.items() if outcome.failure is None} == set(JOBS) - {"broken"}


@pytest.mark.parametrize("name", ["mics", "one-hop", "fsdp2", "hybrid", "transformers"])
def test_systems_see_the_losses_of_one_process(name: str, outcomes: dict[str, Outcome]):
    record = merge(JOBS[name], 0, outcomes[name].parts, {})
    expectation = expect(JOBS[name])
    record.expected_losses, record.loss_tolerance = list(expectation.losses), expectation.tolerance
    assert record.losses_are_equal, (record.losses, expectation)


def test_the_bound_does_not_communicate_and_so_trains_something_else(outcomes: dict[str, Outcome]):
    record = merge(JOBS["bound"], 0, outcomes["bound"].parts, {})
    assert set(record.timed_waits_s) <= {"other"}
    expected = expect(MICS)
    assert abs(record.losses[-1] - expected.losses[-1]) > 20 * expected.tolerance


def test_mics_keeps_a_shard_of_gradients_where_no_sync_keeps_all(outcomes: dict[str, Outcome]):
    mics, hybrid = (outcomes[name].parts[0].gradient_bytes for name in ("mics", "hybrid"))
    assert mics is not None
    assert hybrid == 2 * mics


def test_waits_are_sorted_by_collective(outcomes: dict[str, Outcome]):
    seen = {name: set(merge(JOBS[name], 0, outcomes[name].parts, {}).timed_waits_s) - {"other"} for name in JOBS if
            outcomes[name].failure is None}  # fmt: skip
    assert seen["mics"] == {"exchange", "all_reduce"}
    assert seen["hybrid"] == {"all_gather", "reduce_scatter", "all_reduce"}
    assert seen["fsdp2"] == {"all_gather", "reduce_scatter"}


def test_hop_2_is_expected_once_per_step_or_once_per_micro_step(outcomes: dict[str, Outcome]):
    two_hop, one_hop = (outcomes[name].parts[0].expected_nic_bytes for name in ("mics", "one-hop"))
    assert two_hop is not None
    assert one_hop is not None
    assert one_hop["hop2"] == 2 * two_hop["hop2"] > 0
