"""How fast does this rank compute, while all others do the same?"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hf_mics.calibration.timing_loop import Call, sampled_s
from hf_mics.planning.timing import step_flops
from hf_mics.planning.workload import ModelShape, Workload
from hf_mics.probe_models import plain_model
from hf_mics.throughput import local_peak_flops_per_s
from hf_mics.wrapping import plan_units

Timed = Callable[[Call], list[float]]

_UPDATE_BYTES = 28  # AdamW, per fp32 parameter
_SMALL_TENSORS = 16
# A pass is a single call that all ranks start together, as between two collectives of training, and whose slowest rank
# counts: more of them make up for calls in a row.
_PASSES_PER_SAMPLE = 3
# Of one kind of pass. A vocabulary of 50,000 takes a CPU seconds per pass, which would add up to many minutes.
_MOST_S = 10.0


class Computing(NamedTuple):
    """Samples of what the slowest rank reaches.

    Attributes:
        peak_flops_per_s: the data sheet's, or where there is none the best that was seen.
        layer_flops_per_s: one layer of the model, forward and backward.
        head_flops_per_s: the head's operations, with the time of everything else outside layers charged to them.
        update_bytes_per_s: an optimizer step's reads and writes.
        update_s_per_tensor: what the optimizer takes for a tensor of next to no size.
    """

    peak_flops_per_s: float
    layer_flops_per_s: list[float]
    head_flops_per_s: list[float]
    update_bytes_per_s: list[float]
    update_s_per_tensor: list[float]

    def joined(self, other: Computing) -> Computing:
        """Both measurements' samples."""
        lists = [mine + theirs for mine, theirs in zip(self[1:], other[1:], strict=True)]
        return Computing(max(self.peak_flops_per_s, other.peak_flops_per_s), *lists)


def mesh_alone(device: torch.device) -> DeviceMesh:
    """A mesh of this rank alone; a collective of all ranks, which makes as many groups as there are ranks."""
    shape = (dist.get_world_size(), 1)
    return init_device_mesh(device.type, shape, mesh_dim_names=("measure_ranks", "measure_alone"))["measure_alone"]


def measure_computing(workload: Workload, mesh: DeviceMesh, device: torch.device, *, samples: int) -> Computing:
    """Times the workload's model with one layer and with none, AdamW and a matrix product; a collective of all ranks.

    In bf16 on accelerators, in fp32 on CPUs. The model runs under FSDP2 on `mesh`, of this rank alone: with the copies
    and casts that sharding adds to computing, without communication.
    Passes that take long are repeated less often than `samples` asks for, but three times at least.
    """
    model, seq_length, micro_batch = workload.model, workload.seq_length, workload.micro_batch
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    flops_of_layer, flops_of_head = _flops(model, seq_length, micro_batch)
    passes = _PASSES_PER_SAMPLE * samples

    def timed(call: Call, count: int = samples, *, sample_s: float = 0.1) -> list[float]:
        return sampled_s(call, device, samples=count, sample_s=sample_s, most_s=_MOST_S)

    ids = torch.zeros(micro_batch, seq_length, dtype=torch.long, device=device)
    bare = _sharded(model, 0, mesh, dtype, device)
    head_s = timed(_pass(bare, ids), passes, sample_s=0)
    del bare
    net = _sharded(model, 1, mesh, dtype, device)
    outside_s = median(head_s)
    # Noise must not make a layer of a tiny model faster than nothing.
    layer_s = [max(s - outside_s, 0.01 * s) for s in timed(_pass(net, ids), passes, sample_s=0)]
    per_tensor_s, update_rates = _optimizer(net, mesh, device, timed)
    tokens, h = seq_length * micro_batch, model.hidden_size
    left, right = (torch.randn(size, device=device, dtype=dtype) for size in ((tokens, h), (h, model.ffn_size)))
    product_s = min(timed(lambda: left @ right))
    layer_rates, head_rates = [flops_of_layer / s for s in layer_s], [flops_of_head / s for s in head_s]
    best = max(2 * tokens * h * model.ffn_size / product_s, median(layer_rates))
    return Computing(local_peak_flops_per_s() or best, layer_rates, head_rates, update_rates, per_tensor_s)


def _flops(model: ModelShape, seq_length: int, micro_batch: int) -> tuple[float, float]:
    """Of one layer (of T5, of one in each stack) and of the head, forward and backward, as predictions count them."""
    one, two = (
        step_flops(Workload(model=model.with_layers(depth), seq_length=seq_length, micro_batch=micro_batch))[0]
        for depth in (1, 2)
    )
    return two - one, 2 * one - two


def _sharded(model: ModelShape, depth: int, mesh: DeviceMesh, dtype: torch.dtype, device: torch.device) -> nn.Module:
    with device:
        net = plain_model(model, (depth, depth))
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for _, layer in plan_units(net).layers if depth else ():
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    return net


def _pass(net: nn.Module, ids: torch.Tensor) -> Call:
    def forward_and_backward() -> None:
        net.zero_grad()
        net(input_ids=ids, labels=ids).loss.backward()

    return forward_and_backward


def _optimizer(net: nn.Module, mesh: DeviceMesh, device: torch.device, timed: Timed) -> tuple[list[float], list[float]]:
    """(seconds for each small tensor, bytes per second of the rest) of AdamW."""
    small = nn.ParameterList(torch.zeros(8) for _ in range(_SMALL_TENSORS)).to(device)
    fully_shard(small, mesh=mesh)
    for parameter in small.parameters():
        parameter.grad = torch.zeros_like(parameter)
    fused = device.type != "cpu" or None  # as the Trainer on GPUs
    per_tensor_s = [s / _SMALL_TENSORS for s in timed(torch.optim.AdamW(small.parameters(), fused=fused).step)]
    parameters = list(net.parameters())
    overhead_s = len(parameters) * median(per_tensor_s)
    updated_bytes = _UPDATE_BYTES * sum(parameter.numel() for parameter in parameters)
    seconds = timed(torch.optim.AdamW(parameters, fused=fused).step)
    return per_tensor_s, [updated_bytes / max(s - overhead_s, 0.1 * s) for s in seconds]
