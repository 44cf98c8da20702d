"""How does one launched rank run several benchmark jobs? `python -m hf_mics.bench.worker JOBS.json`

Importing torch and transformers takes seconds of CPU per rank, so a rank imports them once and forks a fresh process
for every job. Each job has its own rendezvous; a job that fails or hangs is killed and the next one starts.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from hf_mics.bench.configuration import OWN_ENVIRONMENT, Configuration
from hf_mics.bench.measure import measure

_LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def part_path(folder: Path, job: int, rank: int) -> Path:
    """Where a rank leaves what it saw of a job."""
    return folder / f"job{job}-rank{rank}.json"


def ready_path(folder: Path, rank: int) -> Path:
    """Where a rank says that it has imported its libraries."""
    return folder / f"rank{rank}.ready"


def main(jobs_file: str) -> None:
    """Runs every job of the file on this rank, one after the other."""
    jobs: dict[str, Any] = json.loads(Path(jobs_file).read_text())
    configurations = [Configuration.from_json(values) for values in jobs["configurations"]]
    rank = int(os.environ["RANK"])
    _preload(configurations)
    ready_path(Path(jobs_file).parent, rank).touch()
    context = multiprocessing.get_context("fork")
    for index, configuration in enumerate(configurations):
        path = part_path(Path(jobs_file).parent, index, rank)
        process = context.Process(target=_run, args=(configuration, jobs, index, path))
        process.start()
        process.join(jobs["timeout_s"])
        if process.is_alive():
            process.kill()
            process.join()
            path.write_text(json.dumps({"error": f"rank {rank} did not finish within {jobs['timeout_s']:.0f} s"}))
        elif not path.exists():
            path.write_text(json.dumps({"error": f"rank {rank} died with exit code {process.exitcode}"}))


def _preload(configurations: list[Configuration]) -> None:
    importlib.import_module("hf_mics.bench.trainers.plain")
    if {c.spec.environment for c in configurations} == {OWN_ENVIRONMENT}:
        importlib.import_module("hf_mics.bench.trainers.accelerated")


def _run(configuration: Configuration, jobs: dict[str, Any], index: int, path: Path) -> None:
    # Trainers say everything themselves; what the launcher's config says must not reach them.
    for name in [name for name in os.environ if name.startswith(_LAUNCHER_PREFIXES)]:
        del os.environ[name]
    # The launcher's own store remembers the addresses of the job before.
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(jobs["first_port"] + index))
    try:
        part = measure(configuration, nic=jobs["nic"], timeout_s=jobs["timeout_s"])
        outcome = dataclasses.asdict(part)
    except BaseException as error:
        traceback.print_exc()
        outcome = {"error": "".join(traceback.format_exception_only(error)).strip()[-600:]}
    path.write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1])
