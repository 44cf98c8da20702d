"""How does a list of configurations become records? Clusters come up one after the other, repeats are interleaved."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from hf_mics.bench.configuration import Configuration
from hf_mics.bench.launching import Outcome, launch
from hf_mics.bench.peers import ROOT, interpreter
from hf_mics.bench.records import Record, has_measurements, merge, record_path
from hf_mics.bench.reference import expect
from hf_mics.bench.virtual_cluster import VirtualCluster
from hf_mics.errors import ConfigError

_NEEDED_BYTES = 200 << 20
_JOBS_PER_LAUNCH = 12  # starting 8 ranks takes 2 cores most of a minute


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run and how.

    Args:
        configurations: what.
        results: the folder of the records; a run whose record is there is not run again unless it failed.
        repeats: runs of each configuration; all configurations run once before any runs again.
        job_timeout_s: seconds after which a run is killed and recorded as failed.
        stop_after_s: no launch starts later than this; None: all run.
        again: run what has a record already, and replace it.
    """

    configurations: Sequence[Configuration]
    results: Path
    repeats: int = 1
    job_timeout_s: float = 240.0
    stop_after_s: float | None = None
    again: bool = False

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1, got {self.repeats}.")

    def missing(self) -> list[tuple[int, Configuration]]:
        """(repeat, configuration) of every run that is still to be done, in order."""
        return [
            (repeat, c)
            for repeat in range(self.repeats)
            for c in self.configurations
            if self.again or not has_measurements(record_path(self.results, c, repeat))
        ]


def run(plan: Plan, say: Callable[[str], None]) -> list[Record]:
    """Runs what is missing, writes one record per run as soon as it is there, and returns them.

    A system that fails gets a record too, with the reason. Losses are checked against `reference.py` here.

    Raises:
        ConfigError: a peer is not installed, no namespaces can be made, or there is no space for results.
    """
    missing = plan.missing()
    if present := plan.repeats * len(plan.configurations) - len(missing):
        say(f"{present} runs have a record in {plan.results} and are not repeated (--again repeats them)")
    for environment in {c.spec.environment for _, c in missing}:
        interpreter(environment)
    _check_space(plan.results)
    stop_at_s = time.monotonic() + (math.inf if plan.stop_after_s is None else plan.stop_after_s)
    records: list[Record] = []
    scratch = ROOT / "runs" / "bench" / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    with contextlib.closing(_launches_on_clusters(missing, stop_at_s)) as launches:
        for repeat, cluster, batch in launches:
            for record in _run_batch(plan, repeat, cluster, batch, scratch / f"{len(records):03d}"):
                records.append(record)
                say(_line(record))
    if len(records) < len(missing):
        say(f"{len(missing) - len(records)} of {len(missing)} runs are left; the same command goes on with them.")
    return records


Missing = Sequence[tuple[int, Configuration]]


def _launches_on_clusters(
    missing: Missing, stop_at_s: float
) -> Generator[tuple[int, VirtualCluster, list[Configuration]], None, None]:
    """(repeat, cluster that is up, what to launch on it) until all is launched or the time is up."""

    # A repeat is a pass over everything; within it, neighbours on the same cluster share it.
    def cluster_of(item: tuple[int, Configuration]) -> tuple[int, int, float | None, float | None]:
        repeat, c = item
        return repeat, c.nodes, c.rate_mbit, c.cpus_per_node

    for (repeat, nodes, rate, cpus), group in groupby(missing, key=cluster_of):
        if time.monotonic() > stop_at_s:
            return
        with VirtualCluster(nodes, rate, f"bench{os.getpid()}"[:16], cpus_per_node=cpus) as cluster:
            for batch in _launches([c for _, c in group]):
                if time.monotonic() > stop_at_s:
                    return
                yield repeat, cluster, batch


def _run_batch(
    plan: Plan, repeat: int, cluster: VirtualCluster, batch: list[Configuration], scratch: Path
) -> Iterator[Record]:
    environment = _environment()
    for configuration, outcome in zip(
        batch, launch(cluster, batch, scratch, timeout_s=plan.job_timeout_s), strict=True
    ):
        record = _record(configuration, repeat, outcome, environment)
        record.save(plan.results)
        yield record


def _launches(configurations: Iterable[Configuration]) -> Iterator[list[Configuration]]:
    """Batches that one launch can run: of one environment and shape, a few each."""
    by_launch: dict[tuple[str, int, int], list[Configuration]] = {}
    for c in configurations:
        by_launch.setdefault((c.spec.environment, c.nodes, c.node_size), []).append(c)
    for group in by_launch.values():
        yield from (group[first : first + _JOBS_PER_LAUNCH] for first in range(0, len(group), _JOBS_PER_LAUNCH))


def _record(configuration: Configuration, repeat: int, outcome: Outcome, environment: dict[str, Any]) -> Record:
    if outcome.failure is not None:
        return Record(configuration=configuration, repeat=repeat, failure=outcome.failure, environment=environment)
    record = merge(configuration, repeat, outcome.parts, environment)
    if configuration.spec.equal_losses:
        expectation = expect(configuration, ROOT / "runs" / "bench" / "expected")
        record.expected_losses = list(expectation.losses)
        record.loss_tolerance = expectation.tolerance
    return record


def _line(record: Record) -> str:
    name = f"{record.configuration.identity} (repeat {record.repeat})"
    if record.failure is not None:
        return f"{name}: FAILED, {record.failure.splitlines()[-1]}"
    equal = {None: "losses not comparable", True: "losses equal", False: f"LOSSES DIFFER by {record.loss_error}"}
    times = ", ".join(f"{seconds:.2f}" for seconds in record.timed_s)
    sent = f", {record.nic_sent_bytes[-1] / 1e6:.1f} MB per NIC and step" if record.nic_sent_bytes else ""
    return f"{name}: {times} s per step{sent}, {equal[record.losses_are_equal]}"


def _check_space(results: Path) -> None:
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write into {results} ({error.strerror}): choose another folder with --results."
        ) from None
    for folder in (results, ROOT):
        free = shutil.disk_usage(folder).free
        if free < _NEEDED_BYTES:
            raise ConfigError(
                f"no space for results: {folder} has {free >> 20} MiB free, expected at least {_NEEDED_BYTES >> 20} "
                "MiB. Free some, or choose another folder with --results."
            )
    if not os.access(results, os.W_OK):
        raise ConfigError(f"cannot write into {results}: choose another folder with --results.")


def _environment() -> dict[str, Any]:
    return {
        "command": " ".join([f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpus": os.cpu_count(),
        "cpu": _cpu_name(),
    }


def _commit() -> str:
    """Of the code that runs; records that an earlier run has replaced, and their report, do not make it another one."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)

    commit = git("describe", "--always", "--abbrev=12").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":(exclude)results", ":(exclude)docs").returncode
    return f"{commit or 'unknown'}{'-dirty' if commit and changed else ''}"


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
