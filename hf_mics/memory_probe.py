"""How much memory does a training step of FSDP2 take on one GPU, found by running it without memory?

Two optimizer steps run under fake tensors, which have shapes but no data, on a fake process group, which has ranks but
sends nothing; PyTorch's FSDPMemTracker adds up what would be allocated. A deep model is run at two shallow depths and
extrapolated, phase by phase, because which phase holds the peak depends on the depth.

Left out: the CUDA context and NCCL's own buffers, cuBLAS workspaces, fragmentation of the allocator, buffers that one
stream frees later than another needs them, dropout masks, and whatever the user's script keeps. Attention runs through
a kernel that keeps no matrix of scores, as on GPUs of the Ampere generation or newer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools import mod_tracker
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_mics._torch_compat import (
    AllGather,
    ReduceScatter,
    all_gather_single,
    find_units,
    reduce_scatter_single,
    without_wrappers,
)
from hf_mics.errors import ConfigError
from hf_mics.planning.memory import MEMORY_KINDS, Kind, Memory
from hf_mics.planning.workload import Workload
from hf_mics.probe_models import build_model
from hf_mics.topology import Topology
from hf_mics.wrapping import plan_units

# Layers of each stack in the two runs that are extrapolated. With four, the first, the last and the one before it are
# different layers, and at least one lies between.
SHALLOW, DEEPER = 4, 6

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
_KINDS: dict[str, Kind] = {
    "SHARDED_PARAM": "parameters",
    "SHARDED_GRAD": "gradients",
    "UNSHARDED_GRAD": "gradients",
    "OPT": "optimizer",
    "ACT": "activations",
    "TEMP": "activations",
    "INP": "activations",
    "BUFFER": "activations",
    "UNSHARDED_PARAM": "communication",
    "ALL_GATHER": "communication",
    "REDUCE_SCATTER": "communication",
}

Bytes = dict[Kind, float]
Phases = dict[str, Bytes]
"""The peak of each phase of the last optimizer step, by kind."""


def probe_memory(workload: Workload, topology: Topology, *, hierarchical: bool = True) -> Memory:
    """The peak of `workload` on one GPU, from two or three shallow runs (or one, if the model is shallow).

    FSDPMemTracker counts some gradients of parameters among activations, while they wait to be reduced.

    Raises:
        ConfigError: CPU offload, which the tracker cannot tell from the GPU; or inside a distributed job.
    """
    return _highest(_phases_at_depth(workload, topology, hierarchical=hierarchical))


def probe_partition_sizes(
    workload: Workload, topologies: Sequence[Topology], *, hierarchical: bool = True
) -> dict[int, Memory]:
    """`probe_memory` for several partition sizes.

    What a GPU holds is a constant and a part that is 1 / partition size, but for padding, so sizes between the smallest
    and the largest are interpolated: apart for groups inside a node and for groups that span nodes, whose collectives
    have buffers of their own.

    Raises:
        ConfigError: as `probe_memory`.
    """
    found: dict[int, Memory] = {}
    for spanning in (False, True):
        sizes = {t.partition_size: t for t in topologies if t.is_hierarchical == spanning}
        ends = {
            p: _phases_at_depth(workload, sizes[p], hierarchical=hierarchical)
            for p in sorted({min(sizes), max(sizes)} if sizes else ())
        }
        found |= {p: _highest(_between(ends, p)) for p in sizes}
    return found


def _between(ends: dict[int, Phases], partition_size: int) -> Phases:
    small, large = min(ends), max(ends)
    if small == large:
        return ends[small]
    share = (1 / partition_size - 1 / large) / (1 / small - 1 / large)
    return {
        name: {kind: size + share * (ends[small][name][kind] - size) for kind, size in kinds.items()}
        for name, kinds in ends[large].items()
    }


def _phases_at_depth(workload: Workload, topology: Topology, *, hierarchical: bool) -> Phases:
    """Every phase of the whole model, extrapolated from shallow ones."""
    model = workload.model
    depths = (model.num_layers, model.num_decoder_layers) if model.num_decoder_layers else (model.num_layers,)
    if max(depths) <= DEEPER:
        return track_phases(workload, topology, hierarchical=hierarchical)

    def run(at: tuple[int, ...]) -> Phases:
        return track_phases(workload, topology, hierarchical=hierarchical, depths=at)

    base = tuple(min(depth, SHALLOW) for depth in depths)
    phases = start = run(base)
    for i, depth in enumerate(depths):
        if depth > SHALLOW:
            step = run((*base[:i], DEEPER, *base[i + 1 :]))
            phases = _add_layers(phases, start, step, layers=depth - SHALLOW)
    return phases


def track_phases(
    workload: Workload, topology: Topology, *, hierarchical: bool = True, depths: tuple[int, ...] | None = None
) -> Phases:
    """Tracks a full step of the model, or of one with `depths` layers (per stack).

    Raises:
        ConfigError: as `probe_memory`.
    """
    if workload.cpu_offload:
        raise ConfigError("--probe cannot tell the host's memory from the GPU's: leave out --cpu-offload or --probe.")
    if dist.is_initialized():
        raise ConfigError("a memory probe needs a process of its own: this one is part of a distributed job.")
    with _fake_job(topology) as mesh, FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _build(workload, depths)
        _shard(model, mesh, workload, topology, hierarchical)
        return _run_steps(model, workload)


def _highest(phases: Phases) -> Memory:
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    return Memory(phases[phase], phase)


def _add_layers(phases: Phases, start: Phases, step: Phases, *, layers: int) -> Phases:
    """`phases`, deepened by `layers` more layers of the stack in which `step` is deeper than `start`."""
    per_layer = layers / (DEEPER - SHALLOW)
    return {
        name: {kind: size + per_layer * (step[name][kind] - start[name][kind]) for kind, size in kinds.items()}
        for name, kinds in phases.items()
    }


@contextmanager
def _fake_job(topology: Topology) -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=topology.world_size)
    sizes = (topology.replication_size, topology.partition_size)
    try:
        yield init_device_mesh("cpu", sizes, mesh_dim_names=("dp_replicate", "dp_shard"))
    finally:
        dist.destroy_process_group()


def _build(workload: Workload, depths: tuple[int, ...] | None) -> nn.Module:
    shape = workload.model
    model = build_model(shape, depths or (shape.num_layers, shape.num_decoder_layers))
    if workload.activation_checkpointing:
        for name, layer in plan_units(model).layers:
            model.set_submodule(name, checkpoint_wrapper(layer, preserve_rng_state=True))
    return model


class _Gather(AllGather):
    """The buffers of the engine's all-gather on GPUs; nothing is sent."""

    def __init__(self, topology: Topology, hierarchical: bool) -> None:
        self._staged_nodes = topology.nodes_per_partition if hierarchical and topology.is_hierarchical else 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> Any:
        columns = input_tensor.new_empty(self._staged_nodes * input_tensor.numel())
        work = all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        del columns
        return work


