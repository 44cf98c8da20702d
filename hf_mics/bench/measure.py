"""What does one rank measure while it trains? Losses, times, waits, bytes on its node's NIC, and memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import platform
import resource
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hf_mics.bench.configuration import Configuration
from hf_mics.bench.stopwatch import WaitStopwatch
from hf_mics.bench.trainers.base import Batch, Trainer
from hf_mics.bench.trainers.registry import build_trainer
from hf_mics.bench.workload import micro_batch

_VERSIONS_OF = ("torch", "transformers", "accelerate", "deepspeed")


@dataclass
class Part:
    """What one rank saw; lists have one entry per optimizer step, warm-up included.

    Attributes:
        losses: mean over the step's micro-steps.
        step_s: seconds from a barrier before the step to one after it.
        waits_s: seconds of `step_s` spent waiting, by collective.
        nic_sent_bytes: bytes that left the node's NIC in the step; empty without a NIC of its own.
        micro_nic_sent_bytes: the same for each micro-step of the first step, which has a barrier after each.
        gradient_bytes: gradients held after the first micro-step; None where a step has only one.
        rss_before_bytes, peak_rss_bytes: resident memory with everything imported, and its peak while training.
        expected_nic_bytes: what the system itself says it sends, by hop.
        versions: of the libraries.
    """

    rank: int
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    waits_s: list[dict[str, float]] = field(default_factory=list)
    nic_sent_bytes: list[int] = field(default_factory=list)
    micro_nic_sent_bytes: list[int] = field(default_factory=list)
    gradient_bytes: int | None = None
    rss_before_bytes: int = 0
    peak_rss_bytes: int = 0
    expected_nic_bytes: dict[str, float] | None = None
    versions: dict[str, str] = field(default_factory=dict)


def measure(configuration: Configuration, *, nic: str | None = None, timeout_s: float = 300.0) -> Part:
    """Trains for the configuration's steps on this rank of a launched job and returns what it saw.

    Joins the job through the launcher's environment variables, and leaves it. `nic` is the interface whose counters
    are read; None: none.
    """
    torch.set_num_threads(1)
    rss_before = _restart_peak_rss()
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    stopwatch = WaitStopwatch()
    trainer = build_trainer(configuration)
    part = Part(dist.get_rank(), rss_before_bytes=rss_before, versions=versions())
    for step in range(configuration.warm_up_steps + configuration.steps):
        _measure_step(part, trainer, configuration, step, nic, stopwatch)
    part.peak_rss_bytes = _peak_rss_bytes()
    part.expected_nic_bytes = trainer.expected_nic_bytes(configuration.micro_steps)
    dist.barrier()
    dist.destroy_process_group()
    return part


def _measure_step(
    part: Part, trainer: Trainer, c: Configuration, step: int, nic: str | None, stopwatch: WaitStopwatch
) -> None:
    batches: list[Batch] = [micro_batch(c, step, i, dist.get_rank()) for i in range(c.micro_steps)]
    counts_micro_steps = step == 0
    losses = []
    dist.barrier()
    sent, waits, start = _sent_bytes(nic), stopwatch.read(), time.perf_counter()
    micro_sent = [sent]
    for i, batch in enumerate(batches):
        losses.append(trainer.micro_step(batch, last=i == c.micro_steps - 1))
        if counts_micro_steps:
            dist.barrier()
            micro_sent.append(_sent_bytes(nic))
            if i == 0 and c.micro_steps > 1:
                part.gradient_bytes = trainer.gradient_bytes()
    waited = {phase: seconds - waits.get(phase, 0.0) for phase, seconds in stopwatch.read().items()}
    dist.barrier()
    part.step_s.append(time.perf_counter() - start)
    part.waits_s.append({phase: seconds for phase, seconds in waited.items() if seconds})
    part.losses.append(sum(loss.item() for loss in losses) / len(losses))
    if nic is not None:
        part.nic_sent_bytes.append(_sent_bytes(nic) - sent)
        if counts_micro_steps:
            part.micro_nic_sent_bytes = [b - a for a, b in itertools.pairwise(micro_sent)]


def versions() -> dict[str, str]:
    """Versions of the libraries that are installed here, of Python and of the kernel."""
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for name in _VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _sent_bytes(nic: str | None) -> int:
    return 0 if nic is None else int(Path(f"/sys/class/net/{nic}/statistics/tx_bytes").read_text())


def _restart_peak_rss() -> int:
    """Makes the kernel forget this process's former peak; returns its resident bytes now."""
    # The rank was forked from one that imported everything, and would inherit that import's peak.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE")


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
