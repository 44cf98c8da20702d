"""Which rank saw a loss that is not finite first, and in which micro-step?

NaN spreads to every rank's gradients in the same optimizer step, and the Trainer's log hides it by default
(`logging_nan_inf_filter`). Each rank notes the first micro-step whose loss is not finite, on the device; one 8-byte
all-reduce before the optimizer step finds the first of all.
"""

from __future__ import annotations

import socket
from typing import Any

import torch
import torch.distributed as dist

from hf_mics.errors import LossError
from hf_mics.process_groups import say_to_all

_NEVER = torch.iinfo(torch.int64).max


class LossWatch:
    """Watches the losses that pass through `accelerator.backward`, until `close`.

    Args:
        accelerator: accelerate's or a MiCSAccelerator, also of a lone process.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._backward = accelerator.backward
        self._is_job = dist.is_initialized()
        self._rank, self._world_size = (dist.get_rank(), dist.get_world_size()) if self._is_job else (0, 1)
        self._first = torch.full((), _NEVER, device=accelerator.device)
        self._micro_step = 0
        # On the instance: other accelerators, and this one after `close`, keep the class's method.
        accelerator.backward = self._note_and_go_on

    def check(self, step: int) -> None:
        """Call before optimizer step number `step`, on every rank; a collective.

        Raises:
            LossError: on every rank, if a loss since the last call was not finite on any.
        """
        if self._is_job:
            dist.all_reduce(self._first, op=dist.ReduceOp.MIN)
        code = int(self._first.item())
        self._micro_step = 0
        if code == _NEVER:
            return
        micro_step, rank = divmod(code, self._world_size)
        nodes = say_to_all(socket.gethostname) if self._is_job else [socket.gethostname()]
        raise LossError(
            f"the loss is not finite: optimizer step {step}, micro-step {micro_step + 1}, seen first by rank {rank} on "
            f"node {nodes[rank]}. Training stops before that step: weights, optimizer and checkpoints are those of "
            f"step {step - 1} and before. Look at that rank's batch, lower the learning rate or max_grad_norm, or, "
            "under fp16, use bf16; then resume from the last checkpoint."
        )

    def close(self) -> None:
        """Gives `backward` back."""
        vars(self._accelerator).pop("backward", None)

    def _note_and_go_on(self, loss: torch.Tensor, **kwargs: Any) -> None:
        code = self._micro_step * self._world_size + self._rank
        finite = torch.isfinite(loss.detach()).all()
        self._first = torch.where(finite, self._first, self._first.clamp(max=code))
        self._micro_step += 1
        self._backward(loss, **kwargs)
