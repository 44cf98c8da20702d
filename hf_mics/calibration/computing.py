"""How fast does this rank compute, while all others do the same?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from hf_mics.calibration.timing_loop import sampled_s
from hf_mics.planning.workload import ModelShape
from hf_mics.throughput import local_peak_flops_per_s

_UPDATED_ELEMENTS = 1 << 22
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
    """Times a layer of the model's width, a matrix product and an AdamW step; a collective of all ranks.

    In bf16 on accelerators, in fp32 on CPUs.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    tokens, h = seq_length * micro_batch, model.hidden_size
    layer = nn.TransformerEncoderLayer(
        h, model.num_heads, model.ffn_size, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).to(device, dtype)
    rows = torch.randn(micro_batch, seq_length, h, device=device, dtype=dtype, requires_grad=True)

    def forward_and_backward() -> None:
        layer(rows).sum().backward()

    flops = 3 * (2 * tokens * (4 * h * h + 2 * h * model.ffn_size) + 4 * tokens * seq_length * h)
    layer_rates = [flops / s for s in sampled_s(forward_and_backward, device, samples=samples, sample_s=0.2)]
    left, right = (torch.randn(size, device=device, dtype=dtype) for size in ((tokens, h), (h, model.ffn_size)))
    product_flops = 2 * tokens * h * model.ffn_size
    product_s = min(sampled_s(lambda: left @ right, device, samples=samples, sample_s=0.05))
    peak = local_peak_flops_per_s() or max(product_flops / product_s, *layer_rates)
    return Computing(peak, layer_rates, _update_rates(device, samples))


def _update_rates(device: torch.device, samples: int) -> list[float]:
    shard = nn.Parameter(torch.zeros(_UPDATED_ELEMENTS, device=device))
    shard.grad = torch.ones_like(shard)
    optimizer = torch.optim.AdamW([shard], lr=1e-3)
    seconds = sampled_s(optimizer.step, device, samples=samples, sample_s=0.05)
    return [_UPDATE_BYTES * _UPDATED_ELEMENTS / s for s in seconds]
