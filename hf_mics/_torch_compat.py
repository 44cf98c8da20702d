"""Where does the engine touch private names of torch? Here alone, checked on torch 2.11.0, 2.12.1, 2.13.0 and 2.14.1.

FSDP2's public seams (`set_custom_all_gather`, `set_custom_reduce_scatter`, `set_requires_all_reduce`) say how to
communicate, but not what a unit holds between micro-steps. `Unit` names the few facts that the two-hop schedule needs.
A torch that lacks one of FSDP2's names (`_torch_names`) fails at attach time, with its version in the message.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import DTensor
from torch.distributed.utils import _apply_to_tensors

from hf_mics._torch_names import check_group, check_state
from hf_mics.errors import ConfigError, MiCSError

# torch 2.13 renamed the two calls; those before it have only the old names, which 2.13 keeps as aliases that
# CommDebugMode and other counters no longer see.
all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Unit:
    """One FSDP2 communication unit: the parameters of a module that are gathered and reduced together."""

    def __init__(self, module: FSDPModule, group: Any, name: str) -> None:
        check_group(group)
        self.module = module
        self.name = name
        self._group = group
        self._params = list(group.fsdp_params)

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def mesh(self) -> DeviceMesh:
        """The mesh that the unit was sharded on."""
        return self._group.mesh_info.mesh

    @property
    def mesh_axes(self) -> tuple[int | None, int | None]:
        """(replicate, shard) axes of `mesh`; None where the unit has no such axis."""
        info = self._group.mesh_info
        return info.replicate_mesh_dim, info.shard_mesh_dim

    @property
    def device(self) -> torch.device:
        """Where the unit computes."""
        return self._group.device

    @property
    def sharded_params(self) -> list[nn.Parameter]:
        """The sharded parameters, in the order in which their gradients are packed."""
        return [param.sharded_param for param in self._params]

    @property
    def sharded_of(self) -> dict[int, nn.Parameter]:
        """The sharded parameters, by the id of what the module holds in their place while they are gathered."""
        return {id(p._unsharded_param): p.sharded_param for p in self._params if hasattr(p, "_unsharded_param")}

    @property
    def trainable(self) -> frozenset[int]:
        """Indices into `sharded_params` that require a gradient."""
        return frozenset(i for i, p in enumerate(self._params) if p.sharded_param.requires_grad)

    @property
    def frees_after_forward(self) -> bool:
        """Whether parameters are gathered a second time for backward."""
        # Unless the user said otherwise, the root keeps its parameters; FSDP2 settles that in the first forward only.
        if self._is_root and self.module._get_fsdp_state()._auto_reshard_after_forward:
            return False
        return self._group._reshard_after_forward

    @property
    def is_gathered(self) -> bool:
        """Whether the module holds whole parameters now."""
        return self._group.is_unsharded

    @property
    def gathered_addresses(self) -> set[int]:
        """Where the gathered parameters are stored."""
        addresses = [_address(param._unsharded_param) for param in self._params]
        return {address for address in addresses if address is not None}

    @property
    def _is_root(self) -> bool:
        return not without_wrappers(self.name)

    def shard_numel(self, index: int) -> int:
        """Elements of one padded shard of parameter `index`, as packed into the reduce-scatter."""
        return self._params[index].padded_sharded_param_size.numel()

    def shard_view(self, index: int, flat: torch.Tensor) -> torch.Tensor:
        """Parameter `index`'s unpadded shard as a view into `flat`, its padded part of a packed buffer."""
        param = self._params[index]
        return flat.as_strided(param.sharded_size, param.contiguous_sharded_stride)

    def as_sharded(self, index: int, local: torch.Tensor) -> DTensor:
        """`local` as a DTensor placed like parameter `index`."""
        return self._params[index].to_sharded_dtensor(local)

    def gather_dtype(self, index: int) -> torch.dtype:
        """The dtype in which parameter `index` travels when gathered."""
        return self._group.mp_policy.param_dtype or self._params[index].sharded_param.dtype

    def unevenly_held(self) -> dict[int, str]:
        """Names of parameters whose shards are padded on some rank, by the id of what their module holds now."""
        found = {}
        for param in self._params:
            info = param._module_info
            if param._orig_size[0] % self.mesh.size(self.mesh_axes[1]):
                found[id(getattr(info.module, info.param_name))] = info.param_name
        return found

    def held(self) -> list[int]:
        """Ids of what the modules hold now for each parameter; twice the same if it was tied after sharding."""
        return [id(getattr(param._module_info.module, param._module_info.param_name)) for param in self._params]

    # -- dtypes ----------------------------------------------------------------------------------------------------

    @property
    def stock_reduce_dtype(self) -> torch.dtype:
        """The dtype in which FSDP2 alone would reduce this unit's gradients."""
        policy = self._group.mp_policy
        own = [self._params[i].sharded_param.dtype for i in sorted(self.trainable)]
        return policy.reduce_dtype or policy.param_dtype or (own[0] if own else torch.float32)

    def reduce_in(self, dtype: torch.dtype) -> Any:
        """Makes FSDP2 hold and add up this unit's gradients in `dtype`; returns the former policy for `restore`."""
        former = self._group.mp_policy
        self._set_policy(replace(former, reduce_dtype=dtype))
        return former

    def _set_policy(self, policy: Any) -> None:
        self._group.mp_policy = policy
        # Parameters cache their dtypes in lazy_init, at the first forward, and reread them from the policy then.
        # A model that already ran needs the reread now.
        if hasattr(self._group, "_reduce_dtype"):
            self._group._init_mp_dtypes()

    # -- hop 2 -----------------------------------------------------------------------------------------------------

    @property
    def replication_group(self) -> dist.ProcessGroup:
        """The process group of the all-reduce."""
        return self._group.mesh_info.replicate_process_group

    @replication_group.setter
    def replication_group(self, group: dist.ProcessGroup) -> None:
        self._group.mesh_info.replicate_process_group = group

    @property
    def all_reduces(self) -> bool:
        """Whether the next backward ends in hop 2."""
        return self._group.all_reduce_grads

    @all_reduces.setter
    def all_reduces(self, value: bool) -> None:
        self._group.all_reduce_grads = value

    @property
    def reduces(self) -> bool:
        """Whether the next backward reduces at all."""
        return self._group.reduce_grads

    @reduces.setter
    def reduces(self, value: bool) -> None:
        self._group.reduce_grads = value

    @property
    def partial_sum(self) -> torch.Tensor | None:
        """Gradients of earlier micro-steps, reduced inside the partition group only; packed, one shard."""
        return self._group._partial_reduce_output

    @partial_sum.setter
    def partial_sum(self, value: torch.Tensor | None) -> None:
        if value is not None and value.device.type != "cpu":
            # FSDP2 adds to it in the reduce-scatter stream, and may drop it while that addition is still queued.
            value.record_stream(self._group.comm_ctx.reduce_scatter_stream)
        self._group._partial_reduce_output = value

    def wait_for_partial_sum(self) -> None:
        """Orders the current stream after the reduction that writes the partial sum."""
        event = getattr(self._group, "_post_reduce_event", None)
        if event is not None:
            self._group.device_handle.current_stream().wait_event(event)

    @property
    def hop2_averages(self) -> bool:
        """Whether hop 2 is a plain average; a custom divide factor or forced sums make it a sum."""
        return self._group.gradient_divide_factor is None and not self._group.force_sum_reduction_for_comms

    @property
    def reads_hop2_late(self) -> bool:
        """Whether, on CPUs, nothing reads what hop 2 returns before the end of backward.

        FSDP2 then only makes views of it. It reads it at once to divide it (fp16, fp64, custom factors), to cast it, to
        add it to a gradient that is there already, to move it, or for a hook. A parameter that was tied after sharding
        has two places in the result, of which the second is added to the first.
        """
        group, dtype = self._group, getattr(self._group, "_reduce_dtype", None)
        return (
            self.device.type == "cpu"
            and self.hop2_averages
            and dtype in (torch.float32, torch.bfloat16)
            and group._orig_dtype in (None, dtype)
            and group._all_reduce_hook is None
            and not any(param.offload_to_cpu for param in self._params)
            and all(param.sharded_param.grad is None for param in self._params)
            and len({id(param.sharded_param) for param in self._params}) == len(self._params)
            and not any(getattr(p.sharded_param, "_post_accumulate_grad_hooks", None) for p in self._params)
        )

    def gradient_tensors(self) -> list[torch.Tensor]:
        """Every gradient that the unit holds now: unsharded, partly reduced, or finished; views may share storage."""
        held = [self.partial_sum] if self.partial_sum is not None else []
        for param in self._params:
            unsharded = getattr(param, "_unsharded_param", None)
            finished = param.sharded_param.grad
            held += [g for g in (param.unsharded_accumulated_grad, getattr(unsharded, "grad", None)) if g is not None]
            held += [finished.to_local()] if isinstance(finished, DTensor) else []
        return held

    # -- backward --------------------------------------------------------------------------------------------------

    def params_with_gradient(self) -> frozenset[int]:
        """Indices of parameters for which autograd has left an unsharded gradient."""
        return frozenset(
            i
            for i, param in enumerate(self._params)
            if hasattr(param, "_unsharded_param")
            and (param.unsharded_accumulated_grad is not None or param._unsharded_param.grad is not None)
        )

    def add_zero_gradients(self, indices: frozenset[int]) -> None:
        """Gives the parameters `indices` an unsharded gradient of zeros, so that they take part in the reduction."""
        for i in indices:
            # zeros_like reads sizes and dtype only: the unsharded storage may have been freed already.
            self._params[i].unsharded_accumulated_grad = torch.zeros_like(self._params[i]._unsharded_param)

    @property
    def has_unsharded_gradients(self) -> bool:
        """Whether autograd has left gradients on gathered parameters, which post-backward has not taken from there."""
        return any(getattr(getattr(p, "_unsharded_param", None), "grad", None) is not None for p in self._params)

    def forget_unsharded_gradients(self) -> None:
        """Drops what a backward that raised has left on unsharded parameters; no `zero_grad()` reaches it there."""
        for param in self._params:
            param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None

    def wrap_post_backward(self, wrapper: Callable[[Callable[..., None]], None]) -> None:
        """Calls `wrapper(original)` wherever FSDP2 would call this unit's post-backward."""
        original = self._group.post_backward

        def post_backward(*unused: Any) -> None:
            wrapper(original)

        self._group.post_backward = post_backward

    def post_backward(self) -> None:
        """Runs this unit's post-backward once more, wrapper included."""
        self._group.post_backward()

    def unwrap_post_backward(self) -> None:
        """Undoes `wrap_post_backward`."""
        self._group.__dict__.pop("post_backward", None)

    def finish_late_reduction(self) -> None:
        """Waits for a reduction that was issued after FSDP2's own end of backward."""
        self._group.finalize_backward()
        context = self._group.comm_ctx
        current = self._group.device_handle.current_stream()
        several = hasattr(context, "reduce_scatter_states")  # torch 2.11 keeps one
        states = context.reduce_scatter_states if several else [context.reduce_scatter_state]
        for state in states:
            if state is not None and state.event is not None:
                current.wait_event(state.event)
        states.clear()
        if not several:
            context.reduce_scatter_state = None
        self._group._training_state = type(self._group._training_state).IDLE

    @property
    def reduce_scatter(self) -> Any:
        """What reduces this unit's gradients inside the partition group now."""
        return self._group._reduce_scatter_comm

    # -- undo ------------------------------------------------------------------------------------------------------

    def restore(self, policy: Any, group: dist.ProcessGroup, comms: tuple[Any, Any]) -> None:
        """Puts back what `reduce_in`, `replication_group` and `set_comms` replaced."""
        self._set_policy(policy)
        self.replication_group = group
        self._group._all_gather_comm, self._group._reduce_scatter_comm = comms

    def set_comms(self, all_gather: AllGather, reduce_scatter: ReduceScatter) -> tuple[Any, Any]:
        """Installs the collectives through FSDP2's public setters; returns the former pair."""
        former = self._group._all_gather_comm, self._group._reduce_scatter_comm
        self.module.set_custom_all_gather(all_gather)
        self.module.set_custom_reduce_scatter(reduce_scatter)
        return former


