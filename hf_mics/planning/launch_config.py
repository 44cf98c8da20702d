"""Which accelerate config makes a job train with given partition groups, and how is it launched?"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from hf_mics.errors import ConfigError
from hf_mics.planning.new_file import write_new
from hf_mics.planning.workload import Precision, require_count
from hf_mics.topology import Topology

_MIXED_PRECISION = {"bf16": "bf16", "fp16": "fp16", "fp32": "'no'"}


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """A job of `nodes` x `gpus_per_node` ranks in partition groups of `partition_size`.

    Args:
        precision: accelerate's mixed precision; "fp32" is none.
        activation_checkpointing: whether layers are recomputed in backward.
        cpu_offload: whether parameters and optimizer state live in host memory.
        hierarchical: two-stage collectives where a partition group spans nodes; no config holds it, the command does.

    Raises:
        ConfigError, TopologyError: sizes that form no groups.
    """

    nodes: int
    gpus_per_node: int
    partition_size: int
    precision: Precision = "bf16"
    activation_checkpointing: bool = True
    cpu_offload: bool = False
    hierarchical: bool = True

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "partition_size"):
            require_count(name, getattr(self, name))
        _ = self.topology  # raises when the sizes form no groups

    @property
    def topology(self) -> Topology:
        """The groups."""
        return Topology(
            world_size=self.nodes * self.gpus_per_node,
            node_size=self.gpus_per_node,
            partition_size=self.partition_size,
        )

    def yaml(self) -> str:
        """The config file's text."""
        topology = self.topology
        several = self.nodes > 1
        lines = [
            f"# MiCS on {self.nodes} x {self.gpus_per_node} GPUs: {topology.replication_size} partition groups of "
            f"{self.partition_size}.",
            "#",
            "# Launch" + (" on every machine, with its own rank and the address of machine 0:" if several else ":"),
            f"#     {self.command('mics.yaml')}",
            "compute_environment: LOCAL_MACHINE",
            "distributed_type: FSDP",
            f"num_machines: {self.nodes}",
            "machine_rank: 0",
            *(["main_process_port: 29500", "rdzv_backend: static", "same_network: true"] if several else []),
            f"num_processes: {topology.world_size}",
            "main_training_function: main",
            f"mixed_precision: {_MIXED_PRECISION[self.precision]}",
            "fsdp_config:",
            "  fsdp_version: 2",
            "  fsdp_reshard_after_forward: true",
            f"  fsdp_activation_checkpointing: {str(self.activation_checkpointing).lower()}",
            f"  fsdp_offload_params: {str(self.cpu_offload).lower()}",
            "  fsdp_cpu_ram_efficient_loading: true",
            "  fsdp_state_dict_type: SHARDED_STATE_DICT",
            "  # No fsdp_auto_wrap_policy and no fsdp_transformer_layer_cls_to_wrap: hf_mics finds the layers.",
            "parallelism_config:",
            f"  parallelism_config_dp_shard_size: {self.partition_size}",
            f"  parallelism_config_dp_replicate_size: {topology.replication_size}",
        ]
        return "\n".join(lines) + "\n"

    def command(self, file: str) -> str:
        """How to launch a script with the config `file`."""
        where = f" --machine_rank 0..{self.nodes - 1} --main_process_ip HOST" if self.nodes > 1 else ""
        flags = "" if self.hierarchical else " --flat"
        return f"accelerate launch --config_file {shlex.quote(file)}{where} -m hf_mics{flags} train.py"

    def save(self, file: str, *, force: bool) -> None:
        """Writes the config.

        Raises:
            ConfigError: no name, or one that accelerate would read as JSON; the file exists and `force` is not set, or
                cannot be written.
        """
        if not file.strip():
            raise ConfigError(f"no name for the config: expected a file, for example mics.yaml, got {file!r}.")
        if file.endswith(".json"):
            raise ConfigError(
                f"the config is written as YAML, and accelerate reads a name that ends in .json as JSON: got {file!r}, "
                f"choose for example {file.removesuffix('json') + 'yaml'!r}."
            )
        write_new(Path(file), self.yaml(), force=force)
