"""Where are private names of accelerate touched? Here alone, checked on accelerate 1.15.0 with transformers 5.23.0.

Accelerate shards a model in `Accelerator._prepare_fsdp2`, through functions of its own module, and turns FSDP on only
for GPUs. Three things are replaced here, each as narrowly as it can be: those functions while one `prepare` runs, the
distributed type on machines without accelerators, and the class that scripts import as `Accelerator`. One private name
of transformers' layers is read here as well.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import accelerate
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, PartialState
from accelerate import accelerator as accelerator_module
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, fsdp_utils
from torch import nn
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint import state_dict as dcp_state

from hf_mics._torch_compat import find_units, is_root, make_state_again, without_wrappers

# Bound before the runner puts its own class under these names.
StockAccelerator = Accelerator

Prepare = Callable[[Any, nn.Module], nn.Module]


@contextlib.contextmanager
def replaced(*places: tuple[Any, str, Any]) -> Iterator[None]:
    """Inside, `owner.name` is `value`, for each (owner, name, value)."""
    former = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(places, former, strict=True):
            setattr(owner, name, original)


def wrap_once(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """From now on `owner.name` is `make(original)`; a second call changes nothing."""
    original = getattr(owner, name)
    if not hasattr(original, _WRAPPED):
        wrapped = functools.wraps(original)(make(original))
        setattr(wrapped, _WRAPPED, True)
        setattr(owner, name, wrapped)


_WRAPPED = "_hf_mics_wrapped"


def replaced_preparation(shard: Prepare, checkpoint_activations: Prepare) -> AbstractContextManager[None]:
    """Inside, `Accelerator._prepare_fsdp2` shards models with `shard` and checkpoints with `checkpoint_activations`.

    Both are called as accelerate calls its own: `(accelerator, model) -> model`. What stays accelerate's is the order
    (checkpointing, compilation, sharding) and the switch of the optimizer to the sharded parameters.
    """
    return replaced(
        (accelerator_module, "fsdp2_prepare_model", shard),
        (accelerator_module, "fsdp2_apply_ac", checkpoint_activations),
    )


def replaced_storage(
    *, writer: Callable[..., Any], planner: Callable[..., Any], reader: Callable[..., Any]
) -> AbstractContextManager[None]:
    """Inside, accelerate's FSDP checkpoint functions use these in place of torch.distributed.checkpoint's.

    Those functions look `FileSystemWriter`, `DefaultSavePlanner` and `FileSystemReader` up there on every call.
    """
    return replaced(
        (dcp, "FileSystemWriter", writer),
        (default_planner, "DefaultSavePlanner", planner),
        (dcp, "FileSystemReader", reader),
    )


def loading_each_module_once() -> AbstractContextManager[None]:
    """Inside, accelerate loads a model's full state by the first name of every module.

    torch 2.13 does not find the others: those of T5's shared embeddings, of the buffers that VeRA's layers share, of
    the embeddings of a model with a trained prompt.
    """
    former = fsdp_utils._set_model_state_dict

    def set_state(model: nn.Module, state: dict[str, Any], adapter_only: bool = False, sd_options: Any = None) -> Any:
        first = {id(module): name for name, module in model.named_modules()}
        every = model.named_modules(remove_duplicate=False)
        others = tuple(f"{without_wrappers(name)}." for name, module in every if first[id(module)] != name)
        if others and sd_options is not None and sd_options.full_state_dict:
            state = {name: value for name, value in state.items() if not name.startswith(others)}
            sd_options = replace(sd_options, strict=False)
        return former(model, state, adapter_only=adapter_only, sd_options=sd_options)

    return replaced((fsdp_utils, "_set_model_state_dict", set_state))


def loading_no_empty_groups() -> AbstractContextManager[None]:
    """Inside, accelerate loads an optimizer without its groups that hold no parameter; they stay as they are.

    A Trainer makes such groups where no parameter is subject to weight decay: biases or layer norms alone. torch 2.13
    loads one of them, loses its settings, for which the next step asks, and refuses two.
    """
    former = dcp_state.set_optimizer_state_dict

    def set_state(model: nn.Module, optimizers: Any, optim_state_dict: Any, **options: Any) -> None:
        groups = list(optimizers.param_groups)
        optimizers.param_groups[:] = [group for group in groups if group["params"]]
        # Full state is on rank 0 alone.
        if optim_state_dict:
            loaded = [group for group in optim_state_dict["param_groups"] if group["params"]]
            optim_state_dict = {**optim_state_dict, "param_groups": loaded}
        try:
            former(model, optimizers, optim_state_dict, **options)
        finally:
            for place, group in enumerate(groups):
                if not group["params"]:
                    optimizers.param_groups.insert(place, group)

    return replaced((dcp_state, "set_optimizer_state_dict", set_state))


def changed_full_state(change: Callable[[dict[str, Any]], dict[str, Any]]) -> AbstractContextManager[None]:
    """Inside, accelerate saves what `change` makes of a model's full state."""
    former = fsdp_utils._get_model_state_dict

    def get_state(model: nn.Module, adapter_only: bool = False, sd_options: Any = None) -> Any:
        state = former(model, adapter_only=adapter_only, sd_options=sd_options)
        return change(state) if sd_options is not None and sd_options.full_state_dict else state

    return replaced((fsdp_utils, "_get_model_state_dict", get_state))


