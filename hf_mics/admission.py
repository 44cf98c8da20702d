"""Which models and optimizers may enter training under MiCS, and in what order are they prepared?

What sharded parameters cannot do is refused here, before anything is sharded: on them it would train wrongly without a
word, or fail in words of torch's that name no way out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_mics.errors import ConfigError
from hf_mics.two_hop import refuse_gradient_hooks

# By class name, so that torch's and transformers' are met alike. Tried on four ranks: Adafactor raises at its first
# step, so does PEFT's LoraFAOptimizer, LBFGS ended 43 % off.
_WHOLE_TENSOR_OPTIMIZERS = {
    "Adafactor": "it averages over whole rows and columns of a weight",
    "LBFGS": "its line search needs sums over all shards",
    "LoraFAOptimizer": "it inverts products of whole adapter weights",
}


def preparation_turns(items: Sequence[Any]) -> list[list[int]]:
    """The places in `items`, what a script hands to `prepare`, that accelerate's FSDP2 prepares in one go.

    It takes one model at a time, with its optimizers. Several models (a GAN) go one after the other, each with the
    optimizers that hold its parameters, and all else comes last.

    Raises:
        ConfigError: a model without an optimizer or an optimizer without its model, or one for several models.
    """
    models = [i for i, item in enumerate(items) if isinstance(item, nn.Module)]
    optimizers = [i for i, item in enumerate(items) if isinstance(item, torch.optim.Optimizer)]
    if not models and optimizers:
        raise ConfigError(
            "prepare() was given an optimizer without its model, whose sharding gives it new parameters. Pass both in "
            "one call: prepare(model, optimizer, ...)."
        )
    turns = [[model, *_optimizers_of(items, model, models, optimizers)] for model in models]
    for model, *its_optimizers in turns:
        if not its_optimizers:
            raise ConfigError(
                f"prepare() was given a {type(items[model]).__name__} without its optimizer, which needs the "
                "parameters that sharding makes. Pass both in one call, prepare(model, optimizer, ...); one that is "
                "only read (a teacher, a loss, evaluation alone) needs model.to(accelerator.device), and for mixed "
                "precision prepare_model(model, evaluation_mode=True) as well."
            )
    if len(turns) < 2:
        return [list(range(len(items)))]
    first = {place for turn in turns for place in turn}
    rest = [place for place in range(len(items)) if place not in first]
    return [*turns, rest] if rest else turns


def _optimizers_of(items: Sequence[Any], model: int, models: Sequence[int], optimizers: Sequence[int]) -> list[int]:
    if len(models) == 1:
        return list(optimizers)
    found = []
    for place in optimizers:
        held = {id(param) for group in items[place].param_groups for param in group["params"]}
        owners = [m for m in models if any(id(param) in held for param in items[m].parameters())]
        if len(owners) != 1:
            raise ConfigError(
                f"prepare() was given {len(models)} models and a {type(items[place]).__name__} that holds parameters "
                f"of {len(owners)} of them; expected one. Give each model an optimizer of its own, or put the models "
                "into one module: torch.nn.ModuleList([...])."
            )
        if owners == [model]:
            found.append(place)
    return found


def check_model(model: nn.Module) -> None:
    """Refuses what would not survive sharding.

    Raises:
        ConfigError: hooks on gradients, embeddings with `max_norm` or sparse gradients, or AdaLoRA.
    """
    refuse_gradient_hooks(model.named_parameters())
    if any(getattr(config, "peft_type", None) == "ADALORA" for config in getattr(model, "peft_config", {}).values()):
        raise ConfigError(
            "AdaLoRA cannot work on sharded parameters: its loss has a penalty on whole adapter weights, and its ranks "
            "are chosen from whole gradients. Expected an adapter that trains by its layers' forward alone: "
            "LoraConfig (DoRA, rsLoRA, PiSSA and OLoRA among its options), IA3Config, OFTConfig, ..."
        )
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        for what in ("max_norm", "sparse"):
            if getattr(module, what):
                raise ConfigError(
                    f"{name or type(module).__name__} has {what}={getattr(module, what)}, which works on the gathered "
                    f"weights of a step and is lost with them. Expected an embedding without it."
                )


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuses optimizers that compute on a whole weight what a shard does not know.

    Raises:
        ConfigError: such an optimizer.
    """
    reason = _WHOLE_TENSOR_OPTIMIZERS.get(type(optimizer).__name__)
    if reason:
        raise ConfigError(
            f"{type(optimizer).__name__} cannot work on sharded parameters: {reason}. Expected an element-wise one: "
            "AdamW, Adam, SGD, RMSprop, Adagrad, Lion, ..."
        )


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer whose state would be lost: it belongs to parameters that sharding replaces.

    Raises:
        ConfigError: it has stepped, or state was loaded into it.
    """
    # Adagrad makes state in its constructor, of step 0.
    if any(state and float(state.get("step", 1)) > 0 for state in optimizer.state.values()):
        raise ConfigError(
            f"this {type(optimizer).__name__} has state from before prepare(), which would be lost with the parameters "
            "that it belongs to. Load after prepare(), with accelerator.load_state(folder) or torch.distributed."
            "checkpoint.state_dict.set_optimizer_state_dict(model, optimizer, ...)."
        )


@contextlib.contextmanager
def remember_replaced(models: Sequence[nn.Module]) -> Iterator[None]:
    """Around the sharding of `models`: a later step of an optimizer that holds parameters from before is refused."""
    # Weakly: on every rank the whole model would stay in memory beside its shards otherwise.
    before = WeakValueDictionary({id(param): param for model in models for param in model.parameters()})
    yield
    kept = {id(param) for model in models for param in model.parameters()}
    _REPLACED.update({key: param for key, param in before.items() if key not in kept})
    _watch_optimizers()


_REPLACED: WeakValueDictionary[int, nn.Parameter] = WeakValueDictionary()


@functools.cache  # once
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_refuse_replaced)


def _refuse_replaced(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if _REPLACED.get(id(param)) is param:
                raise ConfigError(
                    f"this {type(optimizer).__name__} holds the parameters that the model had before prepare() sharded "
                    "it, so its steps train nothing. Pass it to the same prepare() as the model, or make it afterwards."
                )
