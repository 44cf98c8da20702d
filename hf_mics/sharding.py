"""How does an ordinary model become a sharded one, with rank 0's weights on every rank?

Takes the place of accelerate's `fsdp2_prepare_model` and `fsdp2_apply_ac` while a model is prepared. What differs from
them: the choice of units (`wrapping.py`); buffers, persistent ones included, are carried along; every rank gets rank
0's weights, as under DistributedDataParallel, where stock FSDP2 would train a mixture of differently seeded models;
and activation checkpointing keeps the random state, so that dropout is the same in the recomputation.
"""

from __future__ import annotations

import hashlib
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import (
    fsdp2_canonicalize_names,
    fsdp2_prepare_auto_wrap_policy,
    get_parameters_from_modules,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_mics._hf_compat import keeps_cache_out_of_recomputation
from hf_mics._torch_compat import class_before_sharding, in_backward, is_root, plain
from hf_mics.admission import check_model
from hf_mics.errors import ConfigError
from hf_mics.process_groups import say_to_all
from hf_mics.wrapping import WrapPlan, holds_input_embeddings, plan_units


def unit_plan(plugin: Any, model: nn.Module) -> WrapPlan:
    """The units that `plugin`, an accelerate FSDP plugin, asks for or that are found in `model`."""
    policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
    # A size of 0, which a config without one gives, is no policy to accelerate either.
    if policy is size_based_auto_wrap_policy and plugin.min_num_params:
        return plan_units(model, policy=fsdp2_prepare_auto_wrap_policy(plugin, model))
    plan = plan_units(model, class_names=plugin.transformer_cls_names_to_wrap or ())
    if policy not in (None, transformer_auto_wrap_policy, size_based_auto_wrap_policy):
        name = getattr(policy, "__name__", policy)
        plan.reason += f"; auto_wrap_policy {name} is ignored, as by accelerate's FSDP2"
    return plan


def checkpoint_activations(accelerator: Any, model: nn.Module) -> nn.Module:
    """Wraps every layer that will be a unit so that its activations are recomputed in backward."""
    plugin = accelerator.state.fsdp_plugin
    for name, layer in unit_plan(plugin, model).layers:
        if holds_input_embeddings(model, layer):
            continue
        wrapped = checkpoint_wrapper(layer, preserve_rng_state=True)
        if not keeps_cache_out_of_recomputation(layer):
            wrapped.register_forward_pre_hook(_without_cache, with_kwargs=True)
        if plugin.activation_checkpointing_offload:
            wrapped = offload_wrapper(wrapped)
        model.set_submodule(name, wrapped)
    return model


def _without_cache(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Drops the key-value cache, which transformers makes in training too: the recomputation would append to it again.

    T5, Bloom and others fail then. transformers' own gradient checkpointing drops it likewise.
    """
    if not layer.training:
        return None
    kept = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
    if kept.get("use_cache"):
        kept["use_cache"] = False
    return tuple(None if _is_cache(value) else value for value in args), kept


def _is_cache(value: Any) -> bool:
    """Whether `value` is a `transformers.Cache`, told without importing transformers."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def shard_model(accelerator: Any, model: nn.Module) -> nn.Module:
    """Shards `model` in place over accelerate's mesh and gives every rank rank 0's weights and buffers.

    Parameters may be on the meta device on every rank but 0. Trainable parameters become fp32 under mixed precision.

    Raises:
        ConfigError: a named layer class does not occur, or rank 0 itself has no weights.
    """
    if is_root(model):
        keep_class_name(model)
        return model
    plugin = accelerator.state.fsdp_plugin
    if accelerator.mixed_precision != "no":
        _upcast_trainable(model)
    _check_weights_exist(model)
    ignored = _ignored_parameters(plugin, model, accelerator.device)
    _widen_scalars(model, ignored)
    weights = _values_of_rank_0(model)
    _fully_shard(accelerator, model, ignored)
    offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    _spread_from_rank_0(model, weights, accelerator.device, torch.device("cpu") if offload else accelerator.device)
    return model


def _fully_shard(accelerator: Any, model: nn.Module, ignored: set[nn.Parameter]) -> None:
    plugin = accelerator.state.fsdp_plugin
    plan = unit_plan(plugin, model)
    common = {
        "mesh": accelerator.torch_device_mesh["dp_replicate", "dp_shard"],
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload,
        "ignored_params": ignored,
    }
    for _, module in plan.layers + plan.embeddings:
        fully_shard(module, reshard_after_forward=plugin.reshard_after_forward, **common)
    for _, module in plan.heads:
        fully_shard(module, reshard_after_forward=False, **common)
    fully_shard(model, **common)
    if plan.heads:
        _gather_heads_beside(plan.layers[-1][1], [head for _, head in plan.heads])
    keep_class_name(model)
    plugin.wrap_report = (plan.describe(), *plan.skipped)


def _gather_heads_beside(layer: Any, heads: list[Any]) -> None:
    """Lets the heads be gathered beside the last `layer`, for models that use a head's weight and never call the head.

    TRL computes the loss from `lm_head.weight`. Of a weight that is sharded then, every rank would train its shard on
    its own rows alone, and replicas would drift apart.
    """

    @torch.compiler.disable  # as FSDP2's own hooks are
    def wait(*_: Any) -> None:
        # A recomputation would gather a head that is done with, and leave the old weights to the next step.
        if not in_backward():
            for head in heads:
                head.unshard()

    layer.set_modules_to_forward_prefetch(heads)
    layer.register_forward_hook(wait)


def keep_class_name(model: nn.Module) -> None:
    """Calls the class of `model`, which was passed to `fully_shard`, as before that.

    FSDP2 calls it FSDPGPT2LMHeadModel and so on, of a module of torch's. transformers goes by names: its Trainer shifts
    labels under label smoothing for the class names of causal language models, and `save_pretrained` finds a class's
    renamed weights so, and the code of a model that brings its own, instead of which it would save torch's.
    """
    for module in (model, plain(model)):
        if isinstance(module, FSDPModule):
            former = class_before_sharding(module)
            type(module).__name__, type(module).__module__ = former.__name__, former.__module__


def scalar_names(model: nn.Module) -> set[str]:
    """State-dict names of the parameters that had no dimension before sharding gave them one."""
    names = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in _SCALARS.get(module, ())
    ]
    return set(fsdp2_canonicalize_names(dict.fromkeys(names)))


def restore_scalars(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The full `state` of a sharded `model` in the shapes from before sharding, without which nothing can load it.

    Sharding gives parameters without dimensions one. `state` is not changed.
    """
    scalars = scalar_names(model)
    return {key: value.reshape(()) if key in scalars else value for key, value in state.items()}


# Names of the parameters that had no dimension before sharding, by the module that holds them.
_SCALARS: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


def _widen_scalars(model: nn.Module, ignored: set[nn.Parameter]) -> None:
    """Gives parameters without dimensions (CLIP's logit scale) one: fully_shard refuses them.

    One element broadcasts as a scalar does, and the parameter stays the same object, so ties and optimizers hold.
    """
    scalars = {param for param in model.parameters() if param.ndim == 0} - ignored
    for module in model.modules():
        if names := [name for name, param in module.named_parameters(recurse=False) if param in scalars]:
            _SCALARS[module] = names
    for param in scalars:
        param.data = param.data.reshape(1)


def _upcast_trainable(model: nn.Module) -> None:
    for param in model.parameters():
        if param.requires_grad and param.is_floating_point() and param.dtype != torch.float32:
            param.data = param.data.float()


def check_everywhere(model: nn.Module) -> None:
    """Refuses what sharding would lose (`check_model`), and models that differ between ranks; a collective.

    Weights are spread from rank 0 one by one: a rank that holds more or fewer of them would wait for ever.

    Raises:
        ConfigError: on every rank alike.
    """

    def say() -> tuple[int, str]:
        check_model(model)
        tensors = [*model.named_parameters(), *model.named_buffers()]
        described = repr([(name, tuple(tensor.shape)) for name, tensor in tensors])
        return len(tensors), hashlib.sha256(described.encode()).hexdigest()

    everyone = say_to_all(say)
    other = next((rank for rank, said in enumerate(everyone) if said != everyone[0]), None)
    if other is not None:
        raise ConfigError(
            f"ranks hold different {type(model).__name__}s: rank 0 has {everyone[0][0]} parameters and buffers, rank "
            f"{other} has {everyone[other][0]}, or they differ in name or shape. Build the same model on every rank; "
            "weights that are tied on rank 0 must be tied on the others too, which .to('meta') undoes: build on meta "
            "with `with torch.device('meta')`, or call tie_weights() again."
        )


def _check_weights_exist(model: nn.Module) -> None:
    missing = [name for name, param in model.named_parameters() if param.is_meta]
    found: list[Any] = [missing[:3] if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    if found[0]:
        raise ConfigError(
            f"rank 0 has no weights to share: {', '.join(found[0])}, ... are on the meta device. Build or load the "
            "model with real weights on rank 0 (the other ranks may stay on meta)."
        )


def _ignored_parameters(plugin: Any, model: nn.Module, device: torch.device) -> set[nn.Parameter]:
    """Parameters that stay whole on every rank: the user's ignored modules, and quantized ones, which cannot be cut."""
    ignored = get_parameters_from_modules(plugin.ignored_modules, model, device)
    return ignored | {p for p in model.parameters() if not p.is_floating_point() and not p.is_complex()}


def _spread_from_rank_0(
    model: nn.Module, weights: list[torch.Tensor], device: torch.device, home: torch.device
) -> None:
    """Gives every rank its shards of rank 0's `weights` (whole, in the order of `parameters()`), and its buffers.

    One tensor at a time, so that no rank holds more than one whole parameter beside its shards. Tied parameters and
    buffers stay tied; parameters on meta become real on `home`, buffers on `device`.
    """
    made: dict[int, torch.Tensor] = {}
    for param, whole in zip(list(model.parameters()), weights, strict=True):
        value = _broadcast(whole, device)
        if isinstance(param, DTensor):
            value = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None).to_local().clone()
        if param.is_meta:
            made[id(param)] = _materialized(param, value.to(home))
        else:
            (param.to_local() if isinstance(param, DTensor) else param).data.copy_(value)
    for buffer in list(model.buffers()):
        value = _broadcast(buffer, device)
        if buffer.is_meta:
            made[id(buffer)] = value
        else:
            buffer.data.copy_(value)
    for module in model.modules():
        own: list[tuple[str, torch.Tensor]] = [*module.named_parameters(recurse=False, remove_duplicate=False)]
        own += module.named_buffers(recurse=False, remove_duplicate=False)
        for name, tensor in own:
            if id(tensor) in made:
                setattr(module, name, made[id(tensor)])


def share_weights(model: nn.Module, device: torch.device) -> None:
    """Gives every rank rank 0's weights and buffers of a `model` that stays whole on `device`, as sharding does."""
    _check_weights_exist(model)
    _spread_from_rank_0(model, _values_of_rank_0(model), device, device)


def _values_of_rank_0(model: nn.Module) -> list[torch.Tensor]:
    """The weights on rank 0. The other ranks' own values are not needed: their shapes are."""
    here = dist.get_rank() == 0
    return [param.detach() if here else param.detach().to("meta") for param in model.parameters()]


def _broadcast(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if dist.get_rank() == 0:
        value = tensor.detach().to(device).contiguous()
    else:
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    dist.broadcast(value, src=0)
    return value


def _materialized(param: nn.Parameter, local: torch.Tensor) -> nn.Parameter:
    if isinstance(param, DTensor):
        local = DTensor.from_local(
            local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )
    return nn.Parameter(local, requires_grad=param.requires_grad)
