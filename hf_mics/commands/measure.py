"""What are this cluster's links and GPUs worth? Run it as you would run training:

accelerate launch --config_file mics.yaml -m hf_mics.cli measure --output cluster.json
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from hf_mics.commands.workload_options import flag
from hf_mics.errors import ConfigError, MiCSError
from hf_mics.planning.cluster import require_positive
from hf_mics.planning.models import find_model
from hf_mics.planning.new_file import already_there
from hf_mics.planning.workload import Workload

if TYPE_CHECKING:
    import torch

    from hf_mics.calibration.calibrate import Comparison, Fits
    from hf_mics.planning.cluster import Cluster

_LAUNCH = "accelerate launch --config_file mics.yaml -m hf_mics.cli measure --output cluster.json"
_ROUNDS = 3
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.epilog = f"Run it on the cluster itself, as you would run training: {_LAUNCH}"
    parser.add_argument("--output", required=True, metavar="FILE", help="cluster file to write, .json or .yaml")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    parser.add_argument("--name", default="measured", help="what to call the cluster")
    parser.add_argument(
        "--model",
        help="model of which one layer, the head and the optimizer are timed, best the one that will be trained: "
        "preset, config.json, folder or hub name (default: gpt2 on CPUs, gpt2-xl on GPUs)",
    )
    parser.add_argument(
        "--seq-length", type=int, help="tokens per sequence of that model (default: 128 on CPUs, 512 on GPUs)"
    )
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences that it computes at a time (default 1)")
    parser.add_argument("--largest-mb", type=float, default=256.0, help="largest unit to gather, in MB (default 256)")
    parser.add_argument(
        "--limit-s", type=float, default=1.0, help="no larger size once a call takes this long (default 1 s)"
    )
    parser.add_argument("--samples", type=int, default=7, help="samples per point, at least (default 7)")


def run(options: argparse.Namespace) -> int:
    """Measures on all ranks; rank 0 prints and writes. Only rank 0 reports a mistake, which every rank finds."""
    try:
        return _run(options)
    except MiCSError:
        if os.environ.get("RANK", "0") != "0":
            return 2
        raise


def _run(options: argparse.Namespace) -> int:
    node_size = _launched_node_size()
    for name in ("largest_mb", "limit_s"):
        require_positive(flag(name), getattr(options, name))
    for name, least in (("seq_length", 1), ("micro_batch", 1), ("samples", 3)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"{flag(name)} must be at least {least}, got {value}.")
    import torch
    import torch.distributed as dist

    on_gpu = torch.accelerator.is_available()
    model = find_model(options.model or ("gpt2-xl" if on_gpu else "gpt2"))
    # Refuses sizes that the model cannot read, before anything is timed.
    seq_length = options.seq_length or min(512 if on_gpu else 128, model.context_length)
    workload = Workload(model=model, seq_length=seq_length, micro_batch=options.micro_batch)
    device = torch.device("cpu")
    if on_gpu:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        device = torch.accelerator.current_accelerator() or device
    # Not torch's default, NCCL beside gloo: every group would need gloo's connections too, over its own interface.
    dist.init_process_group(dist.get_default_backend_for_device(device))
    try:
        _check_together(options, node_size)
        cluster, fits, comparisons = _measure(options, workload, node_size, device)
        if dist.get_rank() == 0:
            _report(cluster, fits, comparisons)
            print(f"wrote {options.output}: hf-mics plan --cluster {options.output} ... and simulate take it")
    finally:
        dist.destroy_process_group()
    return 0


def _launched_node_size() -> int:
    missing = [name for name in _VARIABLES if not os.environ.get(name, "").strip()]
    if missing:
        raise ConfigError(
            f"measure runs on every GPU of the cluster, started by a launcher; {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set. Launch it: {_LAUNCH}"
        )
    if os.environ["WORLD_SIZE"] == "1":
        raise ConfigError(f"one process has nobody to communicate with; launch at least two. Launch it: {_LAUNCH}")
    return int(os.environ["LOCAL_WORLD_SIZE"])


def _check_together(options: argparse.Namespace, node_size: int) -> None:
    """On every rank alike: nodes of one size, and a file that may be written, which rank 0 knows."""
    import torch.distributed as dist

    from hf_mics.process_groups import say_to_all

    def say() -> int:
        path = Path(options.output)
        if dist.get_rank() == 0 and path.exists() and not options.force:
            raise already_there(path)
        if dist.get_rank() == 0 and not path.absolute().parent.is_dir():
            raise ConfigError(f"cannot write {str(path)!r}: no such folder. Make it, or choose another.")
        return node_size

    sizes = set(say_to_all(say))
    if len(sizes) > 1:
        raise ConfigError(
            f"every node must run as many ranks, got {' and '.join(map(str, sorted(sizes)))}. Launch the same number "
            "of processes on every node."
        )


def _measure(
    options: argparse.Namespace, workload: Workload, node_size: int, device: torch.device
) -> tuple[Cluster, Fits, list[Comparison]]:
    import torch.distributed as dist
    from tqdm import tqdm

    from hf_mics.calibration.calibrate import as_records, calibrated_cluster, compare_gathers, fit_links
    from hf_mics.calibration.computing import Computing, measure_computing, mesh_alone
    from hf_mics.calibration.links import measure_links
    from hf_mics.planning.cluster_file import save_cluster

    alone = mesh_alone(device)
    with tqdm(total=_ROUNDS + 2, unit="part", desc="measuring", disable=dist.get_rank() != 0) as bar:

        def compute() -> Computing:
            computing = measure_computing(workload, alone, device, samples=-(-options.samples // 2))
            bar.update()
            return computing

        # Before and after the links, which are gone through again and again: repeats should lie apart.
        before = compute()
        points = measure_links(
            node_size,
            device,
            largest_bytes=int(options.largest_mb * 1e6),
            limit_s=options.limit_s,
            samples=-(-options.samples // _ROUNDS),
            rounds=_ROUNDS,
            progress=bar.update,
        )
        computing = before.joined(compute())
    fits = fit_links(points)
    cluster = calibrated_cluster(
        name=options.name,
        nodes=dist.get_world_size() // node_size,
        node_size=node_size,
        backend="gloo" if device.type == "cpu" else "nccl",
        device_name=_device_name(device),
        memory_bytes=_memory_bytes(device, node_size),
        fits=fits,
        computing=computing,
    )
    if dist.get_rank() == 0:
        save_cluster(cluster, options.output, measurements=as_records(points, fits, computing), force=options.force)
    return cluster, fits, compare_gathers(points, cluster)


def _device_name(device: torch.device) -> str:
    import torch

    return platform.processor() or "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _memory_bytes(device: torch.device, node_size: int) -> float:
    import psutil
    import torch

    if device.type == "cpu":
        return psutil.virtual_memory().total / node_size
    return float(torch.cuda.get_device_properties(device).total_memory)


def _report(cluster: Cluster, fits: Fits, comparisons: list[Comparison]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("collective", "lane", "latency per step (us)", "bandwidth (GB/s)", "times within", box=box.SIMPLE)
    table.title = f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.accelerator.name} over {cluster.backend}"
    for (phase, lane), fit in fits.items():
        row = (
            f"{fit.latency_s * 1e6:.1f}",
            f"{fit.bandwidth_bytes_per_s / 1e9:.4g}",
            f"x{fit.fast:.2f} to x{fit.slow:.2f}",
        )
        table.add_row(phase, lane, *row)
    console.print(table)
    if comparisons:
        table = Table("gather over all ranks", "unit (bytes)", "measured (ms)", "from the fit (ms)", box=box.SIMPLE)
        for c in comparisons:
            table.add_row(c.name, f"{c.unit_bytes:,}", f"{c.measured_s * 1e3:.3f}", f"{c.predicted_s * 1e3:.3f}")
        console.print(table)
    efficiency, peak, head = cluster.compute_efficiency, cluster.accelerator.peak_flops_per_s, cluster.head_efficiency
    rest = "" if head is None else f", the head with all else at {head.low:.1%} to {head.high:.1%}"
    print(f"layers compute at {efficiency.low:.1%} to {efficiency.high:.1%} of {peak / 1e12:.4g} TFLOP/s{rest}")
    if cluster.inter_node is None:
        print("one node: links between nodes were not measured")
