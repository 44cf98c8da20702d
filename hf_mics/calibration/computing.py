"""How fast does this rank compute, while all others do the same?"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hf_mics.calibration.timing_loop import sampled_s
from hf_mics.planning.workload import ModelShape
from hf_mics.throughput import local_peak_flops_per_s

_UPDATE_BYTES = 28  # AdamW, per fp32 parameter


class Computing(NamedTuple):
    """Samples of what the slowest rank reaches.

    Attributes:
        peak_flops_per_s: the data sheet's, or where there is none the best that was seen.
        layer_flops_per_s: one layer, forward and backward.
        update_bytes_per_s: an optimizer step's reads and writes.
    """

    peak_flops_per_s: float
    layer_flops_per_s: list[float]
    update_bytes_per_s: list[float]


def measure_computing(
    model: ModelShape, seq_length: int, micro_batch: int, device: torch.device, *, samples: int
) -> Computing:
    """Times a layer of the model's width, an AdamW step on it and a matrix product; a collective of all ranks.

    In bf16 on accelerators, in fp32 on CPUs. The layer runs under FSDP2 on a group of this rank alone: with the copies
    and casts that sharding adds to computing, without communication.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    tokens, h = seq_length * micro_batch, model.hidden_size
    layer = nn.TransformerEncoderLayer(
        h, model.num_heads, model.ffn_size, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).to(device)
    alone = init_device_mesh(device.type, (dist.get_world_size(), 1), mesh_dim_names=("measure_ranks", "measure_alone"))
    fully_shard(layer, mesh=alone["measure_alone"], mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    rows = torch.randn(micro_batch, seq_length, h, device=device, dtype=dtype, requires_grad=True)

    def forward_and_backward() -> None:
        optimizer.zero_grad()
        layer(rows).sum().backward()

    flops = 3 * (2 * tokens * (4 * h * h + 2 * h * model.ffn_size) + 4 * tokens * seq_length * h)
    layer_rates = [flops / s for s in sampled_s(forward_and_backward, device, samples=samples, sample_s=0.5)]
    updated_bytes = _UPDATE_BYTES * sum(parameter.numel() for parameter in layer.parameters())
    update_rates = [updated_bytes / s for s in sampled_s(optimizer.step, device, samples=samples, sample_s=0.1)]
    left, right = (torch.randn(size, device=device, dtype=dtype) for size in ((tokens, h), (h, model.ffn_size)))
    product_s = min(sampled_s(lambda: left @ right, device, samples=samples, sample_s=0.1))
    best = max(2 * tokens * h * model.ffn_size / product_s, *layer_rates)
    return Computing(local_peak_flops_per_s() or best, layer_rates, update_rates)
