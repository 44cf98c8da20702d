"""Which defaults of the Trainer's flags suit every recipe, and which flags and values does none take?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_mics.errors import ConfigError


@dataclass
class RecipeArguments(TrainingArguments):
    """`TrainingArguments` that log to TensorBoard, train on CPUs where there is nothing else, and are repeatable."""

    gradient_accumulation_steps: int = field(default=2, metadata={"help": "Micro-steps per optimizer step."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of linear warm-up, or their share if below 1."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of matrices; norms and biases have none."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first one, too."})
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "Where logs go: tensorboard, wandb, ..., none."}
    )
    seed: int = field(default=0, metadata={"help": "Of new weights, of the order of the data, and of masks."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "A checkpoint's folder, or 'latest'."})
    # No default_factory for these: HfArgumentParser (transformers 5.23) takes it for False.
    use_cpu: bool = field(default=not torch.accelerator.is_available(), metadata={"help": "Train on CPUs, over gloo."})
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Copy batches to GPUs from pinned memory."}
    )

    def __post_init__(self) -> None:
        require_at_least(1, gradient_accumulation_steps=self.gradient_accumulation_steps)
        require_at_least(1, per_device_train_batch_size=self.per_device_train_batch_size)
        require_at_least(1, per_device_eval_batch_size=self.per_device_eval_batch_size)
        require_at_least(0, weight_decay=self.weight_decay, learning_rate=self.learning_rate)
        if self.max_steps == 0:
            raise ConfigError("--max_steps must be at least 1, or -1 to go by --num_train_epochs, got 0.")
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def resume_from(self) -> str | bool | None:
        """What `Trainer.train` takes: a checkpoint's folder, or True for the newest complete one ("latest")."""
        return True if self.resume_from_checkpoint == "latest" else self.resume_from_checkpoint


def parse_flags(*kinds: Any) -> tuple[Any, ...]:
    """Returns one object of each of the dataclasses `kinds`, from the command line.

    Raises:
        ConfigError: a flag that none of them has.
    """
    parser = HfArgumentParser(kinds)
    *parsed, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        raise ConfigError(f"unknown flags: {' '.join(unknown)}. Correct or leave them out; --help lists all.")
    return tuple(parsed)


def require_at_least(least: float, **values: float | None) -> None:
    """Checks the flags `values`, by name; None stands for a default.

    Raises:
        ConfigError: one is less than `least`.
    """
    for name, value in values.items():
        if value is not None and not value >= least:
            raise ConfigError(f"--{name} must be at least {least:g}, got {value}.")
