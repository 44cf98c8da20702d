"""What does a cluster offer to one training step: how fast does it compute, and how fast do its links carry?

Values. Nothing is a single number until it was measured: a `Range` spans what the data sheet and a stated assumption
allow, and `Cluster.sources` says where each one comes from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from hf_mics.errors import ConfigError, TopologyError
from hf_mics.meter import Phase
from hf_mics.topology import Topology, require_world_size
from hf_mics.traffic import Backend

Lane = Literal["intra_node", "inter_node"]


@dataclass(frozen=True)
class Range:
    """Everything from `low` to `high`, both included; equal when the value is known.

    Args:
        typical: the value that was found most often, where it was measured; None is the middle.

    Raises:
        ConfigError: not finite, negative, or in the wrong order.
    """

    low: float
    high: float
    typical: float | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.low <= self.high < math.inf):
            raise ConfigError(f"a range must be 0 <= low <= high and finite, got {self.low!r} to {self.high!r}.")
        if self.typical is not None and not self.low <= self.typical <= self.high:
            raise ConfigError(f"a range's typical value must lie in it, got {self.typical!r} of {_span(self)}.")

    @classmethod
    def over(cls, *values: float) -> Range:
        """The range from the least to the greatest of `values`; of one, that value alone."""
        return cls(min(values), max(values))

    @property
    def ends(self) -> list[float]:
        """[low, high], as JSON has it."""
        return [self.low, self.high]

    def scaled(self, factor: float) -> Range:
        """Both ends times `factor`."""
        typical = None if self.typical is None else self.typical * factor
        return Range(self.low * factor, self.high * factor, typical)

    def at(self, fraction: float) -> float:
        """The value at `fraction` of the way from low (0) through the typical one (0.5) to high (1)."""
        if self.typical is None:
            return self.low + fraction * (self.high - self.low)
        if fraction <= 0.5:
            return self.low + 2 * fraction * (self.typical - self.low)
        return self.typical + (2 * fraction - 1) * (self.high - self.typical)


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link as a latency and a bandwidth: carrying n bytes in s steps takes s * latency_s + n / bandwidth_bytes_per_s.

    Args:
        bandwidth_bytes_per_s: inside a node, of one GPU to the others; between nodes, of one node's whole network
            interface. Per direction.
        latency_s: of one step of a collective, for example of a ring's n - 1.
    """

    bandwidth_bytes_per_s: Range
    latency_s: Range

    def __post_init__(self) -> None:
        if self.bandwidth_bytes_per_s.low <= 0:
            raise ConfigError(
                f"a link's bandwidth must be positive, got {self.bandwidth_bytes_per_s.low:g} bytes per second."
            )


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One GPU, or one rank's share of a CPU.

    Args:
        name: for example A100-40GB.
        memory_bytes: of the device.
        peak_flops_per_s: dense peak at the precision of training; of measured GPUs the 16-bit one, of CPUs the best
            matrix product that was measured.

    Raises:
        ConfigError: a size that is not positive.
    """

    name: str
    memory_bytes: float
    peak_flops_per_s: float

    def __post_init__(self) -> None:
        require_positive(f"{self.name}: memory in bytes", self.memory_bytes)
        require_positive(f"{self.name}: peak in FLOP/s", self.peak_flops_per_s)


@dataclass(frozen=True)
class Rates:
    """A cluster at one point of its ranges: plain numbers, from which a time can be computed.

    `links` holds (latency_s, bandwidth_bytes_per_s) by lane and, where measured, by (phase, lane); `head_flops_per_s`
    is None where the head computes at `flops_per_s`; the rest is as in `Cluster`.
    """

    flops_per_s: float
    update_bytes_per_s: float | None
    links: Mapping[Lane | tuple[Phase, Lane], tuple[float, float]]
    ring_lockstep: float = 0.0
    head_flops_per_s: float | None = None
    update_s_per_tensor: float = 0.0

    def link(self, phase: Phase, lane: Lane) -> tuple[float, float]:
        """(latency_s, bandwidth_bytes_per_s) of `phase` on `lane`."""
        own = self.links.get((phase, lane))
        return own if own is not None else self.links[lane]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal GPUs, and what computing and communicating on them costs.

    Args:
        name: an instance type, or what the user called it.
        nodes: how many. `gpus_per_node`: ranks on each (k).
        accelerator: the GPU.
        intra_node: the link between the GPUs of a node; per GPU.
        inter_node: a node's network interface; per node. None when it was not measured; then there is one node.
        compute_efficiency: fraction of the peak that forward and backward reach while nothing is waited for.
        head_efficiency: the same of the operations of the head, with everything else outside layers (embeddings, loss)
            charged to them; None takes `compute_efficiency`.
        update_bytes_per_s: memory traffic of the optimizer step; None leaves the step out.
        update_s_per_tensor: what the optimizer takes for each parameter tensor besides; None is nothing.
        ring_lockstep: what a step inside a node costs on a ring that also goes between nodes: 0 that link's own
            latency, as NCCL's tuning model has it; 1 that of the slowest link, as MiCS's model of latency has it.
        backend: "nccl" communicates beside computing and coalesces small gathers; "gloo" runs only hop 2 beside it.
        collectives: links by phase, where `hf-mics measure` found that phases differ.
        sources: where each field's value comes from, by field name.

    Raises:
        ConfigError: a count that is not a positive integer, an efficiency above 1, or several nodes without a link.
        TopologyError: more GPUs than any job has.
    """

    name: str
    nodes: int
    gpus_per_node: int
    accelerator: Accelerator
    intra_node: Link
    inter_node: Link | None
    compute_efficiency: Range
    update_bytes_per_s: Range | None = None
    update_s_per_tensor: Range | None = None
    head_efficiency: Range | None = None
    ring_lockstep: Range = Range(0.0, 1.0)
    backend: Backend = "nccl"
    collectives: Mapping[tuple[Phase, Lane], Link] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{self.name}: {name} must be a positive integer, got {value!r}.")
        require_world_size(self.world_size)
        for name in ("compute_efficiency", "head_efficiency"):
            efficiency = getattr(self, name)
            if efficiency is not None and not 0 < efficiency.low <= efficiency.high <= 1:
                raise ConfigError(f"{self.name}: {name} must lie above 0 and not above 1, got {_span(efficiency)}.")
        if self.backend not in get_args(Backend):
            raise ConfigError(
                f"{self.name}: backend must be one of {', '.join(get_args(Backend))}, got {self.backend!r}."
            )
        if self.nodes > 1 and self.inter_node is None:
            raise ConfigError(
                f"{self.name}: {self.nodes} nodes were asked for, but nothing is known of the links between nodes. "
                "Measure on two nodes or more, or stay on one: --nodes 1 for plan, --to-gpus for simulate."
            )

    @property
    def world_size(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    def topology(self, partition_size: int) -> Topology:
        """The groups of a partition size.

        Raises:
            TopologyError: it forms none.
        """
        return Topology(world_size=self.world_size, node_size=self.gpus_per_node, partition_size=partition_size)

    def with_nodes(self, nodes: int) -> Cluster:
        """The same nodes, `nodes` of them."""
        return replace(self, nodes=nodes)

    def with_world_size(self, world_size: int) -> Cluster:
        """The same nodes, as many as hold `world_size` GPUs; fewer GPUs than a node has stay in one.

        Raises:
            TopologyError: the last node would not be full.
        """
        if world_size < self.gpus_per_node:
            return replace(self, nodes=1, gpus_per_node=world_size)
        if world_size % self.gpus_per_node:
            raise TopologyError(
                f"world_size must be nodes x GPUs per node, got {world_size} = {world_size // self.gpus_per_node} x "
                f"{self.gpus_per_node} + {world_size % self.gpus_per_node}."
            )
        return self.with_nodes(world_size // self.gpus_per_node)

    def rates(self, speed: float | Mapping[str, float]) -> Rates:
        """The cluster at one point of its ranges.

        Args:
            speed: 0 takes the slow end of every range, 1 the fast end; or a value for each of `constants`.
        """
        at = speed if isinstance(speed, Mapping) else dict.fromkeys(self.constants, speed)
        links: dict[Lane | tuple[Phase, Lane], tuple[float, float]] = {}
        for lane, link in self._lanes():
            links[lane] = _point(link, at[f"{lane}.latency_s"], at[f"{lane}.bandwidth_bytes_per_s"])
        for (phase, lane), link in self.collectives.items():
            links[phase, lane] = _point(link, at[f"{lane}.latency_s"], at[f"{lane}.bandwidth_bytes_per_s"])
        peak, head = self.accelerator.peak_flops_per_s, self.head_efficiency
        update, per_tensor = self.update_bytes_per_s, self.update_s_per_tensor
        return Rates(
            flops_per_s=peak * self.compute_efficiency.at(at["compute_efficiency"]),
            head_flops_per_s=None if head is None else peak * head.at(at["head_efficiency"]),
            update_bytes_per_s=None if update is None else update.at(at["update_bytes_per_s"]),
            update_s_per_tensor=0.0 if per_tensor is None else per_tensor.at(1 - at["update_s_per_tensor"]),
            links=links,
            ring_lockstep=self.ring_lockstep.at(1 - at.get("ring_lockstep", 1.0)),
        )

    @property
    def constants(self) -> dict[str, Range]:
        """Every number that a predicted time depends on, by name."""
        found = {"compute_efficiency": self.compute_efficiency}
        for name in ("head_efficiency", "update_bytes_per_s", "update_s_per_tensor"):
            if (known := getattr(self, name)) is not None:
                found[name] = known
        for lane, link in self._lanes():
            found[f"{lane}.latency_s"] = link.latency_s
            found[f"{lane}.bandwidth_bytes_per_s"] = link.bandwidth_bytes_per_s
        if self.inter_node is not None:
            found["ring_lockstep"] = self.ring_lockstep
        return found

    def assumptions(self) -> list[str]:
        """One line for each constant: its name, its range and where it comes from."""
        return [
            f"{name}: {_span(found)} ({self.sources.get(name.partition('.')[0], 'as given')})"
            for name, found in self.constants.items()
        ]

    def _lanes(self) -> list[tuple[Lane, Link]]:
        lanes: list[tuple[Lane, Link]] = [("intra_node", self.intra_node)]
        if self.inter_node is not None:
            lanes.append(("inter_node", self.inter_node))
        return lanes


def require_positive(name: str, value: float) -> None:
    """Raises ConfigError unless `value` is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a positive number, got {value!r}.")


def _point(link: Link, latency_speed: float, bandwidth_speed: float) -> tuple[float, float]:
    return link.latency_s.at(1 - latency_speed), link.bandwidth_bytes_per_s.at(bandwidth_speed)


def _span(found: Range) -> str:
    return f"{found.low:.3g}" if found.low == found.high else f"{found.low:.3g} to {found.high:.3g}"
