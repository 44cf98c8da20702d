"""What happens to one unit's gradients between the first micro-step of an accumulation window and its hop 2?

FSDP2 packs the reduce-scattered gradients of a unit into one buffer, the partial sum, and adds micro-steps up in it.
The window keeps that sum right where FSDP2 alone does not look:

- Between micro-steps `param.grad` shows the parameter's part of the sum, as a view. Whatever the user does to it there
  (zero_grad, scaling, replacing) acts on the sum, as it does on a gradient in one process.
- The packing is by position, for the parameters that had a gradient. When micro-steps differ in that, the sum or the
  micro-step is padded with zeros, so that both are packed alike. Every decision follows from which gradients exist,
  never from their values: values differ between ranks, and so would the sizes of the collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hf_mics._torch_compat import Unit, in_backward
from hf_mics.hop2 import ReplicationGroup


class Window:
    """The accumulation window of one unit; see the module's text.

    Args:
        unit: the unit, whose post-backward is wrapped until `detach`.
        hop2: the group over which it all-reduces.
        all_hop2: those of all units.
    """

    def __init__(self, unit: Unit, hop2: ReplicationGroup, all_hop2: list[ReplicationGroup]) -> None:
        self.unit = unit
        self._hop2 = hop2
        self._all_hop2 = all_hop2
        # Which parameters the packed partial sum holds, in packing order; None while no window is open.
        self._packed: list[int] | None = None
        # Parameters that got a real gradient in this window; the others were padded with zeros.
        self._used: frozenset[int] = frozenset()
        # What was put into `param.grad` at the end of the last backward.
        self._exposed: dict[int, torch.Tensor] = {}
        # Forward calls whose backward has not come yet: a module that runs several times per micro-step (ALBERT's
        # shared layer) must all-reduce after the last of them, not after each.
        self._forwards = 0
        self._hook = unit.module.register_forward_pre_hook(  # type: ignore[attr-defined]
            torch.compiler.disable(self._count_forward)
        )
        unit.wrap_post_backward(self._post_backward)

    @property
    def is_open(self) -> bool:
        """Whether a partial sum waits for hop 2, once what the user dropped is gone."""
        self._settle()
        return self.unit.partial_sum is not None

    @property
    def awaits_backward(self) -> bool:
        """Whether a forward with gradients has run and no backward since."""
        return self._forwards > 0

    def drop(self) -> None:
        """Forgets the partial sum."""
        self._hide()
        self._close()

    def detach(self) -> None:
        """Gives the unit's post-backward back to FSDP2."""
        self._hook.remove()
        self.unit.unwrap_post_backward()

    def end_backward(self) -> None:
        """Runs hop 2 if this boundary's backward has not, then shows what is left in `param.grad`."""
        self._forwards = 0
        if self.unit.all_reduces and self.unit.reduces and self.is_open:
            self.unit.post_backward()
            self.unit.finish_late_reduction()
        if not self._exposed:
            self._expose()

    def finish_hop2(self) -> None:
        """Waits for what hop 2 has deferred; the end of a backward calls it on every unit, last."""
        self._hop2.finish()

    def _count_forward(self, *_: Any) -> None:
        # Activation checkpointing runs forward again during backward; evaluation runs it without gradients.
        if torch.is_grad_enabled() and not in_backward():
            self._forwards += 1

    def _post_backward(self, fsdp_post_backward: Callable[..., None]) -> None:
        if not self.unit.reduces:
            fsdp_post_backward()
            return
        self._forwards -= 1
        self._settle()
        used = self.unit.params_with_gradient()
        closes = self.unit.all_reduces and self._forwards <= 0
        if self._packed is not None and (used or closes):
            self._align(used)
        packing = sorted(self.unit.params_with_gradient())
        self._hide()
        finished = {i for i, param in enumerate(self.unit.sharded_params) if param.grad is not None}
        self._reduce(fsdp_post_backward, all_reduce=closes)
        if not packing:
            return
        self._used |= used
        if closes:
            self._forget_unused(frozenset(packing) - self._used - finished)
            self._close()
        else:
            self._packed = packing

    def _reduce(self, fsdp_post_backward: Callable[..., None], *, all_reduce: bool) -> None:
        wanted = self.unit.all_reduces
        self.unit.all_reduces = wanted and all_reduce
        self._hop2.defers = self.unit.reads_hop2_late
        if not self._hop2.defers:
            # The result is added to a gradient that may still be on its way: of this unit's first reduction in this
            # backward, or of another unit that holds the same parameter.
            for group in self._all_hop2:
                group.finish()
        try:
            with self._hop2.unmasked_errors():
                fsdp_post_backward()
        finally:
            self.unit.all_reduces = wanted
            self._hop2.defers = False

    def _close(self) -> None:
        self.unit.partial_sum = None
        self._packed = None
        self._used = frozenset()

    # -- the partial sum as param.grad -----------------------------------------------------------------------------

    def _expose(self) -> None:
        """Shows each parameter's part of the partial sum in `param.grad`.

        A finished gradient that stands there, from a window without a zero_grad() after it, is added to the sum first:
        it is the same in every replica, so hop 2's average leaves it as it is.
        """
        partial = self.unit.partial_sum
        if partial is None or self._packed is None:
            return
        params = self.unit.sharded_params
        shown: dict[int, torch.Tensor] = {}
        for i, part in self._parts(partial):
            param = params[i]
            if i not in self._used:
                continue
            if id(param) in shown:
                # Tied after sharding (transformers' load-time sharding does): one parameter, two places in the sum.
                shown[id(param)] += part
                part.zero_()
                continue
            shown[id(param)] = part
            if param.grad is not None:
                if not self.unit.hop2_averages:
                    continue
                part += _local(param.grad).to(part.device)
            # Autograd refuses a gradient of another dtype or device: pure bf16 models and CPU offload get a copy.
            param.grad = self._exposed[i] = self.unit.as_sharded(i, part.to(param.device, param.dtype))

    def _hide(self) -> None:
        """Takes the parts out of `param.grad`: FSDP2 would add the reduced gradient to them."""
        params = self.unit.sharded_params
        for i, grad in self._exposed.items():
            if params[i].grad is grad:
                params[i].grad = None
        self._exposed.clear()

    def _settle(self) -> None:
        """Carries over to the partial sum what the user did to the gradients since the last backward."""
        if self._packed is None:
            return
        partial = self.unit.partial_sum
        if partial is None:  # FSDPModule.reset_iter_state
            self.drop()
            return
        if not self._exposed:
            return
        params = self.unit.sharded_params
        for i, part in self._parts(partial):
            if i not in self._exposed:
                continue
            grad = params[i].grad
            if grad is None:
                part.zero_()
                del self._exposed[i]
                self._used -= {i}
            else:
                self._carry_over(part, grad)
                self._exposed[i] = grad
        if not self._exposed:
            self._close()

    @staticmethod
    def _carry_over(part: torch.Tensor, grad: torch.Tensor) -> None:
        local = _local(grad)
        if local.data_ptr() == part.data_ptr() and local.dtype == part.dtype:
            return
        # A copy, or the user's own tensor. Entries that only lost digits to a narrower dtype keep them.
        mine = part.to(local.device, local.dtype)
        part.copy_(torch.where((local == mine).to(part.device), part, local.to(part.device, part.dtype)))

    def _forget_unused(self, unused: frozenset[int]) -> None:
        """A parameter that was only padded gets None, as in one process: zeros would make AdamW decay its weight."""
        params = self.unit.sharded_params
        for i in unused:
            params[i].grad = None

    # -- packing ---------------------------------------------------------------------------------------------------

    def _align(self, used: frozenset[int]) -> None:
        """Makes this micro-step's packing equal to the partial sum's, by padding either with zeros."""
        packed = frozenset(self._packed or ())
        if used - packed:
            self._repack(sorted(packed | used))
            packed |= used
        self.unit.add_zero_gradients(packed - used)

    def _repack(self, packing: list[int]) -> None:
        old = self.unit.partial_sum
        if old is None:
            raise AssertionError("repacking without a partial sum")
        self.unit.wait_for_partial_sum()
        wide = old.new_zeros(sum(self.unit.shard_numel(i) for i in packing))
        former = dict(self._slices(old))
        self._packed = packing
        for i, flat in self._slices(wide):
            if i in former:
                flat.copy_(former[i])
        self.unit.partial_sum = wide

    def _slices(self, packed: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """(index, padded flat slice) of every parameter in `packed`."""
        indices = self._packed or []
        return list(zip(indices, packed.split([self.unit.shard_numel(i) for i in indices]), strict=True))

    def _parts(self, packed: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """(index, unpadded view in the shard's shape) of every parameter in `packed`."""
        return [(i, self.unit.shard_view(i, flat)) for i, flat in self._slices(packed)]


def _local(grad: torch.Tensor) -> torch.Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad
