"""Does `hf-mics simulate` predict scaling without torch, draw it, and refuse what makes no sense?"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hf_mics import cli
from hf_mics.errors import ConfigError
from hf_mics.planning.cluster_file import save_cluster
from hf_mics.planning.instances import instance_cluster
from hf_mics.planning.models import find_model
from hf_mics.planning.published import SETTINGS
from hf_mics.planning.scaling import simulate, sizes_between, smallest_partition
from hf_mics.planning.timing import predict
from hf_mics.planning.workload import Workload

SMALL = ["simulate", "--model", "gpt2-xl", "--instance", "p4d.24xlarge", "--partition-size", "8"]
CLUSTER = instance_cluster("p4d.24xlarge", 1)
WORKLOAD = Workload(model=find_model("gpt2-xl"), seq_length=1024, accumulation=4)


def record(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert cli.main([*SMALL, "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_runs_from_8_to_16384_gpus_without_torch():
    code = (
        f"import sys; from hf_mics import cli; code = cli.main({[*SMALL, '--json']}); "
        "print([name for name in ('torch', 'transformers', 'accelerate') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.strip() == "[]"
    points = json.loads(done.stdout)["points"]
    sizes = {(p["scaling"], p["system"], p["world_size"]) for p in points}
    expected = [8 * 2**n for n in range(12)]
    assert sizes == {(s, y, w) for s in ("weak", "strong") for y in ("mics", "zero3", "hsdp") for w in expected}


def test_a_point_is_the_prediction_for_its_cluster(capsys: pytest.CaptureFixture[str]):
    found = record(capsys, "--scaling", "weak", "--from-gpus", "32", "--to-gpus", "64", "--systems", "mics", "ddp")
    step = predict(WORKLOAD, CLUSTER.with_nodes(8), partition_size=8)
    mics = next(p for p in found["points"] if (p["system"], p["world_size"]) == ("mics", 64))
    assert mics["step_time_s"] == [step.step_s.low, step.step_s.high]
    assert mics["tokens_per_s_per_gpu"][1] == pytest.approx(step.tokens_per_s.high / 64)
    assert found["model"] == {"name": "gpt2-xl", "parameters": WORKLOAD.model.num_parameters}
    assert len(found["assumptions"]) == 7


def test_strong_scaling_divides_one_global_batch(capsys: pytest.CaptureFixture[str]):
    found = record(capsys, "--scaling", "strong", "--to-gpus", "64", "--global-batch", "192", "--systems", "mics")
    # 192 sequences: 64 GPUs take 3 micro-steps each.
    assert {p["world_size"]: p["accumulation"] for p in found["points"]} == {8: 24, 16: 12, 32: 6, 64: 3}
    uneven = record(capsys, "--scaling", "strong", "--to-gpus", "64", "--global-batch", "96", "--systems", "mics")
    # 96 sequences on 64 GPUs are no whole micro-batches.
    assert [p["world_size"] for p in uneven["points"]] == [8, 16, 32]


def test_groups_larger_than_the_job_are_left_out(capsys: pytest.CaptureFixture[str]):
    found = record(capsys, "--partition-size", "32", "--to-gpus", "64", "--scaling", "weak")
    sizes = {
        system: [p["world_size"] for p in found["points"] if p["system"] == system] for system in ("mics", "zero3")
    }
    assert sizes == {"mics": [32, 64], "zero3": [8, 16, 32, 64]}


def test_the_default_group_is_the_smallest_that_fits_and_what_does_not_fit_is_left_out(
    capsys: pytest.CaptureFixture[str],
):
    words = ["simulate", "--model", "gpt-20b", "--instance", "p4d.24xlarge", "--scaling", "weak", "--json"]
    assert cli.main([*words, "--systems", "mics", "zero3", "ddp", "--to-gpus", "64"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    # 20B parameters are 320 GB of state: 20 GB on 16 GPUs and 10 on 32, beside what is gathered and computed.
    smallest = next(p["partition_size"] for p in points if p["system"] == "mics")
    sizes = {(p["system"], p["world_size"]) for p in points}
    assert 8 < smallest <= 32
    assert sizes == {(s, w) for s in ("mics", "zero3") for w in (16, 32, 64) if w >= smallest}


def test_what_was_simulated_and_what_was_left_out_is_said(capsys: pytest.CaptureFixture[str]):
    words = ["simulate", "--model", "gpt-20b", "--instance", "p4d.24xlarge", "--scaling", "weak", "--to-gpus", "64"]
    assert cli.main([*words, "--systems", "mics", "ddp"]) == 0
    out = capsys.readouterr().out
    assert "partition groups of 16, the fewest that fit; sequences of 1024, micro-batch 1, accumulation 4" in out
    assert "bf16, activation checkpointing on" in out
    assert "compute_efficiency" in out
    assert "left out:\n  weak scaling, mics on 8 GPUs: a partition group of 16 is more than all GPUs." in out
    assert "weak scaling, ddp on 8, 16, 32, 64 GPUs: gpt-20b does not fit: it needs 359.2 GB of a GPU's 40.0 GB" in out
    assert cli.main([*words[:5], "--to-gpus", "64", "--systems", "mics", "zero2"]) == 0
    out = capsys.readouterr().out
    # One line for all sizes, and for both scalings.
    assert "weak and strong scaling, zero2 on 8, 16, 32, 64 GPUs: gpt-20b does not fit: it needs" in out
    assert out.count("zero2 on") == 1
    assert cli.main([*words, "--json", "--partition-size", "32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["workload"]["seq_length"] == 1024
    assert found["left_out"][0].startswith(
        "weak scaling, mics on 8, 16 GPUs: a partition group of 32 is more than all GPUs"
    )


def test_no_number_is_cut_off_in_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main([*SMALL, "--scaling", "weak", "--to-gpus", "16", "--systems", "mics", "zero3", "zero2", "ddp"]) == 0
    assert "\u2026" not in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_paper_s_settings_are_the_smallest_group_and_the_largest_micro_batch_that_fit(name: str):
    setting = SETTINGS[name]
    cluster = setting.cluster(128)
    smallest = smallest_partition(replace(setting.workload, micro_batch=1), cluster)
    assert setting.partition_size == smallest == smallest_partition(setting.workload, cluster)
    doubled = replace(setting.workload, micro_batch=2 * setting.micro_batch)
    with pytest.raises(ConfigError, match="does not fit"):
        simulate(
            doubled, cluster, scaling="weak", systems=["mics"], world_sizes=[128], partition_size=setting.partition_size
        )


def test_mics_scales_better_than_full_sharding_where_the_network_is_slow():
    points = simulate(
        WORKLOAD,
        instance_cluster("p3dn.24xlarge", 1),
        scaling="weak",
        systems=["mics", "zero3"],
        world_sizes=sizes_between(8, 1024),
        partition_size=8,
    ).points
    at = {(p.system, p.world_size): p.tokens_per_s_per_gpu for p in points}
    assert at["mics", 1024].low > at["zero3", 1024].high
    assert at["mics", 8] == at["zero3", 8]


def test_plots_are_written_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [*SMALL, "--to-gpus", "32", "--plots", str(tmp_path / "plots")]
    assert cli.main(words) == 0
    written = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert written == ["strong_scaling.png", "weak_scaling.png"]
    picture = tmp_path / "plots" / "weak_scaling.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "16" in capsys.readouterr().out
    picture.write_bytes(b"mine")
    (tmp_path / "plots" / "strong_scaling.png").unlink()
    assert cli.main(words) == 2
    assert "exist and are not overwritten; choose another folder or add --force" in capsys.readouterr().err
    assert picture.read_bytes() == b"mine"
    assert not (tmp_path / "plots" / "strong_scaling.png").exists()
    assert cli.main([*words, "--force"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_measured_cluster_is_simulated_at_any_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_cluster(CLUSTER.with_nodes(2), tmp_path / "cluster.json")
    words = ["simulate", "--model", "gpt2-xl", "--cluster", str(tmp_path / "cluster.json"), *SMALL[5:], "--json"]
    assert cli.main([*words, "--scaling", "weak"]) == 0
    from_file = json.loads(capsys.readouterr().out)["points"]
    assert from_file == record(capsys, "--scaling", "weak")["points"]


def test_the_paper_s_figures_hold_every_published_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["simulate", "--paper", "--json", "--plots", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["published"]
    published = {(p["setting"], p["system"], p["world_size"]): p["published_tflops_per_gpu"] for p in rows}
    assert published["175B", "mics", 128] == 169
    assert published["100B", "zero3", 512] == 62
    assert published["100B", "zero3", 128] == pytest.approx(62 / 0.72)
    assert all(0 < p["predicted_tflops_per_gpu"][0] < p["predicted_tflops_per_gpu"][1] for p in rows)
    assert (tmp_path / "paper.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["simulate", "--instance", "p4d.24xlarge"], "no model: expected --model"),
        (["simulate", "--model", "gpt2-xl"], "expected one description of the cluster"),
        (["simulate", "--model", "gpt2-xxl", "--instance", "p4d.24xlarge"], "Did you mean 'gpt2-xl'"),
        (["simulate", "--model", "gpt2-xl", "--instance", "p4x.24xlarge"], "Did you mean 'p4d"),
        ([*SMALL, "--from-gpus", "0"], "GPUs must run from a positive number up, got 0 to 16384"),
        ([*SMALL, "--to-gpus", "1000000000000"], "world_size must be at most 1048576 ranks, got 1000000000000"),
        ([*SMALL, "--from-gpus", "64", "--to-gpus", "8"], "got 64 to 8"),
        ([*SMALL, "--from-gpus", "12"], "must be nodes x GPUs per node, got 12 = 1 x 8 + 4"),
        ([*SMALL, "--partition-size", "12"], "partition_size must divide"),
        ([*SMALL, "--partition-size", "0"], "partition_size must be a positive integer, got 0"),
        ([*SMALL, "--micro-batch", "-1"], "micro_batch must be a positive integer, got -1"),
        ([*SMALL, "--seq-length", "4096"], "seq_length must not exceed"),
        ([*SMALL, "--global-batch", "3"], "must be a multiple of micro-batch x smallest number of GPUs, 1 x 8 = 8"),
        ([*SMALL, "--paper"], "fixed: leave out --model, --partition-size, --instance, or leave out --paper"),
        (["simulate", "--paper", "--micro-batch", "0"], "leave out --micro-batch, or"),
        (
            ["simulate", "--paper", "--systems", "mics", "--nic", "100", "--to-gpus", "16384"],
            "--systems, --to-gpus, --nic",
        ),
        ([*SMALL[:3], "--cluster", "nowhere.json"], "cannot read 'nowhere.json'"),
        (
            ["simulate", "--model", "gpt-175b", *SMALL[3:5], "--to-gpus", "32"],
            "gpt-175b does not fit: mics with partition",
        ),
        ([*SMALL, "--partition-size", "1", "--micro-batch", "64"], "does not fit"),
    ],
)
def test_bad_input_is_refused_with_nothing_written(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main([*words, "--plots", str(tmp_path / "plots")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()
