"""Which partition size should a workload take on a cluster, and why?

Every size that forms groups is a candidate, with its memory, traffic and step time. The choice is the fastest that
fits, and of sizes whose predicted times differ by less than 1 % the smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_mics.errors import ConfigError
from hf_mics.planning.cluster import Cluster, Range
from hf_mics.planning.memory import MEMORY_KINDS, Memory, peak_memory
from hf_mics.planning.step_traffic import PhaseTraffic, phase_traffic
from hf_mics.planning.timing import PARTITIONED, StepTime, System, own_partition_size, predict, predict_at, time_notes
from hf_mics.planning.workload import Workload
from hf_mics.topology import MOST_RANKS, Topology, valid_partition_sizes

GB = 1e9
# CUDA's context and NCCL's buffers beyond what the decimal GB of data sheets leave, workspaces, and fragmentation.
DEFAULT_RESERVE_BYTES = 2 * GB
# Times closer than this are called equal.
_SAME_TIME = 0.01
# Below this gain of MiCS over full sharding the network is said to have nothing to win.
_WORTH_IT = 0.03
# A peer that waits for less than this part of its step hides its communication.
_HIDDEN = 0.1
_MOST_NODES = 4096
# Shorter sequences are no advice.
_FEWEST_TOKENS = 128

MeasureMemory = Callable[[Workload, Topology], Memory]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked: a workload on a cluster.

    Args:
        system: MiCS or a peer.
        hierarchical: two-stage collectives.
        reserve_bytes: kept free on every GPU.
        price_per_hour: of one node, in any currency; None leaves costs out.
        memory: the estimator; default the closed form.
    """

    workload: Workload
    cluster: Cluster
    system: System = "mics"
    hierarchical: bool = True
    reserve_bytes: float = DEFAULT_RESERVE_BYTES
    price_per_hour: float | None = None
    memory: MeasureMemory | None = None

    def measure(self, topology: Topology) -> Memory:
        """Peak memory of one GPU."""
        if self.memory is not None:
            return self.memory(self.workload, topology)
        return peak_memory(self.workload, topology, system=self.system, hierarchical=self.hierarchical)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One partition size. `why_not` is empty when it fits."""

    partition_size: int
    memory: Memory
    reserve_bytes: float
    why_not: str
    traffic: dict[str, PhaseTraffic]
    time: StepTime
    price_per_hour: float | None = None

    @property
    def fits(self) -> bool:
        """Whether a GPU can hold it."""
        return not self.why_not

    @property
    def total_bytes(self) -> float:
        """Peak and reserve."""
        return self.memory.total_bytes + self.reserve_bytes

    @property
    def middle_s(self) -> float:
        """A step time to order by."""
        return _middle_s(self.time)

    def cost_per_billion_tokens(self, nodes: int) -> Range | None:
        """In the currency of the price; None without one."""
        if self.price_per_hour is None:
            return None
        per_token = self.price_per_hour * nodes / 3600
        tokens = self.time.tokens_per_s
        return Range(per_token / tokens.high * 1e9, per_token / tokens.low * 1e9)

    def record(self, nodes: int) -> dict[str, Any]:
        """As plain values for JSON."""
        memory: dict[str, int] = {kind: round(self.memory.memory_bytes[kind]) for kind in MEMORY_KINDS}
        memory["reserve"] = round(self.reserve_bytes)
        time = self.time
        record: dict[str, Any] = {
            "partition_size": self.partition_size,
            "fits": self.fits,
            "why_not": self.why_not or None,
            "memory_bytes": {**memory, "total": sum(memory.values())},
            "memory_peak": self.memory.moment,
            "host_memory_bytes": round(self.memory.host_bytes),
            "traffic_bytes": {
                phase: {link: round(size) for link, size in traffic._asdict().items()}
                for phase, traffic in self.traffic.items()
            },
            "step_time_s": time.step_s.ends,
            "tflops_per_gpu": time.tflops_per_gpu.ends,
            "tokens_per_s": time.tokens_per_s.ends,
            "utilization": time.utilization.ends,
        }
        cost = self.cost_per_billion_tokens(nodes)
        return record if cost is None else {**record, "cost_per_billion_tokens": cost.ends}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All candidates, the choice and what speaks for it."""

    request: Request
    candidates: list[Candidate]
    choice: Candidate
    reason: str
    runner_up: Candidate | None
    would_change: list[str]
    network: str

    def record(self) -> dict[str, Any]:
        """The JSON object that `hf-mics plan --json` prints."""
        request = self.request
        cluster, model = request.cluster, request.workload.model
        settings = {name: value for name, value in vars(request.workload).items() if name != "model"}
        return {
            "system": request.system,
            "cluster": cluster.name,
            "world_size": cluster.world_size,
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "gpu_memory_bytes": round(cluster.accelerator.memory_bytes),
            "model": {"name": model.name, "parameters": model.num_parameters},
            "workload": settings,
            "choice": {
                "partition_size": self.choice.partition_size,
                "reason": self.reason,
                "runner_up": self.runner_up.partition_size if self.runner_up else None,
                "would_change": self.would_change,
                "network": self.network,
            },
            "assumptions": assumptions(request),
            "candidates": [candidate.record(cluster.nodes) for candidate in self.candidates],
        }


