"""Does a cluster that `hf-mics measure` has measured train as fast as predicted? On virtual hosts with slow links."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from statistics import median

import yaml
from rich import box
from rich.table import Table

from hf_mics.bench.node_processes import NodeResult
from hf_mics.bench.virtual_cluster import VirtualCluster
from hf_mics.planning.cluster_file import load_cluster
from hf_mics.planning.models import find_model
from hf_mics.planning.timing import predict, predict_at
from hf_mics.planning.workload import Workload

NODES, RANKS_PER_NODE, RATE_MBIT = 4, 2, 400
MODEL = {"model_type": "gpt2", "n_layer": 4, "n_embd": 384, "n_head": 6, "vocab_size": 2048, "n_positions": 128}
MICRO_BATCH, STEPS = 2, 5
LAYOUTS = ((2, 4), (2, 1), (4, 4), (8, 1), (8, 2))
"""(partition size, accumulation)"""
ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "fsdp_config": {"fsdp_version": 2},
    "mixed_precision": "no",
    "num_machines": NODES,
    "num_processes": NODES * RANKS_PER_NODE,
}
LIMIT_S = 450


def emulated() -> list[Table]:
    """Measures, trains, and sets both side by side."""
    with (
        tempfile.TemporaryDirectory() as name,
        VirtualCluster(NODES, RATE_MBIT, name="validate") as hosts,
    ):
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(MODEL))
        (folder / "launch.yaml").write_text(yaml.safe_dump(ACCELERATE))
        measure = ["-m", "hf_mics.cli", "measure", "--output", str(folder / "cluster.json"), "--model", str(folder)]
        sizes = ["--seq-length", str(MODEL["n_positions"]), "--micro-batch", str(MICRO_BATCH), "--largest-mb", "18"]
        environment = {"OMP_NUM_THREADS": "1"}
        done = hosts.accelerate_launch(
            folder / "launch.yaml", RANKS_PER_NODE, [*measure, *sizes], env=environment, timeout_s=LIMIT_S
        )
        print(output_of(done))
        trained = hosts.torchrun(RANKS_PER_NODE, trainer(), env=environment, timeout_s=LIMIT_S)
        times = json.loads(re.search(r"STEP_TIMES (.*)", output_of(trained))[1])
        return [compared(folder, times)]


def trainer() -> list[str]:
    script = str(Path(__file__).with_name("_step_times.py"))
    sizes = {
        "layers": MODEL["n_layer"],
        "hidden": MODEL["n_embd"],
        "heads": MODEL["n_head"],
        "vocab": MODEL["vocab_size"],
        "seq-length": MODEL["n_positions"],
        "micro-batch": MICRO_BATCH,
        "steps": STEPS,
    }
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return [script, *flags, "--layouts", *(f"{p}:{accumulation}" for p, accumulation in LAYOUTS)]


def compared(folder: Path, times: dict[str, list[float]]) -> Table:
    cluster = load_cluster(folder / "cluster.json")
    table = Table(
        "partition size", "accumulation", "predicted (s)", "range (s)", "measured (s)", "error", box=box.MARKDOWN
    )
    for p, accumulation in LAYOUTS:
        workload = Workload(
            model=find_model(str(folder)),
            seq_length=MODEL["n_positions"],
            micro_batch=MICRO_BATCH,
            accumulation=accumulation,
            precision="fp32",
            activation_checkpointing=False,
        )
        span = predict(workload, cluster, partition_size=p).step_s
        middle = predict_at(workload, cluster, cluster.rates(0.5), partition_size=p)
        print(p, accumulation, middle, times[f"{p}:{accumulation}"])
        measured = median(times[f"{p}:{accumulation}"])
        table.add_row(
            *(str(p), str(accumulation), f"{middle.step_s:.2f}", f"{span.low:.2f} to {span.high:.2f}"),
            *(f"{measured:.2f}", f"{100 * (middle.step_s / measured - 1):+.0f} %"),
        )
    table.caption = (
        f"GPT-2 of {MODEL['n_layer']} layers x {MODEL['n_embd']}, {MICRO_BATCH} sequences of {MODEL['n_positions']} "
        f"tokens; {NODES} virtual hosts of {RANKS_PER_NODE} ranks, {RATE_MBIT} Mbit/s each; medians of {STEPS} steps, "
        "fp32."
    )
    return table


def output_of(results: list[NodeResult]) -> str:
    """What node 0 printed; stops where a node failed."""
    for result in results:
        if result.returncode:
            raise SystemExit(f"node {result.node} ended with exit code {result.returncode}:\n{result.stderr[-3000:]}")
    return results[0].stdout
