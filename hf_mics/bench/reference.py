"""Which losses should every system see, and how far may rounding take it from them?

One process trains the same global batches in float64: the losses that exact arithmetic would see. The same in float32
shows how far rounding alone leads away. Other orders of addition, which is all that equal systems differ in, lead about
as far, each its own way; a system is equal when it stays within `MARGIN` times that distance. For gradients that travel
in bfloat16, the process rounds them to bfloat16 wherever hf_mics would before it sends.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from hf_mics.bench import workload
from hf_mics.bench.configuration import Configuration, Wire
from hf_mics.bench.workload import build_model, build_optimizer, micro_batch

MARGIN = 8.0
"""Rounding is random: 8 times one draw's largest distance holds for hundreds of draws; a wrong gradient is far outside.

Gradients that grow by a factor of 2 per step move the third loss by 49 times the tolerance, although AdamW hides
constant factors; gradients of half the ranks, by far more (see the tests).
"""


@dataclass(frozen=True)
class Expectation:
    """Losses of every optimizer step in exact arithmetic, and how far from them equal systems may be."""

    losses: tuple[float, ...]
    tolerance: float


def expect(configuration: Configuration, cache: Path | None = None) -> Expectation:
    """What a run of this configuration should see.

    Trains in this process, half a minute for 5 steps of 32 sequences; with a `cache` folder, once for all runs that
    train on the same batches.
    """
    c = configuration
    # Everything that decides which numbers are computed, and nothing else, so that systems share their reference.
    same = replace(c, system="reference", partition_size=None, rate_mbit=None, hierarchical=True, two_hop=True)
    same = replace(
        same, warm_up_steps=0, steps=c.warm_up_steps + c.steps, nodes=1, node_size=c.world_size, cpus_per_node=None
    )
    exact = _kept(replace(same, wire="float32"), "float64", cache)
    rounded = _kept(same, "float32", cache)
    distance = max(abs(a - b) for a, b in zip(exact, rounded, strict=True))
    # A loss itself is rounded to float32 on every rank.
    least = max(exact) * torch.finfo(torch.float32).eps
    return Expectation(exact, MARGIN * max(distance, least))


_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def _kept(c: Configuration, dtype: str, cache: Path | None) -> tuple[float, ...]:
    if cache is None:
        return _losses(c, _DTYPES[dtype])
    path = cache / f"{c.identity}-{c.wire}-{dtype}-{_workload_version()}.json"
    known = json.loads(path.read_text()) if path.exists() else []
    if len(known) < c.steps:
        known = _losses(c, _DTYPES[dtype])
        cache.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known))
    return tuple(known[: c.steps])


@functools.cache
def _workload_version() -> str:
    """Changes with the models, batches and optimizer, which a configuration only names."""
    return hashlib.sha256(Path(workload.__file__).read_bytes()).hexdigest()[:8]


@functools.cache
def _losses(c: Configuration, dtype: torch.dtype) -> tuple[float, ...]:
    model: nn.Module = build_model(c.model)
    model.to(dtype)
    optimizer = build_optimizer(model)
    params = list(model.parameters())
    losses = []
    for step in range(c.steps):
        total = 0.0
        sums = [torch.zeros_like(param) for param in params]
        for rank in range(c.world_size):
            mine = [torch.zeros_like(param) for param in params]
            for i in range(c.micro_steps):
                loss = model(**micro_batch(c, step, i, rank)).loss
                total += loss.item()
                gradients = torch.autograd.grad(loss / c.micro_steps, params)
                for held, gradient in zip(mine, gradients, strict=True):
                    held += _on_the_wire(gradient, c.wire)
            for held, own in zip(sums, mine, strict=True):
                held += _on_the_wire(own, c.wire) / c.world_size
        for param, gradient in zip(params, sums, strict=True):
            param.grad = gradient
        optimizer.step()
        losses.append(total / (c.world_size * c.micro_steps))
    return tuple(losses)


def _on_the_wire(gradient: torch.Tensor, wire: Wire) -> torch.Tensor:
    return gradient if wire == "float32" else gradient.to(torch.bfloat16).to(gradient.dtype)
