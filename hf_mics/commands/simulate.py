"""How would training scale, with MiCS and with its peers? Predicted tables and plots, from 8 to 16,384 GPUs."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

from hf_mics.commands.cluster_options import add_cluster_arguments, cluster_from_options
from hf_mics.commands.console_width import widen
from hf_mics.commands.paper_figures import paper_report
from hf_mics.commands.scaling_report import ScalingReport, scaling_table
from hf_mics.commands.workload_options import add_workload_arguments, flag, given_or, workload_from_options
from hf_mics.errors import ConfigError
from hf_mics.planning.cluster import Cluster
from hf_mics.planning.scaling import ScalePoint, Scaling, simulate, sizes_between, smallest_partition
from hf_mics.planning.scaling_plots import Panel
from hf_mics.planning.timing import System, time_notes
from hf_mics.planning.workload import Workload

# What can be said beside --paper; the first two are the command line's own.
_WITH_PAPER = ("command", "run", "paper", "plots", "force", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("--paper", action="store_true", help="redraw the published MiCS figures, their points on top")
    add_workload_arguments(parser, accumulation="micro-steps, weak scaling (default 4)")
    parser.add_argument("--global-batch", type=int, help="sequences, strong scaling (default micro-batch x --to-gpus)")
    parser.add_argument("--partition-size", type=int, help="GPUs in a partition group (default: fewest that fit)")
    parser.add_argument("--systems", nargs="+", choices=get_args(System), help="default mics zero3 hsdp")
    parser.add_argument("--scaling", choices=(*get_args(Scaling), "both"), help="default both")
    parser.add_argument("--from-gpus", type=int, help="smallest number of GPUs (default 8)")
    parser.add_argument("--to-gpus", type=int, help="largest, by doubling (default 16384)")
    add_cluster_arguments(parser)
    parser.add_argument("--plots", metavar="FOLDER", help="write a PNG of each table there")
    parser.add_argument("--force", action="store_true", help="overwrite them")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(options: argparse.Namespace) -> None:
    """Predicts, draws if asked to, and prints."""
    if options.paper:
        _refuse_beside_paper(options)
    report = paper_report() if options.paper else _report(options)
    paths = report.save_pictures(Path(options.plots), force=options.force) if options.plots else []
    if options.json:
        print(json.dumps(report.record, indent=2))
        return
    from rich.console import Console

    console = Console()
    widen(console, *report.tables)
    if report.header:
        console.print(report.header, soft_wrap=True, highlight=False)
    for table in report.tables:
        console.print(table)
    for line in report.notes:
        console.print(line if line.endswith(":") else f"  {line}", soft_wrap=True, highlight=False)
    for path in paths:
        print(f"wrote {path}")


def _refuse_beside_paper(options: argparse.Namespace) -> None:
    """The published figures fix everything but where the report goes."""
    given = (name for name, value in vars(options).items() if value is not None and value is not False)
    ignored = [flag(name) for name in given if name not in _WITH_PAPER]
    if ignored:
        raise ConfigError(
            f"--paper redraws published figures, whose models, clusters and sizes are fixed: leave out "
            f"{', '.join(ignored)}, or leave out --paper."
        )


def _report(options: argparse.Namespace) -> ScalingReport:
    if options.model is None:
        raise ConfigError("no model: expected --model PRESET, config.json, folder or hub name, or --paper.")
    cluster = cluster_from_options(options, None)
    sizes = sizes_between(given_or(options.from_gpus, 8), given_or(options.to_gpus, 16384))
    scalings = get_args(Scaling) if given_or(options.scaling, "both") == "both" else (options.scaling,)
    partition_size = options.partition_size
    if partition_size is None:
        partition_size = smallest_partition(_workload(options, "weak", sizes), cluster.with_world_size(sizes[-1]))
    systems = tuple(dict.fromkeys(given_or(options.systems, ("mics", "zero3", "hsdp"))))
    points: list[ScalePoint] = []
    left_out: dict[str, list[Scaling]] = {}
    pictures = {}
    for scaling in scalings:
        workload = _workload(options, scaling, sizes)
        found = simulate(
            workload,
            cluster,
            scaling=scaling,
            systems=systems,
            world_sizes=sizes,
            partition_size=partition_size,
        )
        points += found.points
        for line in found.left_out:
            left_out.setdefault(line, []).append(scaling)
        pictures[f"{scaling}_scaling"] = [_panel(scaling, workload, cluster, found.points)]
    omitted = [f"{' and '.join(where)} scaling, {line}" for line, where in left_out.items()]
    assumed = [*cluster.assumptions(), *time_notes(workload, cluster)]
    record = {
        "model": {"name": workload.model.name, "parameters": workload.model.num_parameters},
        "cluster": cluster.name,
        "workload": {
            "seq_length": workload.seq_length,
            "micro_batch": workload.micro_batch,
            "precision": workload.precision,
            "optimizer": workload.optimizer,
            "activation_checkpointing": workload.activation_checkpointing,
        },
        "assumptions": assumed,
        "left_out": omitted,
        "points": [point.record() for point in points],
    }
    steps = sorted({point.accumulation for point in points if point.scaling == "weak"})
    header = (
        f"{workload.model.name}, {workload.model.num_parameters / 1e9:.2f}B parameters, on {cluster.accelerator.name} "
        f"({cluster.name}); partition groups of {partition_size}"
        f"{'' if options.partition_size else ', the fewest that fit'}; sequences of {workload.seq_length}, micro-batch "
        f"{workload.micro_batch}{f', accumulation {steps[0]} under weak scaling' if steps else ''}, "
        f"{workload.precision}, activation checkpointing {'on' if workload.activation_checkpointing else 'off'}"
    )
    tables = [
        scaling_table([p for p in points if p.scaling == s], f"{s} scaling, {workload.model.name} on {cluster.name}")
        for s in scalings
    ]
    return ScalingReport(
        tables,
        record,
        pictures,
        header=header,
        notes=["assumed:", *assumed, *(["left out:", *omitted] if omitted else [])],
    )


def _workload(options: argparse.Namespace, scaling: Scaling, sizes: list[int]) -> Workload:
    workload = workload_from_options(options, accumulation=4)
    if scaling == "weak":
        return workload
    steps = _micro_steps_at_smallest(options.global_batch, workload.micro_batch, sizes)
    return replace(workload, accumulation=steps)


def _micro_steps_at_smallest(global_batch: int | None, micro_batch: int, sizes: list[int]) -> int:
    """Micro-steps at the smallest size that make up the global batch of strong scaling."""
    batch = micro_batch * sizes[-1] if global_batch is None else global_batch
    at_once = micro_batch * sizes[0]
    if batch < at_once or batch % at_once:
        raise ConfigError(
            f"the global batch must be a multiple of micro-batch x smallest number of GPUs, {micro_batch} x "
            f"{sizes[0]} = {at_once} sequences, got {batch}."
        )
    return batch // at_once


def _panel(scaling: Scaling, workload: Workload, cluster: Cluster, points: list[ScalePoint]) -> Panel:
    title = f"{scaling} scaling, {workload.model.name} on {cluster.name}"
    if scaling == "weak":
        return Panel(title, "tokens/s per GPU", points, lambda point: point.tokens_per_s_per_gpu)
    return Panel(title, "tokens/s", points, lambda point: point.step.tokens_per_s, logarithmic=True)
