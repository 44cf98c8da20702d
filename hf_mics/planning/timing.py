"""How long will an optimizer step take, with MiCS and with its peers, and what is the time spent on?

Computing is counted floating-point operations at an efficiency; communication is the bytes that the engine moves over
links with a latency and a bandwidth; `schedule.py` lays both out in time as FSDP2 does. The constants are ranges, so
the answer is one: from every constant at its fast end to every constant at its slow end.

Left out: loading data, logging and checkpoints; the norm for gradient clipping; copies into and out of communication
buffers, and what communication kernels take from the matrix products beside them; stragglers, and networks that
are oversubscribed or shared; CPU time to launch kernels; transfers between host and GPU under CPU offload.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from hf_mics.errors import ConfigError
from hf_mics.planning.cluster import Cluster, Lane, Range, Rates
from hf_mics.planning.collective_times import UnitLoads, timed, unit_loads
from hf_mics.planning.schedule import Segment, lane_seconds, micro_step_s
from hf_mics.planning.workload import Unit, Workload

System = Literal["mics", "zero3", "zero2", "hsdp", "ddp"]
# Systems whose shards lie within a partition group; the others' sizes follow from the number of GPUs.
PARTITIONED: tuple[System, ...] = ("mics", "hsdp")

# Reads and writes of the optimizer step per parameter, in bytes, all of it in fp32: AdamW reads parameter, gradient and
# two moments and writes all but the gradient.
_UPDATE_BYTES = {"adamw": 28, "sgd-momentum": 20, "sgd": 12}


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """How a system issues its collectives, as far as it costs time.

    Args:
        calls_per_unit: collectives in which a unit's parameters or gradients travel. FSDP2 sends a layer in one.
        overlap: whether it communicates beside computing, where the backend can.
    """

    calls_per_unit: int = 1
    overlap: bool = True


FSDP2 = Implementation()


class Step(NamedTuple):
    """One optimizer step at one point of the cluster's ranges, in seconds.

    `intra_node_s` and `inter_node_s` are what the links are held; whatever of it is not hidden is in `exposed_s`, so
    that step_s = compute_s + update_s + exposed_s.
    """

    step_s: float
    compute_s: float
    update_s: float
    intra_node_s: float
    inter_node_s: float
    exposed_s: float


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A predicted optimizer step. Ranges run from the fast to the slow end of every constant.

    Attributes:
        step_s: seconds of the optimizer step; compute_s, update_s, intra_node_s, inter_node_s and exposed_s are as in
            `Step`.
        tokens_per_s: of the whole cluster.
        tflops_per_gpu: TFLOP/s of one GPU, recomputed activations counted, as published MiCS figures do.
        utilization: model FLOPS over the peak, from 0 to 1.
    """

    step_s: Range
    compute_s: Range
    update_s: Range
    intra_node_s: Range
    inter_node_s: Range
    exposed_s: Range
    tokens_per_s: Range
    tflops_per_gpu: Range
    utilization: Range


def predict(
    workload: Workload,
    cluster: Cluster,
    *,
    system: System = "mics",
    partition_size: int,
    hierarchical: bool = True,
    two_hop: bool = True,
    implementation: Implementation = FSDP2,
) -> StepTime:
    """The optimizer step of `workload` on `cluster`.

    Args:
        system: "mics"; "hsdp" is FSDP2's hybrid sharding, flat collectives and an all-reduce in every micro-step, which
            holds as few gradients as MiCS; "zero3" shards over all GPUs; "zero2" shards gradients and optimizer
            state over all of them and gathers parameters once a step; "ddp" shards nothing, its gradients are fp32.
        partition_size: of "mics" and "hsdp"; the peers' own is implied, so it is ignored.
        hierarchical: two-stage collectives where a partition group spans nodes; of "mics".
        two_hop: hop 2 at the accumulation boundary only; of "mics".
        implementation: how collectives are issued.

    Raises:
        ConfigError: unknown system.
        TopologyError: the partition size forms no groups.
    """
    layout = _layout(workload, cluster, system, partition_size, hierarchical, two_hop)
    slow, fast = (_step(layout, cluster.rates(speed), implementation) for speed in (0.0, 1.0))
    model_flops, recomputed = step_flops(workload)
    tokens = workload.tokens_per_micro_step * workload.accumulation * cluster.world_size
    peak = cluster.accelerator.peak_flops_per_s

    def per_second(amount: float) -> Range:
        return Range(amount / slow.step_s, amount / fast.step_s)

    return StepTime(
        **{name: Range.over(getattr(fast, name), getattr(slow, name)) for name in Step._fields},
        tokens_per_s=per_second(tokens),
        tflops_per_gpu=per_second((model_flops + recomputed) / 1e12),
        utilization=per_second(model_flops / peak),
    )