def make_plan(request: Request) -> Plan:
    """Plans.

    Raises:
        ConfigError: the workload fits at no partition size; says by how much, and what would make it fit.
    """
    candidates = [_candidate(request, p) for p in partition_sizes(request.system, request.cluster)]
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        raise ConfigError(_fits_nowhere(request, candidates))
    fastest = min(candidate.middle_s for candidate in fitting)
    choice = next(c for c in fitting if c.middle_s <= fastest * (1 + _SAME_TIME))
    others = [candidate for candidate in fitting if candidate is not choice]
    runner_up = min(others, key=lambda candidate: candidate.middle_s, default=None)
    return Plan(
        request=request,
        candidates=candidates,
        choice=choice,
        reason=_reason(request, candidates, choice, runner_up),
        runner_up=runner_up,
        would_change=list(_would_change(request, candidates, choice)),
        network=_network(request, choice),
    )


def partition_sizes(system: System, cluster: Cluster) -> tuple[int, ...]:
    """The sizes that a system can take on a cluster."""
    if system in PARTITIONED:
        return valid_partition_sizes(cluster.world_size, cluster.gpus_per_node)
    return (own_partition_size(system, cluster.world_size, 0),)


def assumptions(request: Request) -> list[str]:
    """What the numbers rest on and what they leave out, a line each."""
    workload = request.workload
    grade = "closed form"
    if request.memory is not None:
        grade = "FSDP2 run under fake tensors, closed form where parameters and optimizer state alone do not fit"
    return [
        *request.cluster.assumptions(),
        f"memory: {grade}; plus a reserve of "
        f"{request.reserve_bytes / GB:.1f} GB for CUDA, NCCL and fragmentation; attention keeps no scores; without "
        "dropout, padding masks, and an optimizer that updates all tensors at once",
        f"{workload.precision} computation, fp32 parameters and {workload.optimizer} state, activation checkpointing "
        f"{'on' if workload.activation_checkpointing else 'off'}, partial sums of gradients in fp32",
        "traffic: what the engine sends, without headers and the user's own collectives",
        "time leaves out data loading, checkpoints, gradient clipping, stragglers and shared networks",
        *time_notes(workload, request.cluster),
    ]


def state_fits(request: Request, topology: Topology) -> bool:
    """Whether parameters and optimizer state alone, of which there is no doubt, leave anything for the rest."""
    held = peak_memory(request.workload, topology, system=request.system).memory_bytes
    available = request.cluster.accelerator.memory_bytes - request.reserve_bytes
    return held["parameters"] + held["optimizer"] < available


def _middle_s(time: StepTime) -> float:
    """The geometric mean of the range's ends."""
    return (time.step_s.low * time.step_s.high) ** 0.5


def _candidate(request: Request, partition_size: int) -> Candidate:
    topology = request.cluster.topology(partition_size)
    memory = request.measure(topology)
    available = request.cluster.accelerator.memory_bytes
    missing = memory.total_bytes + request.reserve_bytes - available
    why_not = ""
    if missing > 0:
        why_not = (
            f"needs {(missing + available) / GB:.1f} GB of {available / GB:.0f} GB, {missing / GB:.1f} GB too much"
        )
    options: dict[str, Any] = {"system": request.system, "hierarchical": request.hierarchical}
    return Candidate(
        partition_size=partition_size,
        memory=memory,
        reserve_bytes=request.reserve_bytes,
        why_not=why_not,
        traffic=phase_traffic(request.workload, topology, backend=request.cluster.backend, **options),
        time=predict(request.workload, request.cluster, partition_size=partition_size, **options),
        price_per_hour=request.price_per_hour,
    )


