"""Do the recipes' defaults hold, and can every one of them be set on the command line?"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_mics.errors import ConfigError
from hf_mics.pretraining.arguments import RecipeArguments, parse_flags
from hf_mics.pretraining.checkpoints import Progress
from hf_mics.pretraining.text import TextArguments
from recipes.pretrain_gpt import PretrainArguments, build_optimizer, optimizer_steps


def parse(tmp_path: Path, *flags: str) -> RecipeArguments:
    (arguments,) = HfArgumentParser(RecipeArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), *flags]
    )
    return arguments


def test_logs_go_to_tensorboard_and_cpus_are_used_only_where_there_is_nothing_else(tmp_path: Path):
    arguments = parse(tmp_path)
    assert isinstance(arguments, TrainingArguments)
    assert arguments.report_to == ["tensorboard"]
    assert arguments.use_cpu == (not torch.accelerator.is_available())
    assert arguments.dataloader_pin_memory == torch.accelerator.is_available()


def test_defaults_can_be_set(tmp_path: Path):
    arguments = parse(tmp_path, "--report_to", "none", "--gradient_accumulation_steps", "7", "--warmup_steps", "3")
    assert arguments.report_to == []
    assert (arguments.gradient_accumulation_steps, arguments.get_warmup_steps(100)) == (7, 3)
    assert parse(tmp_path).get_warmup_steps(100) == 10


@pytest.mark.parametrize(
    ("flags", "expected"), [((), None), (("latest",), True), (("a/checkpoint-5",), "a/checkpoint-5")]
)
def test_latest_is_the_newest_complete_checkpoint(tmp_path: Path, flags: tuple[str, ...], expected: str | bool | None):
    arguments = parse(tmp_path, *(("--resume_from_checkpoint", *flags) if flags else ()))
    assert arguments.resume_from == expected


@pytest.mark.parametrize(
    ("flag", "value", "least"),
    [
        ("gradient_accumulation_steps", 0, 1),
        ("max_steps", 0, 1),
        ("per_device_train_batch_size", -2, 1),
        ("per_device_train_batch_size", 0, 1),
        ("max_grad_norm", -1.0, 0),
        ("learning_rate", -1e-3, 0),
        ("learning_rate", float("nan"), 0),
        ("weight_decay", -0.1, 0),
        ("warmup_steps", -1, 0),
    ],
)
def test_values_that_train_nothing_or_uphill_are_refused(tmp_path: Path, flag: str, value: float, least: int):
    with pytest.raises(ConfigError, match=f"--{flag} must be at least {least}, got"):
        PretrainArguments(**{flag: value})
    if flag not in ("max_steps", "max_grad_norm", "warmup_steps"):
        with pytest.raises(ConfigError, match=f"--{flag} must be at least {least}, got"):
            parse(tmp_path, f"--{flag}", str(value))


def test_what_the_trainer_refuses_is_a_mistake_of_the_users(tmp_path: Path):
    with pytest.raises(ConfigError, match="requires non-zero --logging_steps"):
        parse(tmp_path, "--logging_steps", "0")
    with pytest.raises(ConfigError, match=r"--max_steps must be at least 1, or -1 .*got 0"):
        parse(tmp_path, "--max_steps", "0")


def test_unknown_flags_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flags = ["--output_dir", str(tmp_path), "--seed", "3"]
    monkeypatch.setattr("sys.argv", ["recipe.py", *flags])
    text, arguments = parse_flags(TextArguments, RecipeArguments)
    assert (text.text_column, arguments.seed) == ("text", 3)
    monkeypatch.setattr("sys.argv", ["recipe.py", *flags, "--no_such", "1"])
    with pytest.raises(ConfigError, match=r"unknown flags: --no_such 1\. .*--help"):
        parse_flags(TextArguments, RecipeArguments)


@pytest.mark.parametrize(("max_grad_norm", "clipped_to"), [(0.5, 0.5), (0.0, float("inf"))])
def test_zero_is_a_value_and_no_default(max_grad_norm: float, clipped_to: float):
    model, accelerator = mock.MagicMock(), mock.MagicMock(num_processes=1, sync_gradients=True)
    model.return_value.loss = torch.zeros(())
    args = PretrainArguments(learning_rate=0.0, max_grad_norm=max_grad_norm)
    optimizer, scheduler = build_optimizer(args, torch.nn.Linear(2, 2), 3e-4)
    assert optimizer.param_groups[0]["initial_lr"] == 0
    loader = mock.MagicMock(__iter__=lambda _: iter([{"input_ids": torch.zeros(1, 2)}]))
    with mock.patch("recipes.pretrain_gpt.LossWatch"):
        next(optimizer_steps(accelerator, model, optimizer, scheduler, loader, Progress(), args))
    assert accelerator.clip_grad_norm_.call_args.args[1] == clipped_to