def predict_at(
    workload: Workload,
    cluster: Cluster,
    rates: Rates,
    *,
    system: System = "mics",
    partition_size: int,
    hierarchical: bool = True,
    two_hop: bool = True,
    implementation: Implementation = FSDP2,
) -> Step:
    """The same as `predict` at one point of the cluster's ranges, `rates`: for ratios of systems, and for fits."""
    layout = _layout(workload, cluster, system, partition_size, hierarchical, two_hop)
    return _step(layout, rates, implementation)


def own_partition_size(system: System, world_size: int, partition_size: int) -> int:
    """`partition_size` for the systems that can choose one, else the system's own."""
    return partition_size if system in PARTITIONED else 1 if system == "ddp" else world_size


def step_flops(workload: Workload) -> tuple[float, float]:
    """Floating-point operations of one GPU's optimizer step: (what the mathematics needs, recomputation on top).

    Matrix products and attention, a multiply and an add counted as two, attention as if unmasked; backward is twice
    forward. Norms, activations, softmax and embedding lookups are left out.
    """
    works = _works(workload)
    forward = sum(work.forward_flops for work in works)
    recomputed = sum(work.forward_flops for work in works if work.recomputed)
    return 3.0 * forward * workload.accumulation, recomputed * float(workload.accumulation)


class _Work(NamedTuple):
    """A stretch of computing of one micro-step; `unit` is what it gathers before and reduces after, if anything.

    `is_head` tells operations of the head, which may have an efficiency of their own.
    """

    unit: Unit | None
    forward_flops: float
    recomputed: bool = False
    is_head: bool = False


class _Layout(NamedTuple):
    """A workload on the groups of one system."""

    works: list[_Work]
    loads: list[UnitLoads | None]
    micro_steps: int
    hop2_always: bool
    update_bytes: float
    tensors: int
    overlap: bool
    hop2_beside: bool
    """Whether hop 2 runs beside backward although nothing else overlaps: the engine's does over gloo."""
    whole_parameters: bool
    """ZeRO-2: every GPU holds all parameters, which are gathered once after the optimizer step, not in micro-steps."""


