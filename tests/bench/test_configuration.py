"""Are runs described completely, named apart, and refused when they make no sense?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hf_mics.bench.configuration import SYSTEMS, Configuration
from hf_mics.bench.experiments import EXPERIMENTS, runs_of
from hf_mics.errors import ConfigError, TopologyError

ROOT = Path(__file__).parents[2]
MICS = Configuration(system="mics", partition_size=2)


def test_a_configuration_survives_json():
    for run in EXPERIMENTS["wire"].runs():
        assert Configuration.from_json(json.loads(json.dumps(run.to_json()))) == run


def test_runs_that_differ_in_what_is_measured_have_names_of_their_own():
    changed = [
        replace(MICS, **change)
        for change in (
            {}, {"partition_size": 4}, {"hierarchical": False}, {"two_hop": False}, {"wire": "bfloat16"}, {"nodes": 2},
            {"rate_mbit": None}, {"micro_steps": 2}, {"model": "bert"}, {"tokens": 16}, {"rows": 2}, {"node_size": 4},
            {"cpus_per_node": 0.2},
        )
    ]  # fmt: skip
    assert len({run.identity for run in changed}) == len(changed)
    assert replace(MICS, steps=9).identity == MICS.identity


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"system": "horovod"}, "unknown system 'horovod': expected one of reference, "),
        ({"model": "llama"}, "unknown model 'llama'"),
        ({"nodes": 0}, "nodes must be a positive integer, got 0"),
        ({"micro_steps": True}, "micro_steps must be a positive integer"),
        ({"wire": "int8"}, "unknown wire 'int8'"),
        ({"partition_size": None}, "needs a partition_size"),
        ({"system": "ddp"}, "takes no partition_size, got 2"),
    ],
)
def test_nonsense_is_refused_with_what_was_expected(change: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        replace(MICS, **change)


def test_a_partition_size_that_forms_no_groups_is_refused_before_anything_is_launched():
    with pytest.raises(TopologyError, match="Valid partition sizes for 8 ranks on nodes of 2: 1, 2, 4, 8"):
        replace(MICS, partition_size=3)


def test_every_system_is_part_of_an_experiment_that_compares_losses():
    compared = {run.system for run in EXPERIMENTS["equality"].runs()}
    assert compared == {name for name, system in SYSTEMS.items() if system.equal_losses}
    assert all(run.warm_up_steps + run.steps >= 5 for run in EXPERIMENTS["equality"].runs())


def test_shared_runs_are_run_once_and_with_the_most_steps():
    together = runs_of(["headline", "ablation", "accumulation"])
    assert len({run.identity for run in together}) == len(together)
    (ours,) = [run for run in together if run.identity == MICS.identity]
    assert ours.steps == 4, "the accumulation sweep alone would take 2"


def test_weak_scaling_gives_every_rank_the_same_share_of_the_cpus_at_every_size():
    runs = EXPERIMENTS["weak-scaling"].runs()
    assert {run.cpus_per_node / run.node_size for run in runs if run.cpus_per_node} == {0.1}
    assert all(run.cpus_per_node for run in runs)
    assert {run.nodes for run in runs} == {1, 2, 4, 8, 16}


def test_only_selects_by_pattern_and_refuses_what_matches_nothing():
    assert {run.variant for run in runs_of(["ablation"], ["mics-p4*"])} == {
        "mics-p4", "mics-p4-one-hop", "mics-p4-flat",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no system of ablation matches 'gpipe'"):
        runs_of(["ablation"], ["gpipe"])
    with pytest.raises(ConfigError, match="unknown experiment 'speed': expected one of headline"):
        runs_of(["speed"])


def test_the_command_ends_in_one_line_and_code_2():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench"), "headline", "speed"],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown experiment 'speed'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
