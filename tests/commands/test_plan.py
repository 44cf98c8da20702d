"""Does `hf-mics plan` keep its contract: the JSON, the table, the saved config, and errors that write nothing?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from hf_mics.cli import main

LARGE = "plan --model gpt-175b --instance p4de.24xlarge --nodes 16 --seq-length 2048 --micro-batch 1 --accumulation 4"
SMALL = "plan --model bert-10b --instance p3dn.24xlarge --nodes 4 --micro-batch 8 --accumulation 4 --precision fp16"


def as_json(capsys: pytest.CaptureFixture[str], command: str) -> dict[str, Any]:
    assert main([*command.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_holds_what_the_contract_names(capsys: pytest.CaptureFixture[str]):
    plan = as_json(capsys, LARGE)
    assert plan["world_size"] == 128
    assert plan["model"]["parameters"] == pytest.approx(174.6e9, rel=1e-3)
    assert plan["cluster"] == "p4de.24xlarge"
    assert plan["workload"] == {
        "seq_length": 2048, "micro_batch": 1, "accumulation": 4, "precision": "bf16", "optimizer": "adamw",
        "activation_checkpointing": True, "cpu_offload": False,
    }  # fmt: skip
    assert plan["choice"]["partition_size"] in [c["partition_size"] for c in plan["candidates"] if c["fits"]]
    assert plan["choice"]["reason"].endswith(".")
    assert all(isinstance(line, str) for line in plan["assumptions"])
    assert [candidate["partition_size"] for candidate in plan["candidates"]] == [1, 2, 4, 8, 16, 32, 64, 128]
    for candidate in plan["candidates"]:
        memory = candidate["memory_bytes"]
        kinds = {"parameters", "gradients", "optimizer", "activations", "communication", "reserve"}
        assert set(memory) == kinds | {"total"}
        assert memory["total"] == sum(memory[kind] for kind in kinds)
        assert candidate["fits"] == (memory["total"] <= plan["gpu_memory_bytes"])
        assert (candidate["why_not"] is None) == candidate["fits"]
        for phase in candidate["traffic_bytes"].values():
            assert set(phase) == {"per_gpu", "nic_per_node", "nvlink_per_gpu"}
        for key in ("step_time_s", "tflops_per_gpu", "tokens_per_s"):
            low, high = candidate[key]
            assert 0 < low < high


@pytest.mark.parametrize("system", ["mics", "zero3", "zero2", "hsdp"])
def test_peers_have_the_same_output(capsys: pytest.CaptureFixture[str], system: str):
    mics = as_json(capsys, SMALL)
    plan = as_json(capsys, f"{SMALL} --system {system}")
    assert set(plan) == set(mics)
    assert set(plan["candidates"][0]) == set(mics["candidates"][0])
    assert plan["system"] == system


def test_the_table_shows_choice_reason_runner_up_and_assumptions(capsys: pytest.CaptureFixture[str]):
    assert main([*SMALL.split(), "--price-per-hour", "31"]) == 0
    out = capsys.readouterr().out
    for words in (
        "<- choice",
        "choice: partition size 8.",
        "runner-up: 16",
        "would change it:",
        "assumed:",
        "1B tokens",
    ):
        assert words in out
    assert "GB over" in out


def test_no_table_is_cut_off_in_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main([*SMALL.split(), "--price-per-hour", "31"]) == 0
    out = capsys.readouterr().out
    assert "\u2026" not in out
    assert 16 * "\u2588" + "\u25b6" in out


def test_an_instance_is_known_by_its_name_in_capitals_too(capsys: pytest.CaptureFixture[str]):
    assert as_json(capsys, SMALL.replace("p3dn.24xlarge", "P3DN.24xLarge")) == as_json(capsys, SMALL)


def test_a_rate_with_its_unit_is_refused_with_the_unit_that_it_is_taken_in(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main([*SMALL.split(), "--nic", "100Gbps"])
    assert stopped.value.code == 2
    assert "--nic: expected a number, in Gbit/s, without its unit; got '100Gbps'" in capsys.readouterr().err


def test_save_writes_a_config_that_accelerate_launches(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "mics.yaml"
    assert main([*SMALL.split(), "--save", str(file)]) == 0
    out = capsys.readouterr().out
    assert f"accelerate launch --config_file {file} --machine_rank 0..3 --main_process_ip HOST -m hf_mics" in out
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "x.py"]))
    assert (arguments.num_machines, arguments.num_processes, arguments.mixed_precision) == (4, 32, "fp16")
    assert (arguments.parallelism_config_dp_shard_size, arguments.parallelism_config_dp_replicate_size) == (8, 4)
    assert str(arguments.fsdp_activation_checkpointing).lower() == "true"


def test_flat_collectives_are_in_the_launch_command_and_json_stays_one_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*SMALL.split(), "--flat", "--json", "--save", str(tmp_path / "mics.yaml")]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["choice"]["partition_size"] == 8
    assert "-m hf_mics --flat train.py" in said.err
    assert "-m hf_mics --flat train.py" in (tmp_path / "mics.yaml").read_text()


def test_fp32_is_planned_at_its_own_peak_and_what_offload_leaves_out_is_said(capsys: pytest.CaptureFixture[str]):
    small = "plan --model gpt2-xl --instance p4d.24xlarge --nodes 2"
    half, single = (as_json(capsys, f"{small} --precision {precision}") for precision in ("bf16", "fp32"))
    # 19.5 against 312 TFLOP/s on an A100.
    assert single["candidates"][0]["step_time_s"][0] > 5 * half["candidates"][0]["step_time_s"][0]
    offloaded = as_json(capsys, f"{small} --cpu-offload")
    assert any("optimizer's time on the CPU are left out" in line for line in offloaded["assumptions"])
    assert not any("CPU offload" in line for line in half["assumptions"])


def test_save_never_overwrites_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "mics.yaml"
    file.write_text("mine")
    assert main([*SMALL.split(), "--save", str(file)]) == 2
    assert "exists and is not overwritten: choose another name, or add --force" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert main([*SMALL.split(), "--save", str(file), "--force"]) == 0
    assert "distributed_type: FSDP" in file.read_text()
    assert main([*SMALL.split(), "--save", str(tmp_path / "no" / "folder.yaml")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--instance", "p4d.24xlarg"], "Did you mean 'p4d.24xlarge'"),
        (["--instance", "A100"], "Did you mean 'dgx-a100'"),
        (["--model", "gpt-175"], "Did you mean 'gpt-175b'"),
        (["--model", "somebody/GPT-175B"], "Did you mean 'gpt-175b'"),
        (["--model", ""], "no model: expected a preset"),
        (["--model", "somebody/something"], "could be had from the Hugging Face hub"),
        (["--micro-batch", "0"], "micro_batch must be a positive integer, got 0"),
        (["--accumulation", "-4"], "accumulation must be a positive integer, got -4"),
        (["--nodes", "0"], "nodes must be a positive integer, got 0"),
        (["--nodes", "1000000000"], "world_size must be at most 1048576 ranks, got 8000000000"),
        (["--seq-length", "4096"], "context of 512 tokens, got 4096"),
        (["--world-size", "33"], "expected 4 x 8 = 32, got 33"),
        (["--price-per-hour", "-1"], "--price-per-hour must be a positive number, got -1.0"),
        (["--reserve", "32"], "--reserve must be between 0 and the GPU's 32 GB, got 32"),
        (["--nic", "0"], "expected one description of the cluster"),
        (["--nodes", "1", "--micro-batch", "512"], "fits at no partition size"),
        (["--system", "zero3"], "--save writes a MiCS config, and this plans zero3"),
        (["--system", "ddp", "--cpu-offload"], "DistributedDataParallel keeps parameters and optimizer"),
        (["--system", "zero3", "--probe"], "--probe runs the engine's own layout"),
    ],
)
def test_mistakes_are_one_message_exit_code_2_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], words: str
):
    file = tmp_path / "mics.yaml"
    assert main([*SMALL.split(), *change, "--save", str(file)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""
    assert not file.exists()


@pytest.mark.parametrize("rate", ["--gpu-memory", "--nvlink", "--nic", "--peak"])
@pytest.mark.parametrize("value", ["0", "-3", "nan"])
def test_rates_must_be_positive(capsys: pytest.CaptureFixture[str], rate: str, value: str):
    rates = "--gpus-per-node 8 --gpu-memory 80 --nvlink 300 --nic 400 --peak 312"
    assert main(["plan", "--model", "gpt2", *rates.split()]) == 0
    capsys.readouterr()
    assert main(["plan", "--model", "gpt2", *rates.split(), f"{rate}={value}"]) == 2
    assert "must be a positive number" in capsys.readouterr().err


def test_a_command_that_there_is_not_is_refused_with_the_nearest_name(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["plna", "--model", "gpt2"])
    assert stopped.value.code == 2
    assert "got 'plna'. Did you mean 'plan'?" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_the_command_without_a_traceback():
    """As `| head` does. Closed before the first word, so that the very first write meets it."""
    words = [sys.executable, "-m", "hf_mics.cli", *LARGE.split()]
    # Unbuffered, argparse itself meets the closed pipe, and says nothing either.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    for arguments in ([*words, "--json"], words, [*words[:3], "--help"]):
        with subprocess.Popen(arguments, **pipes) as command:
            command.stdout.close()
            assert command.stderr.read() == ""
            assert command.wait(timeout=60) == 1


def test_neither_torch_nor_transformers_is_loaded():
    code = (
        "import sys; from hf_mics.cli import main; "
        f"main({LARGE.split()!r} + ['--json']); "
        "print([n for n in ('torch', 'transformers', 'accelerate', 'rich') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["world_size"] == 128


def test_a_probe_gives_memory_of_the_same_kinds(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 512, "n_positions": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = f"plan --model {tmp_path} --instance p4d.24xlarge --gpus-per-node 2"
    assert main([*command.split(), "--probe"]) == 2, "two descriptions of one cluster"
    capsys.readouterr()
    rates = "--gpus-per-node 2 --gpu-memory 40 --nvlink 300 --nic 400 --peak 312"
    plan = as_json(capsys, f"plan --model {tmp_path} {rates} --probe")
    closed = as_json(capsys, f"plan --model {tmp_path} {rates}")
    assert any("FSDP2 run under fake tensors" in line for line in plan["assumptions"])
    for probed, estimated in zip(plan["candidates"], closed["candidates"], strict=True):
        assert probed["memory_bytes"]["parameters"] == estimated["memory_bytes"]["parameters"]
