"""Are clusters what their data sheets say, refused when they make no sense, and the same after saving?"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from hf_mics.commands.cluster_options import add_cluster_arguments, cluster_from_options
from hf_mics.errors import ConfigError, MiCSError, TopologyError
from hf_mics.planning.cluster import Cluster, Link, Range
from hf_mics.planning.cluster_file import load_cluster, save_cluster
from hf_mics.planning.instances import INSTANCES, custom_cluster, instance_cluster

P4D = instance_cluster("p4d.24xlarge", nodes=2)
RATES = {
    "nodes": 2,
    "gpus_per_node": 4,
    "gpu_memory_gb": 80,
    "peak_tflops": 312,
    "nvlink_gb_per_s": 300,
    "nic_gbit_per_s": 100,
}
FLAGS = ["--gpus-per-node", "4", "--gpu-memory", "80", "--nvlink", "300", "--nic", "100", "--peak", "312"]


def parsed(words: list[str], nodes: int | None = None) -> Cluster:
    parser = argparse.ArgumentParser()
    add_cluster_arguments(parser)
    parser.set_defaults(precision=None)
    return cluster_from_options(parser.parse_args(words), nodes)


def test_an_instance_has_its_data_sheet_s_rates_as_upper_bounds():
    assert P4D.world_size == 16
    assert P4D.accelerator.memory_bytes == 40e9
    assert P4D.accelerator.peak_flops_per_s == 312e12
    # 400 Gbit/s are 50 GB/s, of which about 340 Gbit/s are reached.
    assert P4D.inter_node.bandwidth_bytes_per_s.high == pytest.approx(340e9 / 8)
    assert P4D.intra_node.bandwidth_bytes_per_s.high < 300e9


def test_the_links_ratio_of_every_instance_is_the_published_one():
    """NVLink over one GPU's share of the network interface: where MiCS has most to win."""
    ratio = {name: i.nvlink_gb_per_s / (i.nic_gbit_per_s / 8 / i.gpus) for name, i in INSTANCES.items()}
    for name, published in {
        "a2-ultragpu-8g": 192, "p3dn.24xlarge": 96, "p4d.24xlarge": 48, "a3-highgpu-8g": 36,
        "a3-megagpu-8g": 18, "p6-b200.48xlarge": 18, "nd-a100-v4-40gb": 12, "p5.48xlarge": 9,
    }.items():  # fmt: skip
        assert ratio[name] == pytest.approx(published)


def test_every_assumption_is_listed_with_its_range_and_source():
    lines = P4D.assumptions()
    assert len(lines) == len(P4D.constants) == 7
    assert any(
        line.startswith("inter_node.bandwidth_bytes_per_s: 3e+10 to 4.25e+10 (50 GB/s data sheet") for line in lines
    )


def test_an_unknown_instance_is_refused_with_the_nearest_names():
    with pytest.raises(ConfigError, match=r"got 'p4d.24xl'.*Did you mean 'p4d.24xlarge"):
        instance_cluster("p4d.24xl", nodes=2)


