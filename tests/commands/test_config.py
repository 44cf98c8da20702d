"""Does accelerate launch what `hf-mics config` writes, and does `hf-mics check` find what accelerate hides?"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from hf_mics.cli import main

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "configs"


def command(nodes: int, gpus: int, partition: int, *more: str) -> list[str]:
    return ["config", "--nodes", f"{nodes}", "--gpus-per-node", f"{gpus}", "--partition-size", f"{partition}", *more]


@pytest.mark.parametrize(
    ("nodes", "gpus", "partition"), [(2, 2, 1), (1, 8, 2), (1, 8, 8), (4, 8, 8), (16, 8, 16), (3, 4, 12)]
)
def test_accelerate_launch_reads_the_sizes_that_were_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], nodes: int, gpus: int, partition: int
):
    """Through accelerate's own loader, parser and defaults."""
    file = tmp_path / "mics.yaml"
    assert main(command(nodes, gpus, partition, "--output", str(file))) == 0
    arguments, config, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), "x.py"])
    )
    assert config.distributed_type == DistributedType.FSDP
    assert (arguments.use_fsdp, arguments.use_parallelism_config, int(arguments.fsdp_version)) == (True, True, 2)
    assert (arguments.num_machines, arguments.num_processes) == (nodes, nodes * gpus)
    assert arguments.parallelism_config_dp_shard_size == partition
    assert arguments.parallelism_config_dp_replicate_size == nodes * gpus // partition
    known = {action.dest for action in launch_command_parser()._actions}
    loaded = load_config_from_file(str(file))
    assert not (set(loaded.fsdp_config) | set(loaded.parallelism_config)) - known
    capsys.readouterr()
    assert main(["check", str(file)]) == 0
    assert "no mistakes found" in capsys.readouterr().out


def test_what_was_asked_for_is_written(capsys: pytest.CaptureFixture[str]):
    assert main(command(1, 2, 2, "--precision", "fp32", "--no-activation-checkpointing", "--cpu-offload")) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["mixed_precision"] == "no"
    assert config["fsdp_config"]["fsdp_activation_checkpointing"] is False
    assert config["fsdp_config"]["fsdp_offload_params"] is True


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((2, 8, 3), "partition_size must divide world_size: got world_size 16 = 5 x 3 + 1"),
        ((3, 8, 12), "partition_size must divide node_size or be a multiple of it"),
        ((0, 8, 8), "nodes must be a positive integer, got 0"),
        ((10**9, 8, 8), "world_size must be at most 1048576 ranks, got 8000000000"),
        ((1, 8, -8), "partition_size must be a positive integer, got -8"),
    ],
)
def test_sizes_that_form_no_groups_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sizes: tuple[int, int, int], words: str
):
    file = tmp_path / "mics.yaml"
    assert main(command(*sizes, "--output", str(file))) == 2
    assert words in capsys.readouterr().err
    assert not file.exists()


def test_an_existing_file_is_kept_without_force(tmp_path: Path):
    file = tmp_path / "mics.yaml"
    file.write_text("mine")
    assert main(command(1, 8, 8, "--output", str(file))) == 2
    assert file.read_text() == "mine"
    assert main(command(1, 8, 8, "--output", str(file), "--force")) == 0
    assert file.read_text() != "mine"