def find_units(model: nn.Module) -> Iterator[Unit]:
    """Every communication unit of a model that was sharded with `fully_shard`, in module order."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        check_state(state)
        groups = _groups_of(state)
        if len(groups) > 1:
            raise ConfigError(
                f"{name or type(module).__name__} holds {len(groups)} FSDP2 parameter groups on different meshes "
                "(shard_placement_fn); hf_mics needs one group and one mesh per module. Shard the module without "
                "per-parameter meshes."
            )
        for group in groups:
            if id(group) not in seen:
                seen.add(id(group))
                yield Unit(module, group, name)


def _groups_of(state: Any) -> list[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # torch 2.11


def is_root(model: nn.Module) -> bool:
    """Whether `model` itself, under `torch.compile` or not, was passed to `fully_shard`."""
    # FSDP2 shards either the compiled module or the one inside it.
    return isinstance(model, FSDPModule) or isinstance(plain(model), FSDPModule)


def class_before_sharding(module: FSDPModule) -> type:
    """The class that `fully_shard` replaced by one of its own."""
    kind = type(module)
    return kind.__mro__[kind._orig_cls_mro_index]


# Where activation checkpointing and torch.compile keep the module that they wrap.
_WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod")


def plain(module: nn.Module) -> nn.Module:
    """The user's module inside activation-checkpoint and compile wrappers."""
    for attribute in _WRAPPED:
        module = getattr(module, attribute, module)
    return module


