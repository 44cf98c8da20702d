"""Which partition size should a model be trained with? Memory, traffic and time of each, and a choice."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import get_args

from hf_mics.commands.cluster_options import add_cluster_arguments, cluster_from_options
from hf_mics.commands.workload_options import add_workload_arguments, workload_from_options
from hf_mics.errors import ConfigError
from hf_mics.planning.cluster import Cluster, require_positive
from hf_mics.planning.launch_config import LaunchConfig
from hf_mics.planning.memory import Memory, peak_memory
from hf_mics.planning.plan import (
    DEFAULT_RESERVE_BYTES,
    GB,
    MeasureMemory,
    Plan,
    Request,
    make_plan,
    partition_sizes,
    state_fits,
)
from hf_mics.planning.timing import System
from hf_mics.planning.workload import Workload
from hf_mics.topology import Topology


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_workload_arguments(parser, accumulation="micro-steps per optimizer step (default 1)")
    parser.add_argument("--nodes", type=int, help="machines (default: the cluster file's, or 1)")
    parser.add_argument("--world-size", type=int, help="GPUs in all, to be checked against nodes x GPUs per node")
    parser.add_argument("--cpu-offload", action="store_true", help="parameters and optimizer state in host memory")
    parser.add_argument("--system", choices=get_args(System), default="mics", help="plan a peer instead of MiCS")
    parser.add_argument("--flat", action="store_true", help="one-stage collectives in groups that span nodes")
    parser.add_argument(
        "--reserve", type=float, default=DEFAULT_RESERVE_BYTES / GB, metavar="GB", help="kept free (default 2 GB)"
    )
    parser.add_argument("--probe", action="store_true", help="run FSDP2 under fake tensors for the memory (minutes)")
    add_cluster_arguments(parser)
    parser.add_argument("--price-per-hour", type=float, metavar="PRICE", help="of one node, for costs")
    parser.add_argument("--save", metavar="FILE", help="write the choice's accelerate config there")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: argparse.Namespace) -> None:
    """Plans, writes the config if asked to, and prints."""
    request = _request(options)
    plan = make_plan(request)
    config = _config(plan)
    if options.save is not None:
        if request.system != "mics":
            raise ConfigError(f"--save writes a MiCS config, and this plans {request.system}: leave out --system.")
        config.save(options.save, force=options.force)
    if options.json:
        print(json.dumps(plan.record(), indent=2))
    else:
        from hf_mics.commands.plan_report import print_plan

        print_plan(plan)
    if options.save is not None:
        where = sys.stderr if options.json else sys.stdout
        print(f"\nwrote {options.save}; launch with:\n  {config.command(options.save)}", file=where)


def _request(options: argparse.Namespace) -> Request:
    if options.model is None:
        raise ConfigError("no model: expected --model PRESET, config.json, folder or hub name.")
    workload = workload_from_options(options, accumulation=1, cpu_offload=options.cpu_offload)
    cluster = cluster_from_options(options, options.nodes)
    _check_world_size(options.world_size, cluster)
    if options.price_per_hour is not None:
        require_positive("--price-per-hour", options.price_per_hour)
    if not 0 <= options.reserve < cluster.accelerator.memory_bytes / GB:
        raise ConfigError(
            f"--reserve must be between 0 and the GPU's {cluster.accelerator.memory_bytes / GB:.0f} GB, got "
            f"{options.reserve:g}."
        )
    if options.probe and options.system != "mics":
        raise ConfigError("--probe runs the engine's own layout: it goes with --system mics only.")
    request = Request(
        workload=workload,
        cluster=cluster,
        system=options.system,
        hierarchical=not options.flat,
        reserve_bytes=options.reserve * GB,
        price_per_hour=options.price_per_hour,
    )
    return replace(request, memory=_probing(request)) if options.probe else request


def _check_world_size(world_size: int | None, cluster: Cluster) -> None:
    if world_size is not None and world_size != cluster.world_size:
        raise ConfigError(
            f"world size must be nodes x GPUs per node: expected {cluster.nodes} x {cluster.gpus_per_node} = "
            f"{cluster.world_size}, got {world_size}. Correct --nodes or --world-size."
        )


def _probing(request: Request) -> MeasureMemory:
    """Probes the sizes that can fit; where parameters and optimizer state alone do not, the closed form will do."""
    from hf_mics.memory_probe import probe_partition_sizes

    sizes = partition_sizes(request.system, request.cluster)
    topologies = [topology for p in sizes if state_fits(request, topology := request.cluster.topology(p))]
    probes = probe_partition_sizes(request.workload, topologies, hierarchical=request.hierarchical)

    def memory(workload: Workload, topology: Topology) -> Memory:
        probed = probes.get(topology.partition_size)
        return probed or peak_memory(workload, topology, hierarchical=request.hierarchical)

    return memory


def _config(plan: Plan) -> LaunchConfig:
    cluster, workload = plan.request.cluster, plan.request.workload
    return LaunchConfig(
        nodes=cluster.nodes,
        gpus_per_node=cluster.gpus_per_node,
        partition_size=plan.choice.partition_size,
        precision=workload.precision,
        activation_checkpointing=workload.activation_checkpointing,
        cpu_offload=workload.cpu_offload,
        hierarchical=plan.request.hierarchical,
    )
