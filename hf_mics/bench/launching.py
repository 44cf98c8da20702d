"""How does a batch of jobs get onto the ranks of a cluster, and what comes back?"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_mics.bench.configuration import OWN_ENVIRONMENT, Configuration
from hf_mics.bench.measure import Part
from hf_mics.bench.namespaces import NIC
from hf_mics.bench.peers import ROOT, interpreter
from hf_mics.bench.virtual_cluster import VirtualCluster
from hf_mics.bench.worker import part_path, ready_path

_START_UP_S = 180.0
_CONFIG = {"distributed_type": "FSDP", "mixed_precision": "no", "fsdp_config": {"fsdp_version": 2}}
_JOBS = "jobs.json"


@dataclass(frozen=True)
class Outcome:
    """What came back of one job: every rank's part, or why not."""

    parts: list[Part]
    failure: str | None = None


def launch(
    cluster: VirtualCluster | None, configurations: Sequence[Configuration], folder: Path, *, timeout_s: float
) -> list[Outcome]:
    """Runs the configurations one after the other in one launch; all of one environment and shape.

    On a cluster, this project's systems start with one `accelerate launch --num_machines` per node and peers with one
    `torchrun` per node. Without, on the loopback of this machine.

    Args:
        cluster: where; None: this machine, no NIC.
        configurations: what.
        folder: an empty folder for the job file, the ranks' parts and their output.
        timeout_s: seconds that one job may take.

    Returns:
        The outcome of each configuration.
    """
    first = configurations[0]
    jobs = {
        "configurations": [c.to_json() for c in configurations],
        "nic": NIC if cluster is not None else None,
        "first_port": 29600 if cluster is not None else _free_port(),
        "timeout_s": timeout_s,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _JOBS).write_text(json.dumps(jobs))
    limit_s = _START_UP_S + timeout_s * len(configurations)
    if cluster is None:
        _launch_here(first, folder, limit_s)
    else:
        _launch_on(cluster, first, folder, limit_s)
    return [_collect(folder, index, c) for index, c in enumerate(configurations)]


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # PyTorch's tuning guide asks for an allocator that keeps freed memory: glibc gives every large buffer back to
        # the kernel and faults its pages in again, 5 % of a MiCS step here. 32 MiB is the largest threshold it takes.
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        "MALLOC_TOP_PAD_": str(64 << 20),
        # Ranks fork their jobs, which Python 3.12 warns about once threads exist.
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
    }


def _launch_on(cluster: VirtualCluster, first: Configuration, folder: Path, limit_s: float) -> None:
    python = str(interpreter(first.spec.environment))

    if first.spec.environment != OWN_ENVIRONMENT:
        command = cluster.torchrun_command(first.node_size, _worker(folder), python=python)
    else:
        config = folder / "accelerate.yaml"
        config.write_text(yaml.safe_dump({**_CONFIG, "num_processes": first.world_size}))
        command = cluster.accelerate_command(config, first.node_size, _worker(folder), python=python)
    _set_shares(cluster, None)
    with cluster.start(command, env=_environment()) as processes:
        # Importing takes minutes at a tenth of a CPU, and is not measured.
        deadline_s = time.monotonic() + _START_UP_S
        ready = [ready_path(folder, rank) for rank in range(first.world_size)]
        while not all(path.exists() for path in ready) and processes.running() and time.monotonic() < deadline_s:
            time.sleep(0.1)
        _set_shares(cluster, cluster.cpus_per_node)
        for result in processes.wait(limit_s):
            (folder / f"node{result.node}.log").write_text(result.stdout + result.stderr)


def _set_shares(cluster: VirtualCluster, cpus: float | None) -> None:
    if cluster.cpus_per_node is not None:
        for node in range(cluster.nodes):
            cluster.set_share(node, cpus)


def _launch_here(first: Configuration, folder: Path, limit_s: float) -> None:
    command = [
        *(str(interpreter(first.spec.environment)), "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(first.world_size), "--master-addr", "127.0.0.1", "--master-port", str(_free_port())),
        *_worker(folder),
    ]
    environment = {**os.environ, **_environment(), "GLOO_SOCKET_IFNAME": "lo"}
    with (folder / "node0.log").open("w") as log:
        subprocess.run(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit_s, check=False, cwd=folder
        )


def _worker(folder: Path) -> list[str]:
    return ["-m", "hf_mics.bench.worker", str(folder / _JOBS)]


def _collect(folder: Path, job: int, configuration: Configuration) -> Outcome:
    failures: list[str] = []
    parts: list[Part] = []
    for rank in range(configuration.world_size):
        path = part_path(folder, job, rank)
        values: dict[str, Any] = (
            json.loads(path.read_text()) if path.exists() else {"error": f"rank {rank} left nothing behind"}
        )
        if "error" in values:
            failures.append(str(values["error"]))
        else:
            parts.append(Part(**values))
    if failures:
        # The rank that failed first says why; the others then lost their connection to it.
        failures.sort(key=lambda text: ("Connection" in text, "did not finish" in text, "left nothing" in text))
        return Outcome([], failures[0])
    return Outcome(parts)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
