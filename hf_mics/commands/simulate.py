"""How would training scale, with MiCS and with its peers? Predicted tables and plots, from 8 to 16,384 GPUs."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

from hf_mics.commands.cluster_options import add_cluster_arguments, cluster_from_options
from hf_mics.commands.paper_figures import paper_report
from hf_mics.commands.scaling_report import ScalingReport, scaling_table
from hf_mics.errors import ConfigError
from hf_mics.planning.cluster import Cluster
from hf_mics.planning.models import find_model
from hf_mics.planning.scaling import ScalePoint, Scaling, simulate, sizes_between, smallest_partition
from hf_mics.planning.scaling_plots import Panel
from hf_mics.planning.timing import System
from hf_mics.planning.workload import OptimizerName, Precision, Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("--paper", action="store_true", help="redraw the published MiCS figures, their points on top")
    parser.add_argument("--model", help="preset, config.json, folder or hub name")
    parser.add_argument("--seq-length", type=int, help="tokens per sequence (default: the model's context)")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences per GPU and micro-step (default 1)")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-steps, weak scaling (default 4)")
    parser.add_argument("--global-batch", type=int, help="sequences, strong scaling (default micro-batch x --to-gpus)")
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16", help="default bf16")
    parser.add_argument("--optimizer", choices=get_args(OptimizerName), default="adamw", help="default adamw")
    parser.add_argument("--no-activation-checkpointing", action="store_true", help="layers are not recomputed")
    parser.add_argument("--partition-size", type=int, help="GPUs in a partition group (default: fewest that fit)")
    parser.add_argument("--systems", nargs="+", choices=get_args(System), default=["mics", "zero3", "hsdp"])
    parser.add_argument("--scaling", choices=(*get_args(Scaling), "both"), default="both", help="default both")
    parser.add_argument("--from-gpus", type=int, default=8, help="smallest number of GPUs (default 8)")
    parser.add_argument("--to-gpus", type=int, default=16384, help="largest, by doubling (default 16384)")
    add_cluster_arguments(parser)
    parser.add_argument("--plots", metavar="FOLDER", help="write a PNG of each table there")
    parser.add_argument("--force", action="store_true", help="overwrite them")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(options: argparse.Namespace) -> None:
    """Predicts, draws if asked to, and prints."""
    if options.paper and (options.model or options.instance or options.cluster):
        raise ConfigError("--paper has models and instances of its own; leave out --model, --instance and --cluster.")
    report = paper_report() if options.paper else _report(options)
    paths = report.save_pictures(Path(options.plots), force=options.force) if options.plots else []
    if options.json:
        print(json.dumps(report.record, indent=2))
        return
    from rich.console import Console

    console = Console()
    for table in report.tables:
        console.print(table)
    for path in paths:
        print(f"wrote {path}")


def _report(options: argparse.Namespace) -> ScalingReport:
    cluster = cluster_from_options(options, None)
    sizes = sizes_between(options.from_gpus, options.to_gpus)
    scalings = get_args(Scaling) if options.scaling == "both" else (options.scaling,)
    partition_size = options.partition_size
    if partition_size is None:
        partition_size = smallest_partition(_workload(options, "weak", sizes), cluster.with_world_size(sizes[-1]))
    points: list[ScalePoint] = []
    pictures = {}
    for scaling in scalings:
        workload = _workload(options, scaling, sizes)
        found = simulate(
            workload,
            cluster,
            scaling=scaling,
            systems=tuple(dict.fromkeys(options.systems)),
            world_sizes=sizes,
            partition_size=partition_size,
        )
        points += found
        pictures[f"{scaling}_scaling"] = [_panel(scaling, workload, cluster, found)]
    record = {
        "model": {"name": workload.model.name, "parameters": workload.model.num_parameters},
        "cluster": cluster.name,
        "assumptions": cluster.assumptions(),
        "points": [point.record() for point in points],
    }
    tables = [
        scaling_table([p for p in points if p.scaling == s], f"{s} scaling, {workload.model.name} on {cluster.name}")
        for s in scalings
    ]
    return ScalingReport(tables, record, pictures)


def _workload(options: argparse.Namespace, scaling: Scaling, sizes: list[int]) -> Workload:
    if options.model is None:
        raise ConfigError("no model: expected --model PRESET, config.json, folder or hub name, or --paper.")
    model = find_model(options.model)
    workload = Workload(
        model=model,
        seq_length=model.context_length if options.seq_length is None else options.seq_length,
        micro_batch=options.micro_batch,
        accumulation=options.accumulation,
        precision=options.precision,
        optimizer=options.optimizer,
        activation_checkpointing=not options.no_activation_checkpointing,
    )
    if scaling == "weak":
        return workload
    return replace(workload, accumulation=_micro_steps_at_smallest(options, sizes))


def _micro_steps_at_smallest(options: argparse.Namespace, sizes: list[int]) -> int:
    """Micro-steps at the smallest size that make up the global batch of strong scaling."""
    batch = options.micro_batch * sizes[-1] if options.global_batch is None else options.global_batch
    at_once = options.micro_batch * sizes[0]
    if batch < at_once or batch % at_once:
        raise ConfigError(
            f"the global batch must be a multiple of micro-batch x smallest number of GPUs, {options.micro_batch} x "
            f"{sizes[0]} = {at_once} sequences, got {batch}."
        )
    return int(batch // at_once)


def _panel(scaling: Scaling, workload: Workload, cluster: Cluster, points: list[ScalePoint]) -> Panel:
    title = f"{scaling} scaling, {workload.model.name} on {cluster.name}"
    if scaling == "weak":
        return Panel(title, "tokens/s per GPU", points, lambda point: point.tokens_per_s_per_gpu)
    return Panel(title, "tokens/s", points, lambda point: point.step.tokens_per_s, logarithmic=True)
