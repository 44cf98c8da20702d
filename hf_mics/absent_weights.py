"""What may a script do with a model before `prepare`, on ranks whose weights come from rank 0?

Under the launcher's default (`fsdp_cpu_ram_efficient_loading`) transformers leaves what a checkpoint lacks, such as the
weights of a new head, on the meta device on all ranks of a node but one (transformers 5.23). Scripts for unsharded
training move the model to their device before `prepare`, which torch refuses on meta.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn

from hf_mics._hf_compat import wrap_once
from hf_mics._torch_compat import device_and_dtype
from hf_mics.errors import ConfigError


def allow_absent_weights() -> None:
    """From now on `model.to(device)` passes over weights that this rank has yet to get.

    Until it gets them, in `prepare` or `prepare_model`, the model's forward is an error: on meta it would return
    numbers of no value without a word.
    """
    wrap_once(nn.Module, "to", _passing_over)


def has_absent_weights(model: nn.Module) -> bool:
    """Whether some of the model's parameters or buffers are on the meta device of this rank."""
    return any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers()))


def expect_weights(model: nn.Module) -> None:
    """Ends the watch over the forward of `model`, which gets its weights now."""
    for module in model.modules():
        if module in _WATCHES:
            _WATCHES.pop(module).remove()


def _passing_over(stock: Callable[..., Any]) -> Callable[..., Any]:
    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        # Rank 0 has nowhere to get its weights from, so there torch's own error is the right one.
        if not (dist.is_initialized() and dist.get_rank() and has_absent_weights(self)):
            return stock(self, *args, **kwargs)
        device, dtype = device_and_dtype(*args, **kwargs)
        if device is None or device.type == "meta":
            return stock(self, *args, **kwargs)
        if self not in _WATCHES:
            _WATCHES[self] = self.register_forward_pre_hook(_refuse_absent)
        return move_present(self, device, dtype)

    return to


def move_present(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """Moves the weights and buffers that this rank has, as `model.to` would, and leaves the others on meta."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        takes_dtype = tensor.is_floating_point() or tensor.is_complex()
        return tensor.to(tensor.device if tensor.is_meta else device, (takes_dtype and dtype) or tensor.dtype)

    return model._apply(move)


_WATCHES: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def _refuse_absent(model: nn.Module, _: Any) -> None:
    if has_absent_weights(model):
        raise ConfigError(
            f"this {type(model).__name__} lacks weights on rank {dist.get_rank()}: one rank of each node made them, "
            "and the others get them in prepare(), where this model has not been. Expected, for one that is only read "
            "(a teacher, a reference, evaluation alone), model = accelerator.prepare_model(model, evaluation_mode="
            "True), on every rank, or `fsdp_cpu_ram_efficient_loading: false` under fsdp_config: every rank makes them."
        )
