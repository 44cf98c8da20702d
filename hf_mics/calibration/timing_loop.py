"""How long does a call take on the slowest rank, again and again?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

Call = Callable[[], object]

_MOST_CALLS_PER_SAMPLE = 50
_LEAST_SAMPLES = 3


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that was asked of it; CPUs have."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def sampled_s(
    call: Call, device: torch.device, *, samples: int, sample_s: float, most_s: float = math.inf
) -> list[float]:
    """Seconds of one `call`, `samples` times, each that of the slowest rank; a collective of all ranks.

    Ranks start together, after one call that warms up. A sample takes as many calls in a row as fill `sample_s`
    seconds, as training does: a network's bursts and the timer's own cost weigh little. Where all samples would take
    longer than `most_s` seconds, fewer are taken, but three at least.
    """
    call()
    warm = _slowest([_once(call, device, 1)], device)[0]
    calls = max(1, min(_MOST_CALLS_PER_SAMPLE, round(sample_s / max(warm, 1e-9))))
    if samples * calls * warm > most_s:
        samples = min(samples, max(_LEAST_SAMPLES, int(most_s / (calls * warm))))
    return _slowest([_once(call, device, calls) for _ in range(samples)], device)


def _once(call: Call, device: torch.device, calls: int) -> float:
    synchronize(device)
    dist.barrier()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def _slowest(seconds: list[float], device: torch.device) -> list[float]:
    everyone = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(everyone, op=dist.ReduceOp.MAX)
    return everyone.tolist()