def _reason(request: Request, candidates: list[Candidate], choice: Candidate, runner_up: Candidate | None) -> str:
    available = request.cluster.accelerator.memory_bytes
    need = f"{choice.total_bytes / GB:.1f} of {available / GB:.0f} GB"
    p = choice.partition_size
    if len(candidates) == 1:
        return f"{request.system} has no partition size to choose; a GPU needs {need}."
    smallest = next(candidate for candidate in candidates if candidate.fits)
    if choice is smallest:
        start = f"{p} is the smallest partition group in which the model fits ({need})"
    else:
        faster = smallest.middle_s / choice.middle_s - 1
        start = f"{p} is {faster:.0%} faster than the smallest group that fits ({smallest.partition_size}), at {need}"
    if runner_up is None:
        return f"{start}, and the only one."
    if runner_up.partition_size < p:
        return f"{start}."
    slower = runner_up.middle_s / choice.middle_s - 1
    if slower < _SAME_TIME:
        return f"{start}; {runner_up.partition_size} would be as fast and only free memory."
    return f"{start}; beyond it communication grows: {runner_up.partition_size} would take {slower:.0%} longer."


def _would_change(request: Request, candidates: list[Candidate], choice: Candidate) -> Iterator[str]:
    available = request.cluster.accelerator.memory_bytes
    smaller = [c for c in candidates if c.partition_size < choice.partition_size]
    if smaller and not any(candidate.fits for candidate in smaller):
        next_smaller = smaller[-1]
        missing = next_smaller.total_bytes - available
        yield f"{missing / GB:.1f} GB more on every GPU: {next_smaller.partition_size} would fit"
        for way in _ways_to_fit(request, [next_smaller.partition_size]):
            yield f"{way}: {next_smaller.partition_size} would fit"
    heavier = replace(request.workload, micro_batch=2 * request.workload.micro_batch)
    if not _fits(replace(request, workload=heavier), choice.partition_size):
        yield f"micro-batch {heavier.micro_batch}: {choice.partition_size} would no longer fit"
    if request.system == "mics" and request.hierarchical and choice.partition_size > request.cluster.gpus_per_node:
        # It fits, with fewer buffers.
        flat = predict(request.workload, request.cluster, partition_size=choice.partition_size, hierarchical=False)
        faster = choice.middle_s / _middle_s(flat) - 1
        if faster >= _SAME_TIME:
            yield f"one-stage collectives, --flat: {choice.partition_size} would be {faster:.0%} faster"


def _ways_to_fit(request: Request, sizes: Sequence[int]) -> Iterator[str]:
    """What makes the workload fit at one of `sizes`, smallest first; how much host memory that takes, if any."""
    for what, workload in _lighter(request):
        lighter = replace(request, workload=workload)
        largest = next((p for p in reversed(sizes) if _fits(lighter, p)), None)
        if largest is None:
            continue
        topology = request.cluster.topology(largest)
        host = peak_memory(workload, topology, system=request.system).host_bytes * topology.node_size
        yield f"{what} ({host / GB:.0f} GB of a node's memory)" if host else what


def _lighter(request: Request) -> Iterator[tuple[str, Workload]]:
    """Ways to need less memory, the gentlest first."""
    workload = request.workload
    if not workload.activation_checkpointing:
        yield "activation checkpointing", replace(workload, activation_checkpointing=True)
    if workload.micro_batch > 1:
        yield "micro-batch 1", replace(workload, micro_batch=1)
        if not workload.activation_checkpointing:
            both = replace(workload, micro_batch=1, activation_checkpointing=True)
            yield "micro-batch 1 with activation checkpointing", both
    if not workload.cpu_offload and request.system != "ddp":
        yield "CPU offload of parameters and optimizer state", replace(workload, cpu_offload=True)


