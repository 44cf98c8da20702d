"""Which defaults of the Trainer's flags suit every recipe, and which values does none take?"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

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
        require_at_least(0, weight_decay=self.weight_decay, learning_rate=self.learning_rate)
        super().__post_init__()

    @property
    def resume_from(self) -> str | bool | None:
        """What `Trainer.train` takes: a checkpoint's folder, or True for the newest complete one ("latest")."""
        return True if self.resume_from_checkpoint == "latest" else self.resume_from_checkpoint


def require_at_least(least: float, **values: float | None) -> None:
    """Checks the flags `values`, by name; None stands for a default.

    Raises:
        ConfigError: one is less than `least`.
    """
    for name, value in values.items():
        if value is not None and not value >= least:
            raise ConfigError(f"--{name} must be at least {least:g}, got {value}.")