CHECKPOINT_FUNCTIONS = ("save_fsdp_model", "save_fsdp_optimizer", "load_fsdp_model", "load_fsdp_optimizer")


def run_checkpoint_functions_inside(around: Callable[..., Any], module: ModuleType) -> None:
    """From now on the FSDP checkpoint functions that `module` has imported from accelerate run as `around` says.

    `around(original, plugin, accelerator, *rest)` is called for accelerators that know MiCS; others see no difference.
    """

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(plugin: Any, accelerator: Any, *rest: Any, **options: Any) -> Any:
            if not getattr(accelerator, "knows_mics", False):
                return original(plugin, accelerator, *rest, **options)
            return around(original, plugin, accelerator, *rest, **options)

        return wrapped

    for name in CHECKPOINT_FUNCTIONS:
        wrap_once(module, name, wrap)


def prepare_beside_sharded(accelerator: Accelerator, model: nn.Module, *args: Any) -> tuple[Any, ...]:
    """`Accelerator._prepare_fsdp2` for a model that it has sharded before, whose optimizer has the sharded parameters.

    Accelerate would look for the optimizer's parameters by address, where parameters that an evaluation has left
    gathered are missing, and empty shards are all alike.
    """
    for optimizer in (arg for arg in args if isinstance(arg, torch.optim.Optimizer)):
        give_sharded_parameters(optimizer, model)
    first = [arg if arg is model else accelerator._prepare_one(arg, first_pass=True) for arg in args]
    result = tuple(arg if arg is model else accelerator._prepare_one(arg) for arg in first)
    if model not in accelerator._models:
        accelerator._models.append(model)
    return result