def is_wrapped(name: str) -> bool:
    """Whether the module called `name` is the one inside a wrapper."""
    return name.rpartition(".")[2] in _WRAPPED


def without_wrappers(name: str) -> str:
    """The `name` that a module would have without any wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def device_and_dtype(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """What the arguments of `module.to(...)` ask for."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype


def override_method(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Makes `module.name(...)` call `function(module, ...)`, on this instance alone.

    Written into `__dict__` because `torch.compile`'s OptimizedModule forwards plain attribute writes to the module
    inside it, where FSDP2's class method would win again.
    """
    module.__dict__[name] = types.MethodType(function, module)


def remove_override(module: nn.Module, name: str) -> None:
    """Undoes `override_method`."""
    module.__dict__.pop(name, None)


def collective_of(work: dist.Work) -> str:
    """Which collective a Work belongs to: all_gather, reduce_scatter, all_reduce, exchange (of slices) or other."""
    name = cast(Any, torch._C._distributed_c10d).OpType(cast(Any, work)._get_op_type()).name
    return next((collective for part, collective in _COLLECTIVES.items() if part in name), "other")


_COLLECTIVES = {
    "ALLGATHER": "all_gather",
    "REDUCE_SCATTER": "reduce_scatter",
    "SEND": "exchange",
    "RECV": "exchange",
    "UNKNOWN": "reduce_scatter",  # gloo leaves its reduce-scatter unnamed
    "ALLREDUCE": "all_reduce",
}


def inherit_timeout(groups: Iterable[dist.ProcessGroup], device: torch.device) -> None:
    """Gives `groups` the timeout of the job's own group, which the user chose.

    torch gives every subgroup the backend's default instead (gloo 30 minutes, NCCL 10), those of a DeviceMesh included:
    a job whose timeout is a minute would wait half an hour for a node that lost its power.
    """
    timeout = _timeout(dist.distributed_c10d._get_default_group(), device)
    for group in groups:
        if timeout is not None and _timeout(group, device) not in (None, timeout):
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def _timeout(group: dist.ProcessGroup, device: torch.device) -> Any:
    try:
        # A fake group and other backends have no options.
        return group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):
        return None


def gradient_hooks(param: nn.Parameter) -> list[Callable[..., Any]]:
    """What was handed to `register_hook` of the parameter, and not removed since."""
    return list((param._backward_hooks or {}).values())


def make_state_again(optimizer: torch.optim.Optimizer) -> None:
    """Makes the state that torch 2.11's Adagrad makes in its constructor alone, for parameters that have none."""
    if not isinstance(optimizer, torch.optim.Adagrad) or "full_like" in optimizer._init_group.__code__.co_names:
        return
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param not in optimizer.state:
                total = torch.full_like(param, group["initial_accumulator_value"])
                optimizer.state[param] = {"step": torch.tensor(0.0), "sum": total}


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread."""
    return torch._C._current_graph_task_id() != -1


def unfinished_pass(model: nn.Module) -> Literal["forward", "backward"] | None:
    """Which pass through `model` has begun and not ended; asked outside of both, the one that raised."""
    context = cast(Any, model)._get_fsdp_state()._state_ctx
    if context.post_backward_final_callback_queued:
        return "backward"
    return "forward" if context.iter_forward_root is not None else None


def in_forward_method(model: nn.Module) -> bool:
    """Whether a method of `model` runs for which FSDP2 has begun a forward, such as an encoder-decoder's `generate`."""
    # When such a method calls the model's forward, the stack alone tells it from one that raised.
    return _running(model, _forward_methods()) > 0


def passes_running(model: nn.Module) -> int:
    """How many calls of `model`, and of methods for which FSDP2 has begun a forward, run now, one inside the other."""
    return _running(model, [cast(Any, nn.Module)._call_impl.__code__, *_forward_methods()])


def after_forward_methods(model: nn.Module, callback: Callable[[Any], Any]) -> None:
    """Lets `callback` replace what methods return that are registered as forward methods of `model`, now or later."""
    state = cast(Any, model)._get_fsdp_state()
    # Methods look it up in every call; the model's own forward has taken hold of it as a hook.
    post_forward = state._post_forward
    state._post_forward = lambda module, args, output: callback(post_forward(module, args, output))


def _forward_methods() -> list[types.CodeType]:
    return [code for code in register_fsdp_forward_method.__code__.co_consts if isinstance(code, types.CodeType)]


def _running(model: nn.Module, methods: list[types.CodeType]) -> int:
    """How many calls of `methods` of the `model` are on the stack."""
    found = 0
    frame = inspect.currentframe()
    while frame is not None:
        found += frame.f_code in methods and frame.f_locals.get("self") in (model, plain(model))
        frame = frame.f_back
    return found


def copy_from(output: Any, addresses: set[int]) -> Any:
    """What a forward returns, with copies of the tensors that lie in the storages at `addresses`.

    Looks where FSDP2 does: in tuples, lists, dicts, ModelOutputs and dataclasses.
    """
    left = [output]
    while left:
        each = left.pop()
        if isinstance(each, torch.Tensor):
            if _address(each) in addresses:
                return _apply_to_tensors(lambda t: t.clone() if _address(t) in addresses else t, output)
        elif isinstance(each, dict):
            left += each.values()
        elif isinstance(each, list | tuple | set):
            left += each
        elif is_dataclass(each) and not isinstance(each, type):
            left += [getattr(each, field.name) for field in fields(each)]
    return output


def _address(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr() or None
    except RuntimeError:  # a sparse one has no storage
        return None


def reset_after_error(model: nn.Module) -> None:
    """Lets FSDP2 forget a forward or backward that raised; partial sums are lost.

    Raises:
        MiCSError: this torch cannot (`reset_iter_state` came with 2.13).
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise MiCSError(
            f"a forward or backward raised, and torch {torch.__version__} cannot start again after that. Install torch "
            "2.13 or 2.14, whose FSDPModule has reset_iter_state, or let the error end the job."
        )
    # Not `model.reset_iter_state()`: a schedule puts its own method there, which calls this function.
    FSDPModule.reset_iter_state(cast(FSDPModule, model))


def after_backward(model: nn.Module, callback: Callable[[], None]) -> Callable[[], None]:
    """Calls `callback` after FSDP2's own end of every backward through `model`; returns the undo.

    FSDP2 queues that end on the outermost backward. A callback of ours would be queued inside a reentrant checkpoint's
    inner backward and run before the outer layers have reduced.
    """
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]

    def wrap(state: Any) -> None:
        original = state._root_post_backward_final_callback

        def end_backward() -> None:
            original()
            callback()

        state._root_post_backward_final_callback = end_backward

    for state in states:
        wrap(state)

    def undo() -> None:
        for state in states:
            state.__dict__.pop("_root_post_backward_final_callback", None)

    return undo


def default_store() -> dist.Store:
    """The store through which the job's ranks met."""
    return dist.distributed_c10d._get_default_store()


def job_store() -> dist.Store | None:
    """A connection of its own to the store through which the job's ranks met; None if that is not a TCPStore."""
    store = default_store()
    base = store
    while isinstance(base, dist.PrefixStore):
        base = base.underlying_store
    return dist.PrefixStore("hf_mics", cast(Any, base).clone()) if isinstance(base, dist.TCPStore) else None


def coalesced(group: dist.ProcessGroup) -> AbstractContextManager[Any]:
    """Turns the all-gathers (or reduce-scatters) issued inside into one launch on `group`."""
    return dist.distributed_c10d._coalescing_manager(group=group)


def premul_factor(op: Any) -> float | None:
    """The factor of a PREMUL_SUM, FSDP2's reduction under `set_gradient_divide_factor`; None for other operations."""
    if isinstance(op, dist.ReduceOp) and op == dist.ReduceOp.PREMUL_SUM:
        _, factor = cast(tuple[Any, float], op.__getstate__())
        return factor
    return None
