"""What is one benchmark run? A system, a model, a cluster, and what they are asked to do; plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from hf_mics.errors import ConfigError
from hf_mics.topology import Topology

Wire = Literal["float32", "bfloat16"]
ModelName = Literal["gpt2", "bert", "gpt2-short"]

OWN_ENVIRONMENT = "hf_mics"
DEEPSPEED = "deepspeed"
DEEPSPEED_MICS = "deepspeed-mics"


@dataclass(frozen=True, kw_only=True)
class System:
    """One way to train.

    Args:
        label: what the report calls it.
        how: how it was configured, in a sentence.
        environment: where it is installed: this one, or the name of a peer's own (see `peers.py`).
        partitioned: whether it takes a partition size.
        equal_losses: whether it trains the same model; False for the bound that does not communicate.
    """

    label: str
    how: str
    environment: str = OWN_ENVIRONMENT
    partitioned: bool = False
    equal_losses: bool = True


SYSTEMS: dict[str, System] = {
    "reference": System(
        label="one process",
        how="the whole global batch in one process, micro-batch by micro-batch; torch AdamW",
    ),
    "no-communication": System(
        label="no communication (bound)",
        how="every rank trains a model of its own: what a step costs without any network",
        equal_losses=False,
    ),
    "ddp": System(
        label="DDP, no_sync",
        how="DistributedDataParallel, gradient_as_bucket_view, no_sync but in the last micro-step",
    ),
    "fsdp2": System(
        label="FSDP2, all ranks",
        how="fully_shard per block and root over all ranks, reduce-scatter every micro-step (ZeRO-3)",
    ),
    "fsdp2-no-sync": System(
        label="FSDP2, all ranks, no_sync",
        how="fully_shard over all ranks, set_requires_gradient_sync(False) but in the last micro-step",
    ),
    "accelerate-fsdp2": System(
        label="accelerate FSDP2, sync_each_batch",
        how="Accelerator with FSDP2 over all ranks, GradientAccumulationPlugin(sync_each_batch=True)",
    ),
    "accelerate-fsdp2-no-sync": System(
        label="accelerate FSDP2, no_sync",
        how="Accelerator with FSDP2 over all ranks, accumulate() as documented",
    ),
    "accelerate-hybrid": System(
        label="accelerate hybrid, sync_each_batch",
        how="Accelerator with ParallelismConfig(dp_replicate, dp_shard), all-reduce every micro-step",
        partitioned=True,
    ),
    "accelerate-hybrid-no-sync": System(
        label="accelerate hybrid, no_sync",
        how="Accelerator with ParallelismConfig(dp_replicate, dp_shard), accumulate() as documented",
        partitioned=True,
    ),
    "transformers-hybrid": System(
        label="transformers DistributedConfig",
        how="from_pretrained(distributed_config=DistributedConfig(fsdp_size, dp_replicate_size)), all-reduce deferred "
        "to the last micro-step as transformers' Trainer does",
        partitioned=True,
    ),
    "deepspeed-zero2": System(
        label="DeepSpeed ZeRO-2",
        how="stage 2, torch AdamW, defaults otherwise",
        environment=DEEPSPEED,
    ),
    "deepspeed-zero3": System(
        label="DeepSpeed ZeRO-3",
        how="stage 3, torch AdamW, stage3_param_persistence_threshold 0; stage3_max_live_parameters and "
        "stage3_max_reuse_distance a tenth of the model, as the defaults are of a model of 10 billion parameters: "
        "parameters are gathered for forward and again for backward",
        environment=DEEPSPEED,
    ),
    "deepspeed-zero3-reuse": System(
        label="DeepSpeed ZeRO-3, gathered once",
        how="stage 3 with the default stage3_max_reuse_distance (1e9): a model this small stays gathered from forward "
        "to backward, so every rank holds it whole",
        environment=DEEPSPEED,
    ),
    "deepspeed-0.19.1-zero3": System(
        label="DeepSpeed 0.19.1 ZeRO-3",
        how="as DeepSpeed ZeRO-3, in the last release whose MiCS runs over gloo",
        environment=DEEPSPEED_MICS,
    ),
    "deepspeed-0.19.1-mics": System(
        label="DeepSpeed 0.19.1 MiCS",
        how="as DeepSpeed 0.19.1 ZeRO-3 with mics_shard_size; partitioned after construction",
        environment=DEEPSPEED_MICS,
        partitioned=True,
    ),
    "mics": System(
        label="hf_mics",
        how="MiCSAccelerator(mics_plugin=MiCSPlugin(partition_size)), accumulate() as documented",
        partitioned=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One run.

    Args:
        system: a key of `SYSTEMS`.
        model: "gpt2" (10.6 M parameters) or "bert" (10.8 M); "gpt2-short" is a tenth of that, for short runs.
        nodes, node_size: nodes and ranks per node.
        rate_mbit: the rate of each node's NIC, both ways; None: not shaped.
        cpus_per_node: the share of this machine's CPUs that a node has; None: what the others leave it.
        micro_steps: micro-steps per optimizer step.
        partition_size: ranks in a partition group; None for systems without.
        hierarchical: two-stage collectives where a partition group spans nodes (hf_mics; in DeepSpeed's MiCS
            `mics_hierarchical_params_gather`).
        two_hop: False: all-reduce between partition groups in every micro-step (hf_mics only).
        wire: the dtype in which gradients travel (hf_mics only).
        steps: timed optimizer steps, after `warm_up_steps` others; losses are compared over all of them.
        rows, tokens: shape of the batch of one rank in one micro-step.

    Raises:
        ConfigError: an unknown system or model, a count below one, or a partition size where none belongs.
        TopologyError: a partition size that forms no groups.
    """

    system: str
    model: ModelName = "gpt2"
    nodes: int = 4
    node_size: int = 2
    cpus_per_node: float | None = None
    rate_mbit: float | None = 400.0
    micro_steps: int = 4
    partition_size: int | None = None
    hierarchical: bool = True
    two_hop: bool = True
    wire: Wire = "float32"
    steps: int = 4
    warm_up_steps: int = 1
    rows: int = 1
    tokens: int = 32

    def __post_init__(self) -> None:
        if self.system not in SYSTEMS:
            raise ConfigError(f"unknown system {self.system!r}: expected one of {', '.join(SYSTEMS)}.")
        if self.model not in get_args(ModelName):
            raise ConfigError(f"unknown model {self.model!r}: expected one of {', '.join(get_args(ModelName))}.")
        if self.wire not in get_args(Wire):
            raise ConfigError(f"unknown wire {self.wire!r}: expected one of {', '.join(get_args(Wire))}.")
        for name in ("nodes", "node_size", "micro_steps", "steps", "rows", "tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
        if self.spec.partitioned != (self.partition_size is not None):
            wanted = "needs a partition_size" if self.spec.partitioned else "takes no partition_size"
            raise ConfigError(f"system {self.system!r} {wanted}, got {self.partition_size!r}.")
        if self.partition_size is not None:
            _ = self.topology

    @property
    def spec(self) -> System:
        """The system."""
        return SYSTEMS[self.system]

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.node_size

    @property
    def topology(self) -> Topology:
        """The groups; of one partition group where the system has none."""
        partition_size = self.partition_size or self.world_size
        return Topology(world_size=self.world_size, node_size=self.node_size, partition_size=partition_size)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all ranks together train on in one optimizer step."""
        return self.world_size * self.micro_steps * self.rows * self.tokens

    @property
    def variant(self) -> str:
        """The system with what distinguishes it, as in mics-p4-flat."""
        parts = [self.system]
        if self.partition_size is not None:
            parts.append(f"p{self.partition_size}")
        parts += [
            word
            for word, applies in (
                ("flat", not self.hierarchical),
                ("one-hop", not self.two_hop),
                ("bf16-wire", self.wire == "bfloat16"),
            )
            if applies
        ]
        return "-".join(parts)

    @property
    def identity(self) -> str:
        """A name that is the same for equal runs, whatever the number of steps."""
        rate = "unshaped" if self.rate_mbit is None else f"{self.rate_mbit:g}mbit"
        share = "" if self.cpus_per_node is None else f"-{self.cpus_per_node:g}cpus"
        return (
            f"{self.model}-{self.nodes}x{self.node_size}{share}-{rate}-acc{self.micro_steps}-"
            f"{self.rows}x{self.tokens}-{self.variant}"
        )

    @property
    def label(self) -> str:
        """What the report calls it, as in `hf_mics, p = 4, flat`."""
        words = [self.spec.label]
        if self.partition_size is not None:
            words.append(f"p = {self.partition_size}")
        words += [
            word
            for word, applies in (
                ("flat", not self.hierarchical and self.topology.nodes_per_partition > 1),
                ("hop 2 every micro-step", not self.two_hop),
                ("bf16 wire", self.wire == "bfloat16"),
            )
            if applies
        ]
        return ", ".join(words)

    def to_json(self) -> dict[str, Any]:
        """As a dictionary of plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Configuration:
        """From `to_json`'s dictionary.

        Raises:
            ConfigError: an unknown or a missing field.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown or "system" not in values:
            raise ConfigError(f"not a benchmark configuration: unknown fields {unknown}, or no system in {values}.")
        return cls(**values)