class _Scatter(ReduceScatter):
    """The buffers of the engine's reduce-scatter on GPUs: the input in the wire dtype, the output in fp32."""

    def __init__(self, topology: Topology, hierarchical: bool, wire_dtype: torch.dtype) -> None:
        self._ranks = topology.partition_size
        self._staged_nodes = topology.nodes_per_partition if hierarchical and topology.is_hierarchical else 0
        self._wire_dtype = wire_dtype
        self._numel_in_flight: int | None = None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        numel = int(size[0])
        is_output = numel * self._ranks == self._numel_in_flight
        self._numel_in_flight = None if is_output else numel
        wide = is_output or self._ranks == 1
        return torch.empty(numel, dtype=dtype if wide else self._wire_dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        rows = input_tensor.new_empty(self._staged_nodes * output_tensor.numel())
        reduced = torch.empty_like(output_tensor, dtype=input_tensor.dtype)
        work = reduce_scatter_single(reduced, input_tensor, group=group, op=dist.ReduceOp.SUM, async_op=async_op)
        del rows
        return work


def _shard(model: nn.Module, mesh: DeviceMesh, workload: Workload, topology: Topology, hierarchical: bool) -> None:
    dtype = _DTYPES[workload.precision]
    # The engine adds micro-steps up in fp32 whatever travels.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=dtype)
    plan = plan_units(model)
    for _, module in plan.layers + plan.embeddings:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    for _, module in plan.heads:
        fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for unit in find_units(model):
        unit.set_comms(_Gather(topology, hierarchical), _Scatter(topology, hierarchical, dtype or torch.float32))


def _run_steps(model: nn.Module, workload: Workload) -> Phases:
    optimizer = _optimizer(model, workload)
    ids = torch.zeros(workload.micro_batch, workload.seq_length, dtype=torch.long)
    tracker = _PhaseTracker(model, optimizer)
    tracker.track_inputs((ids,))
    with _hooks_that_keep_no_gradients(), tracker:
        # The first step makes the optimizer state; of the second, two micro-steps stand for any number.
        for micro_steps in (1, min(workload.accumulation, 2)):
            tracker.phases.clear()
            for micro_step in range(micro_steps):
                cast(FSDPModule, model).set_requires_all_reduce(micro_step == micro_steps - 1)
                tracker.reset_mod_stats()
                tracker.phase = "before the layers"
                loss = model(input_ids=ids, labels=ids).loss
                tracker.phase = "loss and head backward"
                loss.backward()
                del loss
                tracker.claim_partial_sums()
            tracker.phase = "optimizer step"
            optimizer.step()
            optimizer.zero_grad()
    return tracker.phases


@contextmanager
def _hooks_that_keep_no_gradients() -> Iterator[None]:
    """Lets the tracker see the end of a module's backward at the gradient of any of its inputs, not of all of them.

    Until the last is there, its hook keeps the others, which nothing else does. In T5 each of the decoder's layers is
    given the encoder's output, whose gradient comes after all of them: one gradient of the bias of positions per layer.
    """
    waiting = mod_tracker.register_multi_grad_hook
    mod_tracker.register_multi_grad_hook = partial(waiting, mode="any")
    try:
        yield
    finally:
        mod_tracker.register_multi_grad_hook = waiting


def _optimizer(model: nn.Module, workload: Workload) -> torch.optim.Optimizer:
    # One tensor at a time, as the fused AdamW that the Trainer takes by default; the tracker needs it so.
    if workload.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), foreach=False)
    momentum = 0.9 if workload.optimizer == "sgd-momentum" else 0.0
    return torch.optim.SGD(model.parameters(), momentum=momentum, foreach=False)


