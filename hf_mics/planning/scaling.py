"""How do MiCS and its peers scale with the number of GPUs? Predicted, point by point.

Weak scaling gives every GPU the same work at every size; strong scaling divides one global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from hf_mics.errors import ConfigError, MiCSError, TopologyError
from hf_mics.planning.cluster import Cluster, Range
from hf_mics.planning.memory import peak_memory
from hf_mics.planning.plan import DEFAULT_RESERVE_BYTES
from hf_mics.planning.timing import FSDP2, PARTITIONED, Implementation, StepTime, System, own_partition_size, predict
from hf_mics.planning.workload import Workload
from hf_mics.topology import require_world_size, valid_partition_sizes

Scaling = Literal["weak", "strong"]


@dataclass(frozen=True, kw_only=True)
class ScalePoint:
    """One system at one size. `accumulation` is what is left of the workload's under strong scaling."""

    scaling: Scaling
    system: System
    world_size: int
    partition_size: int
    accumulation: int
    step: StepTime

    @property
    def tokens_per_s_per_gpu(self) -> Range:
        """Tokens per second of one GPU."""
        return self.step.tokens_per_s.scaled(1 / self.world_size)

    def record(self) -> dict[str, Any]:
        """The point as JSON has it."""
        return {
            "scaling": self.scaling,
            "system": self.system,
            "world_size": self.world_size,
            "partition_size": self.partition_size,
            "accumulation": self.accumulation,
            "step_time_s": self.step.step_s.ends,
            "exposed_communication_s": self.step.exposed_s.ends,
            "tokens_per_s": self.step.tokens_per_s.ends,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu.ends,
            "tflops_per_gpu": self.step.tflops_per_gpu.ends,
            "model_flops_utilization": self.step.utilization.ends,
        }


class _DoesNotFitError(ConfigError):
    """A GPU has less memory than the `needed_bytes`, reserve included."""

    def __init__(self, message: str, needed_bytes: float) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class Simulated(NamedTuple):
    """What was predicted, and what was left out and why, a line for each system and reason."""

    points: list[ScalePoint]
    left_out: list[str]


def sizes_between(smallest: int, largest: int) -> list[int]:
    """`smallest`, twice that, and so on up to `largest`.

    Raises:
        ConfigError: not positive, or in the wrong order.
        TopologyError: more GPUs than any job has.
    """
    if not 0 < smallest <= largest:
        raise ConfigError(f"GPUs must run from a positive number up, got {smallest} to {largest}.")
    require_world_size(largest)
    sizes = [smallest]
    while sizes[-1] * 2 <= largest:
        sizes.append(sizes[-1] * 2)
    return sizes


def simulate(
    workload: Workload,
    cluster: Cluster,
    *,
    scaling: Scaling,
    systems: Sequence[System],
    world_sizes: Sequence[int],
    partition_size: int,
    implementation: Implementation = FSDP2,
) -> Simulated:
    """Every system at every size, in that order.

    Left out are sizes at which a system does not fit into memory, sizes smaller than a partition group for the systems
    that have one, and, under strong scaling, sizes at which the global batch (micro_batch * accumulation * the smallest
    size) does not divide into whole micro-batches.

    Raises:
        TopologyError: a size that is not whole nodes, or a partition size that forms no groups at any size.
        ConfigError: no system that has partition groups, or none at all if there is no such, fits at any size.
    """
    points = []
    omitted: dict[tuple[System, str], list[int]] = {}
    needed: dict[System, dict[int, float]] = {}
    asked = set(PARTITIONED) & set(systems) or set(systems)
    refused: MiCSError | None = None
    for system in systems:
        for world_size in world_sizes:
            sized = cluster.with_world_size(world_size)
            try:
                run, p = _at_size(workload, sized, scaling, system, world_sizes[0], partition_size)
            except (TopologyError, ConfigError) as error:
                refused = error if system in asked else refused
                if isinstance(error, _DoesNotFitError):
                    needed.setdefault(system, {})[world_size] = error.needed_bytes
                else:
                    omitted.setdefault((system, str(error)), []).append(world_size)
                continue
            step = predict(run, sized, system=system, partition_size=p, implementation=implementation)
            points.append(
                ScalePoint(
                    scaling=scaling,
                    system=system,
                    world_size=world_size,
                    partition_size=p,
                    accumulation=run.accumulation,
                    step=step,
                )
            )
    if refused is not None and not asked & {point.system for point in points}:
        raise refused
    left_out = [f"{system} on {', '.join(map(str, found))} GPUs: {why}" for (system, why), found in omitted.items()]
    available = cluster.accelerator.memory_bytes
    for system, at in needed.items():
        low, high = (f"{end(at.values()) / 1e9:.1f}" for end in (min, max))
        left_out.append(
            f"{system} on {', '.join(map(str, at))} GPUs: {workload.model.name} does not fit: it needs "
            f"{low if low == high else f'{low} to {high}'} GB of a GPU's {available / 1e9:.1f} GB."
        )
    return Simulated(points, left_out)


