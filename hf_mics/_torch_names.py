"""Which private names of FSDP2's must a torch have for hf_mics to work on it? All that `_torch_compat` reads.

Checked when MiCS is put on a model, so that another torch fails there and not in the middle of a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from hf_mics.errors import MiCSError

# Names that a unit, its parameters and their states have from the moment a model is sharded.
_GROUP_ATTRIBUTES = (
    "fsdp_params",
    "mesh_info",
    "mp_policy",
    "device",
    "device_handle",
    "all_reduce_grads",
    "reduce_grads",
    "gradient_divide_factor",
    "force_sum_reduction_for_comms",
    "post_backward",
    "finalize_backward",
    "comm_ctx",
    "is_unsharded",
    "_all_gather_comm",
    "_reduce_scatter_comm",
    "_all_reduce_hook",
    "_partial_reduce_output",
    "_post_reduce_event",
    "_reshard_after_forward",
    "_training_state",
    "_init_mp_dtypes",
)
_MESH_ATTRIBUTES = ("mesh", "replicate_mesh_dim", "shard_mesh_dim")
_PARAM_ATTRIBUTES = (
    "sharded_param",
    "sharded_size",
    "padded_sharded_param_size",
    "contiguous_sharded_stride",
    "to_sharded_dtensor",
    "unsharded_accumulated_grad",
    "offload_to_cpu",
    "_unsharded_param",
    "_module_info",
    "_orig_size",
)
_STATE_ATTRIBUTES = (
    "_fsdp_param_groups",
    "_post_forward",
    "_root_post_backward_final_callback",
    "_state_ctx",
    "_auto_reshard_after_forward",
)
_CONTEXT_ATTRIBUTES = ("post_backward_final_callback_queued", "iter_forward_root")
# Names that come with the first forward, by the method that sets them.
_LAZY_ATTRIBUTES = {
    "_init_mp_dtypes": ("_orig_dtype", "_reduce_dtype"),
    "lazy_init": ("reduce_scatter_states", "reduce_scatter_stream"),
}
# What torch 2.11 has instead, which holds one at most.
_FORMER_NAMES = {"_fsdp_param_groups": "_fsdp_param_group", "reduce_scatter_states": "reduce_scatter_state"}


def check_group(group: Any) -> None:
    """Checks a parameter group of FSDP2's, fresh or used.

    Raises:
        MiCSError: this torch lacks a name.
    """
    _require(group, "FSDPParamGroup", _GROUP_ATTRIBUTES)
    _require_set_by(group, "FSDPParamGroup", "_init_mp_dtypes")
    _require(group.mesh_info, "DataParallelMeshInfo", _MESH_ATTRIBUTES)
    _require_set_by(group.comm_ctx, "FSDPCommContext", "lazy_init")
    for param in group.fsdp_params:
        _require(param, "FSDPParam", _PARAM_ATTRIBUTES)


def check_state(state: Any) -> None:
    """Checks what FSDP2 keeps of a module.

    Raises:
        MiCSError: this torch lacks a name.
    """
    _require(state, "FSDPState", _STATE_ATTRIBUTES)
    _require(state._state_ctx, "FSDPStateContext", _CONTEXT_ATTRIBUTES)


def _require(thing: Any, kind: str, attributes: tuple[str, ...]) -> None:
    declared = getattr(type(thing), "__annotations__", {})  # _unsharded_param: it has no value yet
    _refuse_missing(kind, attributes, lambda name: hasattr(thing, name) or name in declared)


def _require_set_by(thing: Any, kind: str, method: str) -> None:
    """Checks that `thing.method()`, which the first forward calls, sets what is read after it."""
    _require(thing, kind, (method,))
    named = inspect.unwrap(getattr(type(thing), method)).__code__.co_names
    _refuse_missing(kind, _LAZY_ATTRIBUTES[method], lambda name: name in named)


def _refuse_missing(kind: str, names: tuple[str, ...], has: Callable[[str], bool]) -> None:
    missing = [name for name in names if not has(name) and not has(_FORMER_NAMES.get(name, name))]
    if missing:
        raise MiCSError(
            f"torch {torch.__version__} has no {kind}.{missing[0]}, which two-hop synchronization needs. hf_mics works "
            "on torch 2.11 to 2.14; install one of these."
        )