@contextlib.contextmanager
def known_for_evaluation(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Inside, `accelerator` knows of `model`, which computes in mixed precision unless it is sharded; then no more.

    A Trainer prepares what its accelerator does not know of. Left behind, the mark that a model is prepared would have
    it trained as it is later.
    """
    names = ("forward", "_original_forward", "_is_accelerate_prepared")
    former = {name: vars(model)[name] for name in names if name in vars(model)}
    if is_root(model):
        accelerator._models.append(model)
    else:
        accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    try:
        yield
    finally:
        accelerator._models.remove(model)
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(former)


class Prepared(NamedTuple):
    """What an Accelerator has prepared, each kind in the order of `prepare`."""

    models: list[nn.Module]
    optimizers: list[Any]
    schedulers: list[Any]
    loaders: list[Any]


def prepared(accelerator: Any) -> Prepared:
    """The lists of `accelerator`, which grow when it prepares more."""
    return Prepared(accelerator._models, accelerator._optimizers, accelerator._schedulers, accelerator._dataloaders)


def give_sharded_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Makes an `optimizer` that was made while parameters of `model` were gathered train the sharded ones.

    An evaluation without MiCS leaves the root's gathered, which no gradient reaches.
    """
    sharded = {found: param for unit in find_units(model) for found, param in unit.sharded_of.items()}
    give_parameters(optimizer, [[sharded.get(id(p), p) for p in g["params"]] for g in optimizer.param_groups])


def give_parameters(optimizer: torch.optim.Optimizer, of_groups: Iterable[list[nn.Parameter]]) -> None:
    """Makes `optimizer` train other parameters, given by group, and forget the state of those that it has no more.

    Adagrad makes state in its constructor: left there, it keeps the unsharded model in memory, and no checkpoint can
    name it. For the new parameters it makes the same again in its first step (torch 2.11's does not).
    """
    for group, params in zip(optimizer.param_groups, of_groups, strict=True):
        group["params"] = params
    trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for key in [key for key in optimizer.state if isinstance(key, torch.Tensor) and id(key) not in trained]:
        del optimizer.state[key]
    make_state_again(optimizer)


def start_process_state(cpu: bool, **init_kwargs: Any) -> PartialState:
    """Joins the job as accelerate would, and makes its FSDP path reachable without accelerators and with one process.

    Accelerate turns FSDP on for MULTI_GPU and other accelerators, never for MULTI_CPU or a lone process. Called before
    `AcceleratorState` exists, this keeps the whole of accelerate's own path, mixed precision included; later it
    would be undone, because AcceleratorState copies PartialState.
    """
    cpu = cpu or not torch.accelerator.is_available()
    join_launched_job(cpu, **init_kwargs)
    state = PartialState(cpu, **init_kwargs)
    if state.distributed_type == DistributedType.NO:
        if not dist.is_initialized():
            backend = "gloo" if state.device.type == "cpu" else "nccl"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        PartialState._shared_state.update(backend=dist.get_backend(), distributed_type=DistributedType.MULTI_GPU)
    elif state.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return state


def join_launched_job(cpu: bool = True, **init_kwargs: Any) -> None:
    """Joins the job of the launcher if accelerate took this process for a lone one.

    `PartialState()` without `cpu=True`, which TrainingArguments calls, does so on a machine without accelerators.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and PartialState._shared_state.get("distributed_type") == DistributedType.NO:
        PartialState._reset_state()
        PartialState(cpu, **init_kwargs)


def leave_mics_state() -> None:
    """Lets accelerate's own Accelerator start anew after one under MiCS, whose plugin it would refuse.

    TrainingArguments resets accelerate's state too, when it is made.
    """
    if not getattr(type(active_fsdp_plugin()), "knows_mics", False):
        return
    AcceleratorState._reset_state()
    if PartialState().device.type == "cpu":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


@contextlib.contextmanager
def unchanged_fsdp_switch() -> Iterator[None]:
    """Inside, an Accelerator may turn FSDP on for itself, as one with an FSDP plugin does through the environment.

    Left on, it would shard the models of accelerators that bring no plugin later.
    """
    former = os.environ.get("ACCELERATE_USE_FSDP")
    try:
        yield
    finally:
        if former is None:
            os.environ.pop("ACCELERATE_USE_FSDP", None)


def is_switched_on(variable: str) -> bool:
    """Whether the launcher has set this ACCELERATE_USE_... to true."""
    return os.environ.get(variable, "false").lower() == "true"


def accelerate_is_initialized() -> bool:
    """Whether an Accelerator was created before in this process."""
    return bool(AcceleratorState._shared_state)


def active_fsdp_plugin() -> Any:
    """The FSDP plugin of the Accelerator that was created before, or None."""
    return AcceleratorState._shared_state.get("fsdp_plugin")


def called_from_stock_init(depth: int) -> bool:
    """Whether the function `depth` frames up is `__init__` of an Accelerator that does not know MiCS."""
    frame = sys._getframe(depth + 1)
    if frame.f_code is not StockAccelerator.__init__.__code__:
        return False
    return not getattr(frame.f_locals["self"], "knows_mics", False)


def keeps_cache_out_of_recomputation(layer: nn.Module) -> bool:
    """Whether a layer of transformers' takes care of its key-value cache itself when it is checkpointed."""
    return getattr(layer, "_can_checkpoint_with_cache", False)


def replace_accelerator(replacement: type[Accelerator]) -> None:
    """Makes `from accelerate import Accelerator` yield `replacement`, for modules imported before and after."""
    accelerate.Accelerator = replacement
    accelerator_module.Accelerator = replacement
    for name, module in list(sys.modules.items()):
        if not name.startswith("hf_mics") and getattr(module, "__dict__", {}).get("Accelerator") is StockAccelerator:
            module.__dict__["Accelerator"] = replacement