@pytest.mark.parametrize(("name", "words"), [("", "no name for the config"), ("m.json", "choose for example 'm.yaml'")])
def test_names_that_accelerate_cannot_read_back_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, words: str
):
    monkeypatch.chdir(tmp_path)
    for start in (
        command(1, 8, 8, "--output"),
        ["plan", "--model", "gpt2-xl", "--instance", "p4d.24xlarge", "--save"],
    ):
        assert main([*start, name]) == 2
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_printed_command_is_one_that_a_shell_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = str(tmp_path / "my mics;$HOME.yaml")
    assert main(command(1, 8, 8, "--output", file)) == 0
    words = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert words[:4] == ["accelerate", "launch", "--config_file", file]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_configs_have_no_mistakes(capsys: pytest.CaptureFixture[str], path: Path):
    assert main(["check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "| A0 " in out
    assert "layers: found by hf_mics" in out
    assert ("no main_process_ip" in out) == ("num_machines: 1\n" not in path.read_text())


GOOD: dict[str, Any] = {
    "distributed_type": "FSDP",
    "num_machines": 2,
    "num_processes": 16,
    "mixed_precision": "bf16",
    "main_process_ip": "10.0.0.1",
    "fsdp_config": {"fsdp_version": 2, "fsdp_state_dict_type": "SHARDED_STATE_DICT"},
    "parallelism_config": {"parallelism_config_dp_shard_size": 8, "parallelism_config_dp_replicate_size": 2},
}


def changed(section: str | None, **values: Any) -> dict[str, Any]:
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in GOOD.items()}
    target = config if section is None else config[section]
    for key, value in values.items():
        if value is ...:
            del target[key]
        else:
            target[key] = value
    return config


def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Any) -> tuple[int, str, str]:
    file = tmp_path / "mics.yaml"
    file.write_text(yaml.safe_dump(config))
    code = main(["check", str(file)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def sizes(**values: Any) -> dict[str, Any]:
    return changed("parallelism_config", **{f"parallelism_config_{name}": value for name, value in values.items()})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (changed(None, num_process=16), "unknown key num_process (accelerate refuses it); did you mean num_processes?"),
        (changed(None, distributed_type="MULTI_GPU"), "distributed_type is MULTI_GPU, which shards nothing"),
        (changed(None, distributed_type=...), "no distributed_type"),
        (changed(None, distributed_type="DEEPSPEED"), "DeepSpeed brings its own sharding"),
        (changed(None, deepspeed_config={"zero_stage": 3}), "DeepSpeed brings its own sharding"),
        (changed(None, mixed_precision="bf61"), "mixed_precision must be 'no', fp16 or bf16, got 'bf61'"),
        (changed(None, distributed_type="MEGATRON_LM"), "Megatron-LM brings its own parallelism"),
        (changed(None, dynamo_config="inductor"), "dynamo_config must hold settings, got 'inductor'"),
        (changed(None, dynamo_config={"mode": "fast"}), "dynamo_mode must be one of default, reduce-overhead"),
        (
            changed(None, dynamo_config={"use_dynamic": "maybe"}),
            "dynamo_use_dynamic must be true or false, got 'maybe'",
        ),
        (changed(None, dynamo_config={"use": True}), "dynamo_config: unknown key use, read as dynamo_use"),
        (changed(None, mixed_precision="fp8"), "fp8 is not supported"),
        (changed(None, num_processes=15), "must be a multiple of num_machines: got 15 and 2"),
        (changed(None, num_processes=10**9), "world_size must be at most 1048576 ranks, got 1000000000"),
        (changed(None, num_processes=...), "no num_processes"),
        (changed(None, num_machines="two"), "num_machines must be a positive integer, got 'two'"),
        (changed(None, fsdp_config=...), "no fsdp_config"),
        (changed(None, fsdp_config="on"), "fsdp_config must hold settings, got 'on'"),
        (changed(None, compute_environment="AMAZON_SAGEMAKER"), "MiCS needs LOCAL_MACHINE"),
        (changed("fsdp_config", fsdp_version=1), "fsdp_version is 1, MiCS is built on 2"),
        (changed("fsdp_config", fsdp_version=...), "no fsdp_version, and accelerate's default is 1"),
        (
            changed("fsdp_config", fsdp_activation_checkpoint=True),
            "unknown key fsdp_activation_checkpoint (accelerate drops it without a word); did you mean "
            "fsdp_activation_checkpointing?",
        ),
        (
            changed("fsdp_config", num_processes=99),
            "fsdp_config: unknown key num_processes, read as fsdp_num_processes (accelerate drops it without a word)",
        ),
        (changed("fsdp_config", fsdp_min_num_params="abc"), "fsdp_min_num_params must be a whole number in digits"),
        (changed("fsdp_config", fsdp_min_num_params=-1), "fsdp_min_num_params must be a whole number in digits"),
        (changed("fsdp_config", min_num_params=1e8), "fsdp_min_num_params must be a whole number in digits"),
        (
            changed("fsdp_config", fsdp_transformer_layer_cls_to_wrap=["GPT2Block", "OPTBlock"]),
            "names with commas between them, got ['GPT2Block', 'OPTBlock']: set GPT2Block,OPTBlock",
        ),
        (
            changed("parallelism_config", num_processes=3),
            "parallelism_config: unknown key num_processes (accelerate puts it in place of the flag)",
        ),
        (
            changed("parallelism_config", tp_size=1),
            "unknown key tp_size (accelerate drops it without a word); did you ",
        ),
        (sizes(cp_backend="foo"), "parallelism_config_cp_backend must be torch, or left out, got 'foo'"),
        (sizes(dp_shard_size=3), "Valid partition sizes for 16 ranks on nodes of 8: 1, 2, 4, 8, 16"),
        (changed("fsdp_config", fsdp_state_dict_type="LOCAL_STATE_DICT"), "fsdp_state_dict_type is LOCAL_STATE_DICT"),
        (changed("fsdp_config", fsdp_offload_params="maybe"), "must be true or false, got 'maybe'"),
        (changed("fsdp_config", fsdp_offload_params=None), "fsdp_offload_params must be true or false, got None"),
        (changed("fsdp_config", fsdp_reshard_after_forward="FULL_SHARD"), "must be true or false, got 'FULL_SHARD'"),
        (changed("fsdp_config", fsdp_activation_checkpointing_offload="no!"), "must be true or false, got 'no!'"),
        (
            changed("fsdp_config", fsdp_activation_checkpointing_offload=True),
            "fsdp_activation_checkpointing_offload needs fsdp_activation_checkpointing: true",
        ),
        (
            changed("fsdp_config", fsdp_sync_module_states=False),
            "accelerate refuses fsdp_sync_module_states false with fsdp_cpu_ram_efficient_loading",
        ),
        (changed(None, machine_rank=5), "machine_rank must be 0 to 1 with num_machines 2, got 5"),
        (changed(None, gpu_ids="0,1"), "gpu_ids names 2 GPUs, and num_processes over num_machines puts 8 ranks"),
        (changed("fsdp_config", fsdp_auto_wrap_policy="LAYERS"), "fsdp_auto_wrap_policy must be"),
        (sizes(dp_replicate_size=3), "got 8 x 3 = 24, expected 16; set dp_replicate_size to 2"),
        (sizes(dp_shard_size=...), "dp_replicate_size without dp_shard_size: set dp_shard_size to 8"),
        (sizes(dp_shard_size=0), "parallelism_config_dp_shard_size must be a positive integer, got 0"),
        (sizes(dp_sharding=8), "parallelism_config: unknown key parallelism_config_dp_sharding"),
        (sizes(tp_size=2), "parallelism_config_tp_size is 2: MiCS shards data parallelism only"),
        (
            changed(None, num_machines=2, num_processes=24)
            | {"parallelism_config": sizes(dp_replicate_size=3)["parallelism_config"]},
            "partition_size must divide node_size or be a multiple of it",
        ),
    ],
)
def test_every_mistake_is_found_before_launch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Any, words: str
):
    code, _, errors = check(tmp_path, capsys, config)
    assert code == 2
    assert words in errors