@pytest.mark.parametrize("name", ["gpu_memory_gb", "peak_tflops", "nvlink_gb_per_s", "nic_gbit_per_s"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_rates_that_are_not_positive_are_refused(name: str, value: float):
    with pytest.raises(ConfigError, match="must be a positive number, got"):
        custom_cluster(**(RATES | {name: value}))


@pytest.mark.parametrize(("name", "value"), [("nodes", 0), ("nodes", -2), ("gpus_per_node", 0), ("nodes", True)])
def test_counts_that_are_not_positive_integers_are_refused(name: str, value: int):
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer"):
        custom_cluster(**(RATES | {name: value}))


@pytest.mark.parametrize("ends", [(2, 1), (-1, 1), (0, math.inf), (math.nan, 1)])
def test_a_range_is_ordered_finite_and_not_negative(ends: tuple[float, float]):
    with pytest.raises(ConfigError, match="a range must be"):
        Range(*ends)


def test_a_measured_range_is_passed_through_its_typical_value():
    found = Range(1.0, 5.0, 2.0)
    assert [found.at(fraction) for fraction in (0, 0.25, 0.5, 0.75, 1)] == [1, 1.5, 2, 3.5, 5]
    assert found.scaled(2) == Range(2.0, 10.0, 4.0)
    with pytest.raises(ConfigError, match="typical value must lie in it"):
        Range(1, 2, 3)


def test_impossible_clusters_are_refused():
    with pytest.raises(ConfigError, match="bandwidth must be positive"):
        Link(bandwidth_bytes_per_s=Range(0, 1), latency_s=Range(0, 0))
    with pytest.raises(ConfigError, match="compute_efficiency must lie above 0"):
        replace(P4D, compute_efficiency=Range(0.5, 1.1))
    with pytest.raises(ConfigError, match="nothing is known of the links between nodes"):
        replace(P4D, inter_node=None)
    with pytest.raises(ConfigError, match="backend must be one of nccl, gloo"):
        replace(P4D, backend="mpi")
    with pytest.raises(TopologyError, match=r"got 20 = 2 x 8 \+ 4"):
        P4D.with_world_size(20)


def test_a_cluster_can_be_cut_to_any_number_of_gpus():
    assert P4D.with_world_size(4).gpus_per_node == 4
    assert P4D.with_world_size(64).nodes == 8


def test_speed_0_and_1_are_the_slow_and_the_fast_end_of_every_constant():
    slow, fast = P4D.rates(0), P4D.rates(1)
    assert slow.flops_per_s < fast.flops_per_s
    assert slow.update_bytes_per_s < fast.update_bytes_per_s
    for lane in ("intra_node", "inter_node"):
        (slow_latency, slow_bandwidth), (fast_latency, fast_bandwidth) = slow.links[lane], fast.links[lane]
        assert slow_latency > fast_latency
        assert slow_bandwidth < fast_bandwidth


def test_a_phase_s_own_link_goes_before_the_lane_s():
    own = Link(bandwidth_bytes_per_s=Range.over(7.0), latency_s=Range.over(3.0))
    rates = replace(P4D, collectives={("all_reduce", "inter_node"): own}).rates(0.5)
    assert rates.link("all_reduce", "inter_node") == (3.0, 7.0)
    assert rates.link("all_gather", "inter_node") == rates.links["inter_node"]


@pytest.mark.parametrize("name", ["cluster.json", "cluster.yaml"])
def test_a_cluster_file_reads_back_as_it_was_written(tmp_path: Path, name: str):
    own = Link(bandwidth_bytes_per_s=Range(1.5e9, 2e9, 1.6e9), latency_s=Range(1e-05, 0.0002))
    cluster = replace(
        P4D,
        backend="gloo",
        collectives={("reduce_scatter", "intra_node"): own},
        update_bytes_per_s=None,
        update_s_per_tensor=Range(1e-6, 2e-6),
        head_efficiency=Range(0.1, 0.3, 0.2),
    )
    save_cluster(cluster, tmp_path / name, measurements={"points": [1.0, 2.0]})
    assert load_cluster(tmp_path / name) == cluster
    lone = replace(P4D, nodes=1, inter_node=None)
    save_cluster(lone, tmp_path / name, force=True)
    assert load_cluster(tmp_path / name) == lone


def test_an_existing_file_is_kept_without_force(tmp_path: Path):
    path = tmp_path / "cluster.json"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        save_cluster(P4D, path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a cluster as hf-mics measure writes it, got NoneType"),
        ("{", "expected a cluster as hf-mics measure writes it"),
        ("a: b: c", "expected a cluster as hf-mics measure writes it"),
        ("nodes: 2", "lacks accelerator, compute_efficiency"),
        ("distributed_type: FSDP", "has unknown distributed_type"),
    ],
)
def test_a_file_that_is_no_cluster_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_cluster(path)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("compute_efficiency", "fast", "compute_efficiency: expected a number, "),
        ("compute_efficiency", [0.1, 0.2, 0.3, 0.4], r"compute_efficiency: expected a number, \[low, high\] or"),
        ("head_efficiency", [0.2, 0.1, 0.3], "head_efficiency: a range's typical value"),
        ("compute_efficiency", [0.6, 0.4], "compute_efficiency: a range must be"),
        ("intra_node", {"latency_s": 1}, "intra_node: .* lacks bandwidth_bytes_per_s"),
        ("inter_node", {"latency_s": 1, "bandwidth_bytes_per_s": -1}, "inter_node: bandwidth_bytes_per_s: a range"),
        ("nodes", "two", "nodes must be a positive integer"),
        ("backend", "mpi", "backend must be one of"),
        ("collectives", {"all_gather": {}}, "collectives are named PHASE/LANE"),
        ("collectives", [1], r"cluster.json: collectives: expected entries by name, got \[1\]"),
        ("sources", "a data sheet", "sources: expected entries by name"),
        (
            "accelerator",
            {"name": "x", "memory_bytes": 0, "peak_flops_per_s": 1},
            "cluster.json: x: memory in bytes must be a positive",
        ),
    ],
)
def test_an_entry_that_makes_no_sense_is_named(tmp_path: Path, entry: str, value: object, message: str):
    path = tmp_path / "cluster.json"
    save_cluster(P4D, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    with pytest.raises(ConfigError, match=message):
        load_cluster(path)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_cluster(tmp_path / "nowhere.json")


def test_flags_name_an_instance_a_file_or_all_rates(tmp_path: Path):
    assert parsed(["--instance", "p4d.24xlarge"], 2) == P4D
    assert parsed(FLAGS, 2) == custom_cluster(**RATES)
    save_cluster(P4D, tmp_path / "c.json")
    assert parsed(["--cluster", str(tmp_path / "c.json")]) == P4D
    assert parsed(["--cluster", str(tmp_path / "c.json")], 4).nodes == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected one description of the cluster: .*; got none"),
        (["--instance", "p4d.24xlarge", "--cluster", "x"], "got --instance and --cluster"),
        (["--instance", "p4d.24xlarge", *FLAGS], "got --instance and --gpus-per-node"),
        (FLAGS[:-2], "missing: --peak"),
        ([*FLAGS[:-1], "-312"], r"peak in TFLOP/s must be a positive number, got -312"),
    ],
)
def test_flags_that_describe_no_cluster_or_two_are_refused(words: list[str], message: str):
    with pytest.raises(MiCSError, match=message):
        parsed(words, 2)