def _layout(
    workload: Workload, cluster: Cluster, system: System, partition_size: int, hierarchical: bool, two_hop: bool
) -> _Layout:
    if system not in get_args(System):
        raise ConfigError(f"system must be one of {', '.join(get_args(System))}, got {system!r}.")
    p = own_partition_size(system, cluster.world_size, partition_size)
    topology = cluster.topology(p)
    # DDP under autocast keeps fp32 parameters, whose gradients are what travels.
    reduce_width = 4 if system == "ddp" else workload.compute_bytes
    works = _works(workload)
    loads = [
        None
        if work.unit is None
        else unit_loads(
            topology,
            work.unit.padded_numel(p) * workload.compute_bytes,
            work.unit.padded_numel(p) * reduce_width,
            hierarchical=hierarchical and system == "mics",
            backend=cluster.backend,
        )
        for work in works
    ]
    shard = sum(unit.padded_numel(p) // p for unit in workload.model.units)
    return _Layout(
        works=works,
        loads=loads,
        micro_steps=workload.accumulation,
        hop2_always=system == "hsdp" or not two_hop,
        # Offloaded, it runs on the host, at a speed that nothing here knows.
        update_bytes=0.0 if workload.cpu_offload else float(shard * _UPDATE_BYTES[workload.optimizer]),
        tensors=0 if workload.cpu_offload else sum(len(unit.matrices) for unit in workload.model.units),
        overlap=cluster.backend == "nccl",
        hop2_beside=system == "mics" and two_hop,
        whole_parameters=system == "zero2",
    )


def _step(layout: _Layout, rates: Rates, implementation: Implementation) -> Step:
    segments = list(_segments(layout, rates, implementation.calls_per_unit))
    overlap = layout.overlap and implementation.overlap
    n = layout.micro_steps
    with_hop2 = n if layout.hop2_always else 1
    seconds = with_hop2 * micro_step_s(segments, hop2=True, overlap=overlap, hop2_beside=layout.hop2_beside)
    held = {lane: with_hop2 * s for lane, s in lane_seconds(segments, hop2=True).items()}
    if n > with_hop2:
        seconds += (n - with_hop2) * micro_step_s(segments, hop2=False, overlap=overlap)
        for lane, s in lane_seconds(segments, hop2=False).items():
            held[lane] += (n - with_hop2) * s
    if layout.whole_parameters:
        for lane, s in _gathers(layout, rates, implementation.calls_per_unit):
            held[lane] += s
            seconds += s
    compute = n * sum(segment.forward_s + segment.backward_s for segment in segments)
    update = 0.0
    if rates.update_bytes_per_s:
        update = layout.update_bytes / rates.update_bytes_per_s + layout.tensors * rates.update_s_per_tensor
    # Rounding in sums of hundreds of durations must not make a hidden transfer cost less than nothing.
    exposed = max(0.0, seconds - compute)
    return Step(compute + update + exposed, compute, update, held["intra_node"], held["inter_node"], exposed)


def _segments(layout: _Layout, rates: Rates, calls: int) -> Iterator[Segment]:
    made: dict[tuple[int, _Work], Segment] = {}
    for work, loads in zip(layout.works, layout.loads, strict=True):
        # Layers are alike: `unit_loads` returns the same object for equal units.
        key = (id(loads), work._replace(unit=None))
        if key not in made:
            made[key] = _segment(work, loads, layout.whole_parameters, rates, calls)
        yield made[key]


def _segment(work: _Work, loads: UnitLoads | None, whole_parameters: bool, rates: Rates, calls: int) -> Segment:
    own_rate = rates.head_flops_per_s if work.is_head else None
    forward_s = work.forward_flops / (own_rate or rates.flops_per_s)
    backward_s = (3 if work.recomputed else 2) * forward_s
    if loads is None or work.unit is None:
        return Segment(forward_s, backward_s)
    gather = () if whole_parameters else timed(loads.gather, rates, calls)
    return Segment(
        forward_s,
        backward_s,
        gather_before_forward=gather,
        gather_before_backward=gather if work.unit.frees_after_forward else (),
        reduce=timed(loads.reduce, rates, calls),
        hop2=timed(loads.hop2, rates, calls),
    )


def _gathers(layout: _Layout, rates: Rates, calls: int) -> Iterator[tuple[Lane, float]]:
    for loads in layout.loads:
        if loads is not None:
            yield from timed(loads.gather, rates, calls)


def _works(workload: Workload) -> list[_Work]:
    """What forward computes, in order. A root that is tied to the head computes last, though it is gathered first."""
    model, tokens = workload.model, workload.tokens_per_micro_step
    works: list[_Work] = []
    head_flops = 2.0 * tokens * model.vocab_size * model.hidden_size
    if model.family == "bert":
        head_flops += 2.0 * tokens * model.hidden_size**2
    attention = 4.0 * tokens * workload.seq_length * model.attention_width
    layers = has_head = 0
    for unit in model.units:
        if unit.kind == "layer":
            layers += 1
            # T5's decoder layers also attend to the encoder.
            attentions = 2 if model.family == "t5" and layers > model.num_layers else 1
            products = 2.0 * tokens * sum(rows * columns for rows, columns in unit.matrices if columns > 1)
            works.append(_Work(unit, products + attentions * attention, workload.activation_checkpointing))
        else:
            has_head |= unit.kind == "head"
            is_head = unit.kind == "head"
            works.append(_Work(unit, head_flops if is_head else 0.0, is_head=is_head))
    return works if has_head else [*works, _Work(None, head_flops, is_head=True)]


def time_notes(workload: Workload, cluster: Cluster) -> Iterator[str]:
    """What predicted times of `workload` leave out beyond what all of them do."""
    if workload.cpu_offload:
        yield "CPU offload: transfers between host and GPU and the optimizer's time on the CPU are left out"
    elif cluster.update_bytes_per_s is None:
        yield "the optimizer's own time is left out: the memory bandwidth is not known"
    if workload.precision == "fp32" and cluster.backend == "nccl":
        if cluster.collectives:
            yield "fp32: GPUs were measured in bf16, so computing takes several times longer than predicted"
        else:
            yield "fp32: the part of the peak that is reached is the one of 16-bit matrix products; no TF32"
