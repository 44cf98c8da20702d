"""Which runs answer which question? Every experiment by name, as a list of configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from hf_mics.bench.configuration import Configuration, ModelName
from hf_mics.errors import ConfigError
from hf_mics.topology import valid_partition_sizes

FAST_MBIT = 4000.0
_MODELS: tuple[ModelName, ...] = ("gpt2", "bert")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question and the runs that answer it. Runs that several experiments share are run once."""

    title: str
    question: str
    runs: Callable[[], list[Configuration]]


def _headline(model: ModelName) -> list[Configuration]:
    # Of 5 optimizer steps the first is warm-up.
    base = Configuration(system="fsdp2", model=model)
    unpartitioned = (
        "no-communication",
        "ddp",
        "fsdp2",
        "fsdp2-no-sync",
        "accelerate-fsdp2",
        "accelerate-fsdp2-no-sync",
        "deepspeed-zero2",
        "deepspeed-zero3",
        "deepspeed-zero3-reuse",
        "deepspeed-0.19.1-zero3",
    )
    partitioned = (
        "accelerate-hybrid",
        "accelerate-hybrid-no-sync",
        "transformers-hybrid",
        "deepspeed-0.19.1-mics",
        "mics",
    )
    runs = [replace(base, system=system) for system in unpartitioned]
    runs += [replace(base, system=system, partition_size=base.node_size) for system in partitioned]
    runs += [_mics(base, size) for size in (1, 4, 8)]
    return [*runs, _mics(base, 2, wire="bfloat16")]


def _mics(base: Configuration, partition_size: int, **changes: Any) -> Configuration:
    return replace(base, system="mics", partition_size=partition_size, **changes)


def _ablation() -> list[Configuration]:
    base = Configuration(system="fsdp2")
    return [
        _mics(base, 2),
        _mics(base, 2, two_hop=False),
        _mics(base, 4),
        _mics(base, 4, two_hop=False),
        _mics(base, 4, hierarchical=False),
        _mics(base, 8),
        _mics(base, 8, hierarchical=False),
    ]


def _few(base: Configuration) -> list[Configuration]:
    """The systems that sweeps compare: MiCS, ZeRO-3 twice, and both hybrids."""
    p = base.node_size
    return [
        _mics(base, p),
        replace(base, system="deepspeed-zero3"),
        replace(base, system="fsdp2"),
        replace(base, system="accelerate-hybrid", partition_size=p),
        replace(base, system="accelerate-hybrid-no-sync", partition_size=p),
    ]


def _accumulation() -> list[Configuration]:
    base = Configuration(system="fsdp2", steps=2)
    return [run for micro_steps in (1, 2, 4, 8) for run in _few(replace(base, micro_steps=micro_steps))]


def _rate() -> list[Configuration]:
    base = Configuration(system="fsdp2", steps=2)
    # At 100 Mbit/s full sharding takes a minute per step.
    rates = [replace(base, rate_mbit=100.0, steps=1)]
    rates += [replace(base, rate_mbit=rate) for rate in (400.0, 1000.0, FAST_MBIT)]
    return [run for of_rate in rates for run in _few(of_rate) if run.system != "accelerate-hybrid"]


def _weak_scaling() -> list[Configuration]:
    # A rank has a tenth of a CPU at every size, so that 16 of them leave the kernel a fifth of two CPUs. A NIC slow
    # enough that time on the wire outweighs what a rank needs of its share to copy and compute.
    base = Configuration(system="fsdp2", steps=2, micro_steps=2, rate_mbit=100.0)
    shapes = [replace(base, nodes=nodes, node_size=2, cpus_per_node=0.2) for nodes in (1, 2, 4, 8)]
    # On nodes of one rank a partition group has to span two of them, and hop 1 goes over the NICs.
    shapes += [replace(base, nodes=nodes, node_size=1, cpus_per_node=0.1) for nodes in (2, 4, 8, 16)]
    return [run for shape in shapes for run in (_mics(shape, 2, steps=3), shape)]


def _hierarchical() -> list[Configuration]:
    base = Configuration(system="fsdp2", rate_mbit=400.0)
    return [_mics(base, p, hierarchical=h) for p in (4, 8) for h in (True, False)]