class _PhaseTracker(FSDPMemTracker):
    """Also remembers the peak of each phase: of the head, and of the layers at either end of each stack."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, optimizer)
        self.phase = ""
        self.phases: Phases = {}
        self._totals: dict[str, int] = {}
        self._model = model
        self._names = {id(module): label for label, module in _labelled_layers(model)}

    def claim_partial_sums(self) -> None:
        """Counts what FSDP2 keeps between micro-steps as gradients."""
        gradients = cast(Any, self._ref_class).SHARDED_GRAD
        for unit in find_units(self._model):
            if unit.partial_sum is not None:
                self._update_and_maybe_create_winfos(unit.partial_sum, gradients, update_existing=True)

    def _update_peak_stats(self, peak_state: Any) -> None:
        super()._update_peak_stats(peak_state)
        for snapshot in self._curr_mem_snap.values():
            known = self.phases.get(self.phase)
            if known is None or snapshot["Total"] > self._totals[self.phase]:
                self._totals[self.phase] = snapshot["Total"]
                kinds: Bytes = dict.fromkeys(MEMORY_KINDS, 0.0)
                for reference, size in snapshot.items():
                    if reference != "Total":
                        kinds[_KINDS[cast(Any, reference).name]] += size
                self.phases[self.phase] = kinds

    def _fsdp_state_pre_forward(self, fsdp_mod: FSDPModule, orig_fsdp_state_pre_fw: Any) -> Any:
        stock = super()._fsdp_state_pre_forward(fsdp_mod, orig_fsdp_state_pre_fw)

        def pre_forward(*args: Any, **kwargs: Any) -> Any:
            if not self._mod_tracker.is_bw and id(fsdp_mod) in self._names:
                self.phase = f"forward of {self._names[id(fsdp_mod)]}"
            return stock(*args, **kwargs)

        return pre_forward

    def _fsdp_param_group_pre_backward(self, fsdp_mod: FSDPModule, orig_fsdp_param_group_pre_backward: Any) -> Any:
        stock = super()._fsdp_param_group_pre_backward(fsdp_mod, orig_fsdp_param_group_pre_backward)

        def pre_backward(*args: Any, **kwargs: Any) -> None:
            if id(fsdp_mod) in self._names:
                self.phase = f"backward of {self._names[id(fsdp_mod)]}"
            stock(*args, **kwargs)

        return pre_backward


def _labelled_layers(model: nn.Module) -> Iterator[tuple[str, FSDPModule]]:
    """FSDP modules with their place in their stack: first, last, the one before it, or between."""
    stacks: dict[str, list[FSDPModule]] = {}
    for name, module in model.named_modules():
        parent, _, index = without_wrappers(name).rpartition(".")
        if isinstance(module, FSDPModule) and index.isdigit():
            stacks.setdefault(parent, []).append(module)
    for parent, stack in stacks.items():
        which = "decoder's " if len(stacks) > 1 and parent.startswith("decoder") else ""
        for i, module in enumerate(stack):
            place = {0: "the first", len(stack) - 1: "the last", len(stack) - 2: "the second to last"}.get(
                i, "a middle"
            )
            yield f"{place} {which}layer", module
