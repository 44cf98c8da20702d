"""Which methods of a transformers model need help once it is sharded? `save_pretrained`, and `generate` of some."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from hf_mics._torch_compat import override_method, plain
from hf_mics.errors import ConfigError
from hf_mics.sharding import restore_scalars


def open_to_methods(model: nn.Module) -> None:
    """Lets scripts call `save_pretrained` and `generate` on the sharded `model` as on a whole one.

    An encoder-decoder's `generate` runs the encoder past the model's own forward, where nothing would gather the
    parameters that belong to no layer.
    """
    sharded = model if isinstance(model, FSDPModule) else plain(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(sharded, "generate"):
        register_fsdp_forward_method(sharded, "generate")
    if hasattr(sharded, "save_pretrained"):
        save = _save_pretrained(model, sharded.save_pretrained)
        for module in {model, plain(model)}:
            override_method(module, "save_pretrained", save)


def _save_pretrained(model: nn.Module, stock: Any) -> Callable[..., Any]:
    @functools.wraps(stock)
    def save_pretrained(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("state_dict") is None:
            if "is_main_process" not in kwargs:
                # Gathering is collective, and this may be rank 0 alone: it would wait for the others for ever.
                raise ConfigError(
                    "save_pretrained needs the whole weights, which no rank has. Call it on every rank with "
                    "is_main_process=accelerator.is_main_process, as accelerate's examples do, or pass "
                    "state_dict=accelerator.get_state_dict(model), taken on every rank. A Trainer has save_model()."
                )
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            kwargs["state_dict"] = restore_scalars(model, get_model_state_dict(model, options=options))
        return stock(*args, **kwargs)

    return save_pretrained