def _wire() -> list[Configuration]:
    base = Configuration(system="fsdp2", rate_mbit=None, steps=1)  # bytes depend on neither
    runs = []
    for p in valid_partition_sizes(base.world_size, base.node_size):
        for hierarchical in (True, False) if p > base.node_size else (True,):
            for two_hop in (True, False) if p < base.world_size else (True,):
                for wire in ("float32", "bfloat16"):
                    runs.append(_mics(base, p, hierarchical=hierarchical, two_hop=two_hop, wire=wire))
    return runs


def _equality() -> list[Configuration]:
    runs = [run for model in _MODELS for run in _headline(model) if run.spec.equal_losses]
    # As many micro-steps as the other systems' ranks do together: the same global batch.
    alone = Configuration(system="reference", nodes=1, node_size=1, micro_steps=32, rate_mbit=None)
    return [alone, replace(alone, model="bert"), *runs]


def _short() -> list[Configuration]:
    base = Configuration(system="fsdp2", model="gpt2-short", nodes=2, rate_mbit=50.0, micro_steps=2, steps=2)
    return [
        *(replace(base, system=system) for system in ("no-communication", "ddp", "fsdp2")),
        *(replace(base, system=s, partition_size=2) for s in ("accelerate-hybrid", "accelerate-hybrid-no-sync")),
        _mics(base, 2),
        _mics(base, 2, wire="bfloat16"),
        _mics(base, 4),
        _mics(base, 4, hierarchical=False),
    ]


EXPERIMENTS = {
    "headline": Experiment(
        title="Throughput, GPT-2-like model",
        question="4 nodes of 2 ranks, 400 Mbit/s, 4 micro-steps: how fast is every system?",
        runs=lambda: _headline("gpt2"),
    ),
    "headline-bert": Experiment(
        title="Throughput, BERT-like model",
        question="4 nodes of 2 ranks, 400 Mbit/s, 4 micro-steps: how fast is every system?",
        runs=lambda: _headline("bert"),
    ),
    "ablation": Experiment(
        title="Each technique off, one at a time",
        question="What do partition groups, two-hop synchronization and hierarchical collectives each bring?",
        runs=_ablation,
    ),
    "accumulation": Experiment(
        title="Micro-steps per optimizer step",
        question="How does the step time grow with gradient accumulation?",
        runs=_accumulation,
    ),
    "rate": Experiment(
        title="NIC rate",
        question="From which rate on does MiCS stop paying?",
        runs=_rate,
    ),
    "weak-scaling": Experiment(
        title="Weak scaling",
        question="How do communication time and bytes per NIC grow with nodes, at fixed work per rank?",
        runs=_weak_scaling,
    ),
    "hierarchical": Experiment(
        title="Partition groups that span nodes",
        question="How many bytes cross each NIC, hierarchical against flat, beside (p-k)/p and (p-1)/p?",
        runs=_hierarchical,
    ),
    "wire": Experiment(
        title="Bytes on the wire",
        question="Do the NICs carry what the engine predicts, in every configuration of MiCS?",
        runs=_wire,
    ),
    "equality": Experiment(
        title="Losses",
        question="Do all systems compute the same losses?",
        runs=_equality,
    ),
    "short": Experiment(
        title="A short run",
        question="Does all of this still work? 2 nodes of 2 ranks, 50 Mbit/s, a model of 1.1 M parameters.",
        runs=_short,
    ),
}


def runs_of(names: list[str], only: list[str] | None = None) -> list[Configuration]:
    """The configurations of the experiments `names`, each once, with the most steps that any of them asks for.

    Args:
        names: keys of `EXPERIMENTS`.
        only: keep variants that match one of these shell patterns (as `mics-p2` or `deepspeed-*`); None keeps all.

    Raises:
        ConfigError: an unknown experiment, or an `only` that matches nothing.
    """
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        raise ConfigError(f"unknown experiment {unknown[0]!r}: expected one of {', '.join(EXPERIMENTS)}.")
    runs: dict[str, Configuration] = {}
    for name in names:
        for run in EXPERIMENTS[name].runs():
            known = runs.get(run.identity)
            if known is None or known.steps < run.steps:
                runs[run.identity] = run
    if only is None:
        return list(runs.values())
    for pattern in only:
        if not any(fnmatch(run.variant, pattern) for run in runs.values()):
            found = ", ".join(sorted({run.variant for run in runs.values()}))
            raise ConfigError(f"no system of {', '.join(names)} matches {pattern!r}: expected one of {found}.")
    return [run for run in runs.values() if any(fnmatch(run.variant, pattern) for pattern in only)]
