"""Which defaults of the Trainer's flags suit every recipe? All of them can still be set on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


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

    @property
    def resume_from(self) -> str | bool | None:
        """What `Trainer.train` takes: a checkpoint's folder, or True for the newest complete one ("latest")."""
        return True if self.resume_from_checkpoint == "latest" else self.resume_from_checkpoint
