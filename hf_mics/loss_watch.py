"""Which rank saw a loss that is not finite first, and in which micro-step?

NaN spreads to every rank's gradients in the same optimizer step, and the Trainer's log hides it by default
(`logging_nan_inf_filter`). Each rank notes the first micro-step of the window whose loss is not finite, on the device;
one 8-byte all-reduce before the optimizer step finds the first of all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_NEVER = torch.iinfo(torch.int64).max


class LossWatch:
    """Watches the losses that pass through `accelerator.backward`, until `close`."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._backward = accelerator.backward
        self._first = torch.full((), _NEVER, device=accelerator.device)
        self._micro_step = 0
        # On the instance: other accelerators, and this one after `close`, keep the class's method.
        accelerator.backward = self._note_and_go_on

    def begin_window(self) -> None:
        """Forgets an unfinished window."""
        self._first.fill_(_NEVER)
        self._micro_step = 0

    def first_bad(self) -> tuple[int, int] | None:
        """(micro-step from 1, rank) of the window's first loss that is not finite, None if all were; a collective."""
        dist.all_reduce(self._first, op=dist.ReduceOp.MIN)
        code = int(self._first.item())
        if code == _NEVER:
            return None
        micro_step, rank = divmod(code, dist.get_world_size())
        return micro_step + 1, rank

    def close(self) -> None:
        """Gives `backward` back."""
        vars(self._accelerator).pop("backward", None)

    def _note_and_go_on(self, loss: torch.Tensor, **kwargs: Any) -> None:
        code = self._micro_step * dist.get_world_size() + dist.get_rank()
        finite = torch.isfinite(loss.detach()).all()
        self._first = torch.where(finite, self._first, self._first.clamp(max=code))
        self._micro_step += 1
        self._backward(loss, **kwargs)
