"""Which partition groups does an accelerate config ask for, and do they form?"""

from __future__ import annotations

from typing import Any

from hf_mics.commands.config_keys import PARALLEL, Config, int_or_none, section
from hf_mics.errors import TopologyError
from hf_mics.topology import Topology

_OTHER_PARALLELISM = ("tp_size", "cp_size", "sp_size")


class Sizes:
    """The groups that `config`, as accelerate reads it, asks for: the topology if they form, mistakes otherwise."""

    def __init__(self, config: Config) -> None:
        self.mistakes: list[str] = []
        self.notes: list[str] = []
        self.topology: Topology | None = None
        parallel = section(config, "parallelism_config")
        self._check_other_parallelism(parallel)
        machines = self._count("num_machines", config.get("num_machines", 1))
        processes = self._count("num_processes", config.get("num_processes"), missing="the number of all GPUs")
        self._check_quotes(config, machines)
        found = len(self.mistakes)
        shard = self._optional_count(parallel, "dp_shard_size")
        replicate = self._optional_count(parallel, "dp_replicate_size")
        are_counts = len(self.mistakes) == found
        if machines is None or processes is None:
            return
        if processes % machines:
            self.mistakes.append(
                f"num_processes counts the GPUs of all machines together, and must be a multiple of num_machines: got "
                f"{processes} and {machines}"
            )
            return
        self._check_machine(config, machines, processes // machines)
        if are_counts:
            self._form_groups(machines, processes, shard, replicate)

    def _check_quotes(self, config: Config, machines: int | None) -> None:
        """Accelerate compares num_machines, and divides num_processes by it where there are several, as they stand."""
        for name in ("num_machines", "num_processes") if machines != 1 else ("num_machines",):
            if isinstance(config.get(name), str) and int_or_none(config[name]) is not None:
                self.mistakes.append(f"{name} must be a number without quotes, got {config[name]!r}")

    def _check_machine(self, config: Config, machines: int, node_size: int) -> None:
        rank = config.get("machine_rank")
        if rank is not None and int_or_none(rank) not in range(machines):
            self.mistakes.append(f"machine_rank must be 0 to {machines - 1} with num_machines {machines}, got {rank!r}")
        ids = config.get("gpu_ids")
        if isinstance(ids, str) and ids != "all" and len(ids.split(",")) < node_size:
            self.mistakes.append(
                f"gpu_ids names {len(ids.split(','))} GPUs, and num_processes over num_machines puts {node_size} "
                "ranks on a node: set gpu_ids: all, or fewer processes"
            )

    def _form_groups(self, machines: int, processes: int, shard: int | None, replicate: int | None) -> None:
        node_size = processes // machines
        if shard is None and replicate is not None:
            if processes % replicate:
                self.mistakes.append(f"dp_replicate_size {replicate} does not divide num_processes {processes}")
                return
            self.mistakes.append(
                f"dp_replicate_size without dp_shard_size: set dp_shard_size to {processes // replicate}"
            )
            return
        try:
            groups = Topology(world_size=processes, node_size=node_size, partition_size=shard or node_size)
        except TopologyError as error:
            self.mistakes.append(f"{error} (dp_shard_size is the partition_size.)" if shard else str(error))
            return
        if shard is None:
            self.notes.append(f"no dp_shard_size: a node of {node_size} is the partition group")
        elif groups.replication_size != (replicate or 1):
            self.mistakes.append(
                f"dp_shard_size x dp_replicate_size must be num_processes: got {shard} x {replicate or 1} = "
                f"{shard * (replicate or 1)}, expected {processes}; set dp_replicate_size to {groups.replication_size}"
            )
            return
        self.topology = groups

    def _check_other_parallelism(self, parallel: Config) -> None:
        for name in _OTHER_PARALLELISM:
            value = parallel.get(PARALLEL + name, 1)
            if type(value) is not int or value != 1:
                self.mistakes.append(f"{PARALLEL}{name} is {value!r}: MiCS shards data parallelism only, leave it out")

    def _optional_count(self, parallel: Config, name: str) -> int | None:
        key = PARALLEL + name
        return self._count(key, parallel[key]) if key in parallel else None

    def _count(self, name: str, value: Any, missing: str = "") -> int | None:
        if value is None and missing:
            self.mistakes.append(f"no {name}: set it to {missing}")
            return None
        found = int_or_none(value)
        if found is None or found < 1:
            self.mistakes.append(f"{name} must be a positive integer, got {value!r}")
            return None
        return found
