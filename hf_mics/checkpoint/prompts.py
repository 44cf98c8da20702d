"""How does PEFT store a prompt whose weights are sharded?

Of prompt, prefix and p-tuning PEFT stores the prompt alone, which it computes from the prompt encoder's weights. So it
cannot when these are sharded; and training could not go on from a prompt without its encoder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_mics._torch_compat import override_method, plain, remove_override


def learns_a_prompt(model: nn.Module) -> bool:
    """Whether what is trained of `model` is the encoder of a prompt."""
    inner: Any = plain(model)
    return is_peft_model(inner) and inner.active_peft_config.is_prompt_learning


@contextlib.contextmanager
def computed_prompts(model: nn.Module) -> Iterator[None]:
    """Inside, PEFT finds the prompts of a sharded `model` computed, on one rank as on all; entering is a collective."""
    root = next((module for module in (model, plain(model)) if isinstance(module, FSDPModule)), None)
    if root is None or not learns_a_prompt(model):
        yield
        return
    inner: Any = plain(model)
    # An evaluation leaves parameters gathered, in the dtype of mixed precision.
    root.reshard()
    with _whole(inner.prompt_encoder), torch.no_grad():
        prompts = {name: inner.get_prompt_embedding_to_save(name) for name in inner.prompt_encoder}
    override_method(inner, "get_prompt_embedding_to_save", lambda _, adapter_name: prompts[adapter_name])
    try:
        yield
    finally:
        remove_override(inner, "get_prompt_embedding_to_save")


@contextlib.contextmanager
def _whole(encoder: nn.Module) -> Iterator[None]:
    """Inside, `encoder` has its whole parameters, and no dropout, which would draw from training's random stream."""
    modes = {module: module.training for module in encoder.modules()}
    held = [(module, name, p) for module in modes for name, p in module.named_parameters(recurse=False)]
    try:
        for module, name, param in held:
            whole = param.full_tensor() if isinstance(param, DTensor) else param.detach()
            setattr(module, name, nn.Parameter(whole, requires_grad=False))
        encoder.eval()
        yield
    finally:
        for module, name, param in held:
            setattr(module, name, param)
        for module, mode in modes.items():
            module.training = mode