def _at_size(
    workload: Workload, cluster: Cluster, scaling: Scaling, system: System, smallest: int, partition_size: int
) -> tuple[Workload, int]:
    """The workload on all GPUs of `cluster`, and the system's own partition size there.

    Raises:
        ConfigError: the system does not fit, or the global batch does not divide.
        TopologyError: the partition size forms no groups.
    """
    world_size = cluster.world_size
    p = own_partition_size(system, world_size, partition_size)
    if p > world_size:
        raise ConfigError(f"a partition group of {p} is more than all GPUs.")
    accumulation = _accumulation(workload, scaling, smallest, world_size)
    if not accumulation:
        raise ConfigError(
            f"the global batch of {workload.micro_batch * workload.accumulation * smallest} sequences does not divide "
            f"into micro-batches of {workload.micro_batch}."
        )
    run = replace(workload, accumulation=accumulation)
    _require_memory(run, cluster, system, p)
    return run, p


def smallest_partition(workload: Workload, cluster: Cluster) -> int:
    """The smallest partition group in which the workload fits.

    Raises:
        ConfigError: there is none; says how much the largest lacks.
    """
    sizes = valid_partition_sizes(cluster.world_size, cluster.gpus_per_node)
    p = next((p for p in sizes if _missing_bytes(workload, cluster, "mics", p) <= 0), sizes[-1])
    _require_memory(workload, cluster, "mics", p)
    return p


def efficiency(points: Sequence[ScalePoint], point: ScalePoint) -> Range:
    """Tokens per second and GPU relative to the system's smallest size, both at one end of the ranges."""
    same = (p for p in points if (p.system, p.scaling) == (point.system, point.scaling))
    first = min(same, key=lambda p: p.world_size)
    ends = zip(point.tokens_per_s_per_gpu.ends, first.tokens_per_s_per_gpu.ends, strict=True)
    return Range.over(*(mine / smallest for mine, smallest in ends))


def _accumulation(workload: Workload, scaling: Scaling, smallest: int, world_size: int) -> int:
    """Micro-steps at `world_size`; 0 where the global batch does not divide."""
    if scaling == "weak":
        return workload.accumulation
    micro_steps, rest = divmod(workload.accumulation * smallest, world_size)
    return 0 if rest else micro_steps


def _require_memory(workload: Workload, cluster: Cluster, system: System, partition_size: int) -> None:
    missing = _missing_bytes(workload, cluster, system, partition_size)
    if missing > 0:
        available = cluster.accelerator.memory_bytes
        larger = "Larger partition groups, smaller" if system in PARTITIONED else "Smaller"
        raise _DoesNotFitError(
            f"{workload.model.name} does not fit: {system} with partition groups of {partition_size} needs "
            f"{(available + missing) / 1e9:.1f} GB of a GPU's {available / 1e9:.1f} GB. {larger} micro-batches or "
            "activation checkpointing need less; hf-mics plan shows which.",
            available + missing,
        )


def _missing_bytes(workload: Workload, cluster: Cluster, system: System, partition_size: int) -> float:
    needed = peak_memory(workload, cluster.topology(partition_size), system=system).total_bytes + DEFAULT_RESERVE_BYTES
    return needed - cluster.accelerator.memory_bytes