def test_one_mistake_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wrong = sizes(tp_size=2, dp_replicate_size=3) | {"machine_rank": 5}
    code, _, errors = check(tmp_path, capsys, wrong)
    assert code == 2
    for words in ("parallelism_config_tp_size is 2", "set dp_replicate_size to 2", "machine_rank must be 0 to 1"):
        assert words in errors
    _, _, errors = check(tmp_path, capsys, wrong | {"num_processes": 15})
    assert "a multiple of num_machines: got 15 and 2" in errors


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (changed(None, distributed_type="fsdp"), "distributed_type is 'fsdp', and accelerate knows no such type"),
        (changed(None, mixed_precision=False), "mixed_precision is false, which is how YAML reads no"),
        (
            changed(None, gpu_ids=[0, 1]),
            "gpu_ids must be text, got [0, 1]: set gpu_ids: all, or numbers in quotes, '0,1'",
        ),
        (changed(None, gpu_ids=0), "gpu_ids must be text, got 0"),
        (changed(None, use_cpu={}), "use_cpu must be true or false, got {}"),
        (changed(None, main_process_port="29500"), "must be a number from 0 to 65535, without quotes, got '29500'"),
        (changed(None, main_process_port=99999), "must be a number from 0 to 65535, without quotes, got 99999"),
        (
            changed(None, dynamo_config={"dynamo_backend": "FOO"}),
            "dynamo_backend must be 'no' in quotes, or one of eager",
        ),
        (changed(None, dynamo_backend=False), "dynamo_backend must be 'no' in quotes"),
        (sizes(cp_size="1"), "parallelism_config_cp_size is '1': MiCS shards data parallelism only, leave it out"),
        (changed(None, num_machines="2"), "num_machines must be a number without quotes, got '2'"),
        (changed(None, num_processes="16"), "num_processes must be a number without quotes, got '16'"),
    ],
)
def test_what_the_launch_stops_on_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Any, words: str
):
    """Accelerate's own launcher, up to the environment of the processes, ends in a traceback."""
    code, _, errors = check(tmp_path, capsys, config)
    assert code == 2
    assert words in errors
    with pytest.raises((TypeError, ValueError, AttributeError, OverflowError)):
        launch_environment(tmp_path / "mics.yaml")


