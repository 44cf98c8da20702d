"""Which methods of a model need help once it is sharded? `save_pretrained` and `generate`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from hf_mics._torch_compat import override_method, plain
from hf_mics.checkpoint.contents import is_pretrained, share_tied
from hf_mics.checkpoint.prompts import computed_prompts
from hf_mics.errors import ConfigError
from hf_mics.process_groups import missing_callers
from hf_mics.sharding import restore_scalars


def open_to_methods(model: nn.Module) -> None:
    """Lets scripts call `save_pretrained` and `generate` of the sharded `model` as of a whole one.

    Some models' `generate` runs a part past the model's own forward, where nothing would gather the parameters that
    belong to no layer: an encoder-decoder's the encoder, PEFT's the base model.
    """
    sharded = model if isinstance(model, FSDPModule) else plain(model)
    if hasattr(sharded, "generate"):
        register_fsdp_forward_method(sharded, "generate")
    if hasattr(sharded, "save_pretrained"):
        save = _save_pretrained(model, sharded.save_pretrained)
        for module in {model, plain(model)}:
            override_method(module, "save_pretrained", save)


def _save_pretrained(model: nn.Module, stock: Any) -> Callable[..., Any]:
    parameters = inspect.signature(stock)

    @functools.wraps(stock)
    def save_pretrained(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = parameters.bind_partial(*args, **kwargs).arguments
        given = given | given.pop("kwargs", {})
        if given.get("state_dict") is not None or given.get("distributed_checkpoint"):
            return stock(*args, **kwargs)
        if by_all := "is_main_process" not in given:
            _check_all_call()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = restore_scalars(model, get_model_state_dict(model, options=options))
        kwargs["state_dict"] = share_tied(model, state) if is_pretrained(model) else state
        with computed_prompts(model):
            # Gathered for rank 0 alone; PEFT looks its tensors up before it asks who writes.
            result = None if dist.get_rank() else stock(*args, **kwargs)
        if by_all:
            # As where every rank writes its own: whoever goes on finds the folder.
            dist.barrier()
        return result

    return save_pretrained


def _check_all_call() -> None:
    """Raises ConfigError unless every rank calls this: gathering is collective, and one rank would wait for ever."""
    missing = missing_callers("save_pretrained", _WAIT_FOR_CALLERS_S)
    if missing:
        raise ConfigError(
            f"save_pretrained needs the whole weights, which no rank has: rank {dist.get_rank()} waited "
            f"{_WAIT_FOR_CALLERS_S:g} s for rank {missing[0]} to call it too. Call it on every rank, with "
            "is_main_process=accelerator.is_main_process as accelerate's examples do, and not under `if "
            "accelerator.is_main_process` (upload the folder for push_to_hub); or pass "
            "state_dict=accelerator.get_state_dict(model), taken on every rank. A Trainer has save_model()."
        )


# A rank may be busy before it calls: rank 0 with an evaluation of its own.
_WAIT_FOR_CALLERS_S = 120.0
