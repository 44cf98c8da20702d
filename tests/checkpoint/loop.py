"""Which Accelerate loop do the checkpoint tests save, resume and move? The same batches on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hf_mics import MiCSAccelerator, MiCSPlugin
from tests import tiny
from tests.test_accelerator import fresh_accelerator

GLOBAL_BATCH, ROWS, ACCUMULATION, EPOCHS = 8, 88, 2, 2
# An epoch has 11 micro-steps: windows of 2 and a short one. The checkpoint is after 4 of the first epoch's 6 windows.
SAVED_AT = 4


def start(partition: int, state_format: str, dropout: float = 0.0) -> tuple[MiCSAccelerator, nn.Module, Any, Any, Any]:
    """The Accelerate loop that all tests run, prepared: the same global batches whatever the number of ranks."""
    plugin = MiCSPlugin(partition_size=partition, state_dict_type=f"{state_format.upper()}_STATE_DICT")
    accelerator = fresh_accelerator(gradient_accumulation_steps=ACCUMULATION, mics_plugin=plugin)
    torch.manual_seed(0)
    model = tiny.gpt2(dropout)
    # Scripts that sort parameters into groups leave some of these empty.
    groups = [{"params": []}, {"params": list(model.parameters())}, {"params": []}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    loader = DataLoader(
        TensorDataset(tiny.token_rows(ROWS)),
        batch_size=GLOBAL_BATCH // accelerator.num_processes,
        shuffle=True,
        generator=torch.Generator().manual_seed(5),
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(scheduler)
    # Dropout draws from every rank's own stream.
    torch.manual_seed(100 + accelerator.process_index)
    return accelerator, model, optimizer, scheduler, loader


def train(
    accelerator: MiCSAccelerator, model: nn.Module, optimizer: Any, scheduler: Any, loader: Any, *,
    first: int = 0, folder: str | None = None, stop: bool = False,
) -> list[float]:  # fmt: skip
    """Two epochs from optimizer step `first`, saving into `folder` after step SAVED_AT; global losses per window."""
    losses: list[float] = []
    window: list[torch.Tensor] = []
    step = 0
    for epoch in range(EPOCHS):
        skipped = 0 if step or not first else first * ACCUMULATION
        step += first if skipped else 0
        for (rows,) in accelerator.skip_first_batches(loader, skipped) if skipped else loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=rows, labels=rows).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            window.append(accelerator.reduce(loss.detach(), "mean"))
            if not accelerator.sync_gradients:
                continue
            scheduler.step()
            step += 1
            losses.append(torch.stack(window).mean().item())
            window = []
            if step == SAVED_AT and epoch == 0 and folder:
                accelerator.save_state(folder)
                if stop:
                    return losses
    return losses