def launch_environment(file: Path) -> dict[str, str]:
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "x.py"]))
    return prepare_multi_gpu_env(arguments)


def test_keys_that_accelerate_completes_are_read_by_their_whole_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """In what is checked, noted and explained; accelerate's launcher agrees."""
    short = {"version": 2, "activation_checkpointing": True, "transformer_layer_cls_to_wrap": "BertLayer"}
    config = GOOD | {"fsdp_config": short | {"sharding_strategy": "HYBRID_SHARD", "fsdp_ignored_modules": "head"}}
    code, out, errors = check(tmp_path, capsys, config | {"dynamo_config": {"backend": "inductor"}})
    assert (code, errors) == (0, "")
    for words in ("activations: recomputed", "layers: every BertLayer", "HYBRID_SHARD says nothing to version 2"):
        assert words in out
    environment = launch_environment(tmp_path / "mics.yaml")
    read = {name: environment[name] for name in ("FSDP_VERSION", "FSDP_IGNORED_MODULES", "ACCELERATE_DYNAMO_BACKEND")}
    assert read == {"FSDP_VERSION": "2", "FSDP_IGNORED_MODULES": "head", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}


def test_a_good_config_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, out, errors = check(tmp_path, capsys, GOOD)
    assert (code, errors) == (0, "")
    for words in (
        "16 ranks, 8 on each node (nodes: 2); partition groups: 2, of 8 ranks",
        "node 1  | B0",
        "hop 2, every optimizer step: gradient shards all-reduced over 2 groups",
        "activations: kept",
        "no mistakes found",
    ):
        assert words in out
    assert "main_process_ip" not in out


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (changed(None, use_cpu=True), "use_cpu does not reach FSDP's processes"),
        (changed(None, main_process_ip=...), "no main_process_ip"),
        (changed(None, dynamo_config={"dynamo_backend": None}), "no mistakes found"),
        (changed(None, mixed_precision="no"), "fp32 computes and communicates in 4 bytes"),
        (changed("fsdp_config", fsdp_sharding_strategy="HYBRID_SHARD"), "HYBRID_SHARD says nothing to version 2"),
        (changed("fsdp_config", fsdp_state_dict_type="FULL_STATE_DICT"), "gathers the whole model on rank 0"),
        (changed("fsdp_config", fsdp_reshard_after_forward=False), "parameters stay gathered until backward"),
        (changed(None, parallelism_config=...), "no dp_shard_size: a node of 8 is the partition group"),
        (changed("fsdp_config", fsdp_transformer_layer_cls_to_wrap="BertLayer"), "layers: every BertLayer"),
        (changed("fsdp_config", fsdp_auto_wrap_policy="SIZE_BASED_WRAP"), "layers: found by hf_mics"),
    ],
)
def test_what_accelerate_leaves_unsaid_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Any, words: str
):
    code, out, _ = check(tmp_path, capsys, config)
    assert code == 0
    assert words in out


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n", "a: [", "1: 2\n", "\x00\x01"])
def test_files_that_are_no_config_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str):
    file = tmp_path / "mics.yaml"
    file.write_text(text)
    assert main(["check", str(file)]) == 2
    assert "is not a" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]):
    assert main(["check", "absent.yaml"]) == 2
    assert "cannot read 'absent.yaml'" in capsys.readouterr().err


def test_all_mistakes_are_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = changed("fsdp_config", fsdp_version=1, fsdp_typo=1)
    code, _, errors = check(tmp_path, capsys, config | {"distributed_type": "MULTI_GPU"})
    assert code == 2
    assert "has 3 mistakes" in errors
