"""Which accelerate config makes partition groups of a given size? Writes one, no model needed."""

from __future__ import annotations

import argparse
import sys
from typing import get_args

from hf_mics.planning.launch_config import LaunchConfig
from hf_mics.planning.workload import Precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("--nodes", type=int, required=True, help="machines")
    parser.add_argument("--gpus-per-node", type=int, required=True, help="GPUs on each")
    parser.add_argument("--partition-size", type=int, required=True, help="GPUs in a partition group")
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16", help="default bf16")
    parser.add_argument("--no-activation-checkpointing", action="store_true", help="layers are not recomputed")
    parser.add_argument("--cpu-offload", action="store_true", help="parameters and optimizer state in host memory")
    parser.add_argument("--output", metavar="FILE", help="write it there (default: print it)")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")


def run(options: argparse.Namespace) -> None:
    """Checks the sizes, then prints or writes."""
    config = LaunchConfig(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        partition_size=options.partition_size,
        precision=options.precision,
        activation_checkpointing=not options.no_activation_checkpointing,
        cpu_offload=options.cpu_offload,
    )
    if options.output is None:
        print(config.yaml(), end="")
        return
    config.save(options.output, force=options.force)
    print(f"wrote {options.output}; launch with:\n  {config.command(options.output)}", file=sys.stderr)
