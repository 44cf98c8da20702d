"""Which stock Trainer do the checkpoint tests make on the ranks of a spawn? As under `-m hf_mics`, without a launch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_mics import MiCSAccelerator
from hf_mics._hf_compat import replace_accelerator
from tests import tiny

# An epoch is 6 optimizer steps of a global batch of 8 in windows of 2, the last window short.
ROWS, GLOBAL_BATCH, ACCUMULATION = 88, 8, 2


def make_trainer(
    output_dir: str | Path, *, partition: int | None = None, state_format: str = "sharded",
    model: nn.Module | None = None, dropout: float = 0.0, callbacks: Any = None, **settings: Any,
) -> Trainer:  # fmt: skip
    """A Trainer over tiny GPT-2 whose accelerator is under MiCS, in groups of `partition`, or of 2 where there are 2.

    `settings` go to TrainingArguments.
    """
    world = dist.get_world_size()
    partition = partition or min(2, world)
    os.environ.update(
        ACCELERATE_USE_CPU="true",
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_STATE_DICT_TYPE=f"{state_format.upper()}_STATE_DICT",
        ACCELERATE_USE_PARALLELISM_CONFIG="true",
        PARALLELISM_CONFIG_DP_SHARD_SIZE=str(partition),
        PARALLELISM_CONFIG_DP_REPLICATE_SIZE=str(world // partition),
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    replace_accelerator(MiCSAccelerator)
    torch.manual_seed(0)
    rows = tiny.token_rows(ROWS).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": GLOBAL_BATCH // world,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(output_dir=str(output_dir), **{**defaults, **settings})
    return Trainer(
        model=model or tiny.gpt2(dropout),
        args=arguments,
        train_dataset=data,
        eval_dataset=data[:16],
        callbacks=callbacks,
    )


def losses(trainer: Trainer) -> list[float]:
    """Training losses, one per optimizer step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
