"""Does `hf-mics measure` write a cluster that plans can use, and refuse what cannot be measured?"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hf_mics import cli
from hf_mics.calibration.fitting import LEAST_SPREAD, Timing, fit_link, range_of
from hf_mics.calibration.timing_loop import sampled_s
from hf_mics.errors import MiCSError
from hf_mics.planning.cluster import Range
from hf_mics.planning.cluster_file import load_cluster
from hf_mics.planning.models import find_model
from hf_mics.planning.timing import predict
from hf_mics.planning.workload import ModelShape, Workload
from hf_mics.probe_models import plain_model
from hf_mics.testing import run_ranks
from hf_mics.wrapping import plan_units

SMALL = ["--model", "gpt-tiny", "--seq-length", "32", "--largest-mb", "0.3", "--limit-s", "0.5", "--samples", "3"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def measure_twice(output: str, ports: list[int]) -> list[int]:
    """Exit codes of a first measurement and of a second one into the same file."""
    codes = []
    for port in ports:
        os.environ["MASTER_PORT"] = str(port)
        codes.append(cli.main(["measure", "--output", output, *SMALL]))
    return codes


def test_two_nodes_are_measured_once_and_their_file_is_kept(tmp_path: Path):
    path = tmp_path / "cluster.json"
    ports = [free_port(), free_port()]
    codes = run_ranks(measure_twice, 4, str(path), ports, node_size=2, backend=None, timeout_s=120)
    assert codes == [[0, 2]] * 4
    cluster = load_cluster(path)
    assert (cluster.nodes, cluster.gpus_per_node, cluster.backend) == (2, 2, "gloo")
    assert set(cluster.collectives) == {
        ("all_gather", "intra_node"),
        ("reduce_scatter", "intra_node"),
        ("all_gather", "inter_node"),
        ("reduce_scatter", "inter_node"),
        ("all_reduce", "inter_node"),
    }
    for found in (cluster.compute_efficiency, cluster.head_efficiency, cluster.update_s_per_tensor):
        assert 0 < found.low <= found.typical <= found.high
    measured = json.loads(path.read_text())["measurements"]
    # Three samples were asked for: one in each of three rounds, and two on either side of them, three passes each.
    assert {len(point["seconds"]) for point in measured["collectives"]} == {3}
    assert len(measured["computing"]["layer_flops_per_s"]) == 2 * 2 * 3
    # A unit of 16 kB between 2 nodes: each of the node's 2 ranks sends its quarter once, hop 2 its half once each way.
    first = {point["name"]: point for point in measured["collectives"] if point["unit_bytes"] == 16384}
    names = ["all_gather", "reduce_scatter", "all_reduce", "hierarchical gather", "flat gather"]
    assert [name for name in names if name not in first] == []
    assert [load["nic_bytes"] for load in first["all_gather"]["loads"]] == [8192]
    assert [load["nic_bytes"] for load in first["all_reduce"]["loads"]] == [16384]
    assert len(first["hierarchical gather"]["loads"]) == 2
    step = predict(Workload(model=find_model("gpt-tiny"), seq_length=32), replace(cluster, nodes=4), partition_size=2)
    assert 0 < step.step_s.low < step.step_s.high


def test_accelerate_launch_measures_one_node_and_says_what_it_could_not(tmp_path: Path):
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2},
        "num_machines": 1,
        "num_processes": 2,
        "main_process_port": free_port(),
        "mixed_precision": "no",
        "parallelism_config": {"parallelism_config_dp_replicate_size": 1, "parallelism_config_dp_shard_size": 2},
    }
    (tmp_path / "mics.yaml").write_text(yaml.safe_dump(config))
    output = tmp_path / "cluster.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "mics.yaml")]
    done = subprocess.run(
        [*launch, "-m", "hf_mics.cli", "measure", "--output", str(output), *SMALL],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "one node: links between nodes were not measured" in done.stdout
    assert done.stdout.count("wrote") == 1
    cluster = load_cluster(output)
    assert (cluster.nodes, cluster.gpus_per_node, cluster.inter_node) == (1, 2, None)
    with pytest.raises(MiCSError, match="nothing is known of the links between nodes"):
        cluster.with_nodes(2)


def samples_of_slow_and_quick_calls() -> list[int]:
    slow, quick = (partial(sampled_s, call, torch.device("cpu")) for call in (partial(time.sleep, 0.05), int))
    return [
        len(slow(samples=20, sample_s=0, most_s=0.25)),
        len(slow(samples=20, sample_s=0, most_s=0.01)),
        len(quick(samples=20, sample_s=0, most_s=10)),
    ]


def test_slow_calls_are_sampled_less_often_but_three_times_at_least_on_every_rank_alike():
    (most, least, quick), other = run_ranks(samples_of_slow_and_quick_calls, 2, timeout_s=60)
    # A sleep never ends early: at most 5 of 0.05 s fit into 0.25 s.
    assert 3 <= most <= 5
    assert (least, quick) == (3, 20)
    assert other == [most, least, quick]


@pytest.mark.parametrize("family", ["gpt", "bert", "llama", "t5"])
def test_a_model_of_any_family_trains_without_layers_which_is_how_the_head_is_timed(family: str):
    shape = ModelShape(
        name=family,
        family=family,  # type: ignore[arg-type]
        num_layers=3,
        num_decoder_layers=3 if family == "t5" else 0,
        hidden_size=16,
        ffn_size=32,
        num_heads=2,
        vocab_size=64,
        context_length=8,
    )
    ids = torch.zeros(2, 8, dtype=torch.long)
    bare, one = (plain_model(shape, (depth, depth)) for depth in (0, 1))
    for model in (bare, one):
        model(input_ids=ids, labels=ids).loss.backward()
    assert len(plan_units(one).layers) == (2 if family == "t5" else 1)
    assert sum(p.numel() for p in bare.parameters()) == shape.units[0].num_parameters


@pytest.mark.parametrize(
    ("environment", "words", "message"),
    [
        ({}, [], "started by a launcher; RANK, LOCAL_RANK"),
        ({"WORLD_SIZE": "1"}, [], "one process has nobody to communicate with"),
        ({"WORLD_SIZE": "2"}, ["--samples", "0"], "--samples must be at least 3, got 0"),
        ({"WORLD_SIZE": "2"}, ["--largest-mb", "-1"], "--largest-mb must be a positive number, got -1.0"),
        ({"WORLD_SIZE": "2"}, ["--model", "gpt-tinny"], "no model 'gpt-tinny'"),
        ({"WORLD_SIZE": "2"}, ["--seq-length", "4096"], "gpt2 has a context of 1024 tokens, got 4096"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_ranks_meet(
    environment: dict[str, str],
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    launched = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name in (*launched, "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (launched | environment if environment else {}).items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "cluster.json"
    assert cli.main(["measure", "--output", str(output), *words]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_mistake_is_reported_by_rank_0_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["measure", "--output", "x.json"]) == 2
    assert capsys.readouterr().err == ""


def test_a_fit_finds_the_latency_the_bandwidth_and_the_spread_of_noisy_times():
    noise = np.random.default_rng(0)
    latency_s, bandwidth, spread = 20e-6, 5e9, 1.1
    timings = [
        Timing(size, 7, [(7 * latency_s + size / bandwidth) * spread ** noise.standard_normal() for _ in range(21)])
        for size in (2.0**n for n in range(10, 30, 2))
    ]
    fit = fit_link(timings)
    # The largest size decides on the bandwidth: a median of 21 samples of 10 % noise is known to 3 %.
    assert fit.latency_s == pytest.approx(latency_s, rel=0.05)
    assert fit.bandwidth_bytes_per_s == pytest.approx(bandwidth, rel=0.06)
    # 90 % of a normal distribution lie within 1.645 standard deviations.
    assert fit.slow == pytest.approx(spread**1.645, rel=0.06)
    assert fit.fast == pytest.approx(spread**-1.645, rel=0.06)
    assert fit.link.bandwidth_bytes_per_s.low < bandwidth < fit.link.bandwidth_bytes_per_s.high
    assert fit.link.latency_s.low < latency_s < fit.link.latency_s.high


def test_small_messages_that_a_burst_lets_through_do_not_bend_the_bandwidth_of_large_ones():
    """A shaped link: the first 64 kB go at once. Weighted alike, the sizes would ask for far more than 50 MB/s."""
    timings = [
        Timing(size, 3, [3e-4 + max(0.0, size - 65536) / 50e6] * 3) for size in (2.0**n for n in range(14, 26, 2))
    ]
    fit = fit_link(timings)
    largest = timings[-1]
    expected_s = 3 * fit.latency_s + largest.load_bytes / fit.bandwidth_bytes_per_s
    assert expected_s == pytest.approx(largest.seconds[0], rel=0.02)
    assert fit.bandwidth_bytes_per_s == pytest.approx(50e6, rel=0.02)


def test_exact_times_narrow_the_ranges_to_what_two_runs_differ_by():
    fit = fit_link([Timing(size, 3, [3 * 1e-5 + size / 1e9] * 3) for size in (1e3, 1e5, 1e7)])
    assert (fit.fast, fit.slow) == (1 / LEAST_SPREAD, LEAST_SPREAD)
    bandwidth = fit.link.bandwidth_bytes_per_s
    assert bandwidth.typical == pytest.approx(1e9, rel=1e-3)
    assert bandwidth.high / bandwidth.low == pytest.approx(LEAST_SPREAD**2)


def test_a_measured_rate_s_range_holds_what_was_seen_and_nothing_impossible():
    found = range_of([0.5, 0.52, 0.6, 0.7, 0.71])
    assert found.typical == 0.6
    assert (found.low, found.high) == pytest.approx((0.504, 0.708))
    assert range_of([0.97, 0.99, 1.2], most=1.0).high == 1.0
    assert range_of([2.0] * 3) == Range(2.0 / LEAST_SPREAD, 2.0 * LEAST_SPREAD, 2.0)


def test_one_size_fixes_no_line():
    with pytest.raises(MiCSError, match="at least two message sizes"):
        fit_link([Timing(1e6, 1, [1.0, 1.0])])
