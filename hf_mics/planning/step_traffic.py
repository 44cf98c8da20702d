"""How many bytes does an optimizer step of a planned workload move, by phase and by link?

The volumes are those of `hf_mics.traffic`, which the engine's own counters confirm; here they are computed from a
model's shape instead of a sharded model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from hf_mics.meter import Tally
from hf_mics.planning.timing import System
from hf_mics.planning.workload import Workload
from hf_mics.topology import Topology
from hf_mics.traffic import Backend, StepTraffic, UnitShape, predict


class PhaseTraffic(NamedTuple):
    """Bytes of one phase per optimizer step.

    `per_gpu` leaves one GPU, on whatever link; `nic_per_node` leaves one node; `nvlink_per_gpu` goes from one GPU to
    others of its node, the average over a node's GPUs.
    """

    per_gpu: float
    nic_per_node: float
    nvlink_per_gpu: float


def unit_shapes(workload: Workload, partition_size: int, *, reduce_width: int | None = None) -> list[UnitShape]:
    """The model's units as bytes on the wire, as the engine's `unit_shapes` are.

    Args:
        reduce_width: bytes of a gradient's element on the wire; default that of computing (the engine's "auto").
    """
    width = workload.compute_bytes
    return [
        UnitShape(
            name=unit.name,
            gather_bytes=width * unit.padded_numel(partition_size),
            reduce_bytes=(reduce_width or width) * unit.padded_numel(partition_size),
            gathers_per_micro_step=2 if unit.frees_after_forward else 1,
        )
        for unit in workload.model.units
    ]


def predict_step(
    workload: Workload,
    topology: Topology,
    *,
    system: System = "mics",
    hierarchical: bool = True,
    backend: Backend = "nccl",
) -> StepTraffic:
    """Everything that one optimizer step moves.

    Args:
        system: "mics" runs hop 2 once; "hsdp" is flat and runs it in every micro-step; "zero3" is flat over all
            GPUs; "zero2" gathers parameters once per step; "ddp" all-reduces fp32 gradients once.
        backend: decides which of the bytes cross nodes.
    """
    units = unit_shapes(workload, topology.partition_size, reduce_width=4 if system == "ddp" else None)
    steps = workload.accumulation
    staged = hierarchical and system == "mics"
    if system == "zero2":
        once = [replace(unit, gathers_per_micro_step=1, reduce_bytes=0) for unit in units]
        never = [replace(unit, gathers_per_micro_step=0) for unit in units]
        return _sum(
            predict(topology, once, micro_steps=1, hierarchical=staged, backend=backend),
            predict(topology, never, micro_steps=steps, hierarchical=staged, backend=backend),
        )
    if system == "hsdp":
        one = predict(topology, units, micro_steps=1, hierarchical=False, backend=backend)
        return StepTraffic(
            {key: Tally(tally.calls * steps, tally.bytes_sent * steps) for key, tally in one.per_rank.items()},
            {phase: size * steps for phase, size in one.nic_bytes.items()},
        )
    return predict(topology, units, micro_steps=steps, hierarchical=staged, backend=backend)


def phase_traffic(
    workload: Workload,
    topology: Topology,
    *,
    system: System = "mics",
    hierarchical: bool = True,
    backend: Backend = "nccl",
) -> dict[str, PhaseTraffic]:
    """The same by phase, hop 1's gathers split into those for forward and those for backward."""
    whole = predict_step(workload, topology, system=system, hierarchical=hierarchical, backend=backend)
    forward = backward = 0
    for unit in workload.model.units:
        numel = unit.padded_numel(topology.partition_size)
        forward += numel
        backward += numel if unit.frees_after_forward and system != "zero2" else 0
    share = forward / (forward + backward)
    gathers = _phase(whole, topology, "hop1_all_gather")
    return {
        "hop1_all_gather_forward": PhaseTraffic(*(size * share for size in gathers)),
        "hop1_all_gather_backward": PhaseTraffic(*(size * (1 - share) for size in gathers)),
        "hop1_reduce_scatter": _phase(whole, topology, "hop1_reduce_scatter"),
        "hop2_all_reduce": _phase(whole, topology, "hop2_all_reduce"),
    }


def _phase(traffic: StepTraffic, topology: Topology, name: str) -> PhaseTraffic:
    phase, nic = name.partition("_")[2], traffic.nic_bytes[name]
    sent = float(sum(tally.bytes_sent for (of, _), tally in traffic.per_rank.items() if of == phase))
    # Rounding of shards can leave a byte or two less than nothing.
    return PhaseTraffic(sent, nic, max(0.0, sent - nic / topology.node_size))


def _sum(one: StepTraffic, other: StepTraffic) -> StepTraffic:
    tallies = dict(one.per_rank)
    for key, tally in other.per_rank.items():
        tallies[key] = tallies[key] + tally if key in tallies else tally
    return StepTraffic(tallies, {phase: size + other.nic_bytes[phase] for phase, size in one.nic_bytes.items()})