def _fits(request: Request, partition_size: int) -> bool:
    """Whether it fits by the closed form, which is what changes are estimated with."""
    topology = request.cluster.topology(partition_size)
    memory = peak_memory(request.workload, topology, system=request.system, hierarchical=request.hierarchical)
    return memory.total_bytes + request.reserve_bytes <= request.cluster.accelerator.memory_bytes


def _fits_nowhere(request: Request, candidates: list[Candidate]) -> str:
    cluster, model = request.cluster, request.workload.model
    best = min(candidates, key=lambda candidate: candidate.total_bytes)
    ways = list(_ways_to_fit(request, [candidate.partition_size for candidate in candidates]))
    tokens = _short_enough(request, best.partition_size)
    ways += [f"sequences of {tokens}"] if tokens else []
    nodes = _enough_nodes(request)
    ways += [f"{nodes} nodes"] if nodes else []
    group = _mics_group(request)
    ways += [f"MiCS in partition groups of {group}"] if group else []
    if not ways:
        missing = best.total_bytes - cluster.accelerator.memory_bytes
        ways.append(f"GPUs with {missing / GB:.1f} GB more")
    return (
        f"{model.name} ({model.num_parameters / 1e9:.1f}B parameters) fits at no partition size on {cluster.nodes} x "
        f"{cluster.gpus_per_node} {cluster.accelerator.name}: at best, with {request.system} at "
        f"{best.partition_size}, a GPU {best.why_not}. It would fit with: {'; or '.join(ways)}."
    )


def _short_enough(request: Request, partition_size: int) -> int | None:
    """The length of sequences, by halving, at which it fits."""
    tokens = request.workload.seq_length // 2
    while tokens >= _FEWEST_TOKENS:
        if _fits(replace(request, workload=replace(request.workload, seq_length=tokens)), partition_size):
            return tokens
        tokens //= 2
    return None


def _mics_group(request: Request) -> int | None:
    """The smallest partition group in which MiCS would hold what a peer does not."""
    if request.system == "mics":
        return None
    mics = replace(request, system="mics")
    return next((p for p in partition_sizes("mics", request.cluster) if _fits(mics, p)), None)


def _enough_nodes(request: Request) -> int | None:
    """The number of nodes, by doubling, on which it fits."""
    nodes = 2 * request.cluster.nodes
    most = min(_MOST_NODES, MOST_RANKS // request.cluster.gpus_per_node)
    while nodes <= most and request.cluster.inter_node is not None:
        larger = replace(request, cluster=request.cluster.with_nodes(nodes))
        if any(_fits(larger, p) for p in partition_sizes(request.system, larger.cluster)):
            return nodes
        nodes *= 2
    return None


def _network(request: Request, choice: Candidate) -> str:
    """What MiCS has to win over full sharding on this network, at both ends of the ranges."""
    cluster, workload = request.cluster, request.workload
    if request.system != "mics" or cluster.nodes == 1:
        return ""
    gains, waits = [], []
    for speed in (1.0, 0.0):
        rates = cluster.rates(speed)
        peer = predict_at(workload, cluster, rates, system="zero3", partition_size=cluster.world_size)
        waits.append(peer.exposed_s / peer.step_s)
        mine = predict_at(
            workload, cluster, rates, partition_size=choice.partition_size, hierarchical=request.hierarchical
        )
        gains.append(peer.step_s / mine.step_s)
    low, high = min(gains), max(gains)
    full = f"sharding over all {cluster.world_size} GPUs (ZeRO-3)"
    if low >= 1 + _WORTH_IT:
        return f"MiCS is predicted to be {low:.2f}x to {high:.2f}x as fast as {full}."
    if high >= 1 + _WORTH_IT:
        return (
            f"MiCS may have little to win on this network: {low:.2f}x to {high:.2f}x the speed of {full}. "
            "hf-mics measure narrows that."
        )
    if max(waits) < _HIDDEN:
        why = "whose gathers hide behind computing"
    else:
        spans = max(1, choice.partition_size // cluster.gpus_per_node)
        why = (
            f"as the model fills {spans} of {cluster.nodes} nodes, so that both wait for the network; larger "
            "micro-batches help both"
        )
    return (
        f"MiCS has nothing to win on this network: it is predicted to have {low:.2f}x to {high:.2f}x the speed of "
        f"{full}, {why}."
    )
