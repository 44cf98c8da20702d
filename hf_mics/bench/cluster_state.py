"""Which virtual clusters exist on this machine, who owns them, and how are they taken down?

A cluster's record is written before its first namespace exists and removed after its last one is gone, so nothing is
ever created that no record names, and nothing is deleted that no record names. A cluster that belongs to a process has
a guard, `python -m hf_mics.bench.cluster_state NAME`: its standard input is a pipe from the owner, which the kernel
closes however the owner ends, SIGKILL included; then the guard takes the cluster down.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from hf_mics.bench import cpu_share, namespaces
from hf_mics.errors import ConfigError, MiCSError

FOLDER = Path("/run/hf_mics_clusters")
"""Records live here, one JSON file per cluster. /run is emptied at boot, when namespaces are gone too."""

Standing = Literal["kept", "in use", "left over"]


@dataclass(frozen=True)
class Record:
    """What was created under one name.

    `owner_pid` is None for a cluster that was brought up to stay; `owner_started_s` (seconds since the epoch) tells the
    owner from a later process with the same id.
    """

    name: str
    nodes: int
    rate_mbit: float | None
    cpus_per_node: float | None
    namespaces: list[str]
    owner_pid: int | None
    owner_started_s: float | None

    @property
    def standing(self) -> Standing:
        """Whether somebody still wants the cluster."""
        if self.owner_pid is None:
            return "kept"
        with contextlib.suppress(psutil.NoSuchProcess):
            owner = psutil.Process(self.owner_pid)
            if owner.create_time() == self.owner_started_s and owner.status() != psutil.STATUS_ZOMBIE:
                return "in use"
        return "left over"


def claim(
    name: str,
    *,
    nodes: int,
    rate_mbit: float | None,
    cpus_per_node: float | None,
    names: Sequence[str],
    owner_pid: int | None,
) -> Record:
    """Writes the record of a cluster that is about to be created.

    Raises:
        ConfigError: the name is taken, by a live cluster or by one left over from a crash, or a namespace of one of the
            `names`, or a control group, exists that no record explains.
    """
    found = read(name)
    if found is not None:
        why = {
            "kept": "it was brought up to stay",
            "in use": f"process {found.owner_pid} uses it",
            "left over": f"its owner, process {found.owner_pid}, ended without taking it down",
        }[found.standing]
        raise ConfigError(
            f"there already is a virtual cluster {name!r} of {found.nodes} nodes: {why}. Remove it with "
            f"`scripts/cluster down --name {name}`, or choose another name."
        )
    if clash := sorted(namespaces.existing().intersection(names)):
        raise ConfigError(
            f"network namespaces {clash} exist already and belong to no virtual cluster. They are left alone; choose "
            f"another name than {name!r}."
        )
    if cpus_per_node is not None and (clash := [found for each in names for found in cpu_share.existing(each)]):
        raise ConfigError(
            f"control groups {clash} exist already and belong to no virtual cluster. They are left alone; choose "
            f"another name than {name!r}."
        )
    started = psutil.Process(owner_pid).create_time() if owner_pid is not None else None
    record = Record(name, nodes, rate_mbit, cpus_per_node, list(names), owner_pid, started)
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        with _file(name).open("x") as file:
            json.dump(asdict(record), file)
    except FileExistsError:
        raise ConfigError(f"another process is bringing up a virtual cluster {name!r} right now.") from None
    return record


def read(name: str) -> Record | None:
    """The record of the cluster `name`, None if there is none."""
    try:
        return Record(**json.loads(_file(name).read_text()))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, TypeError) as error:
        raise MiCSError(f"{_file(name)} is not a record of a virtual cluster ({error}); delete it by hand.") from None


def read_all() -> list[Record]:
    """Records of every cluster on this machine, by name."""
    return [record for path in sorted(FOLDER.glob("*.json")) if (record := read(path.stem)) is not None]


def take_down(record: Record) -> None:
    """Kills what runs on the nodes, deletes namespaces and control groups, then the record; done twice, no harm."""
    for name in sorted(namespaces.existing().intersection(record.namespaces)):
        kill_all_in(name)
        # The owner and its guard may both be at it.
        with contextlib.suppress(MiCSError):
            namespaces.delete(name)
    if left := sorted(namespaces.existing().intersection(record.namespaces)):
        raise MiCSError(f"network namespaces {left} of virtual cluster {record.name!r} could not be deleted.")
    if record.cpus_per_node is not None:
        for name in record.namespaces:
            cpu_share.delete(name)
    _file(record.name).unlink(missing_ok=True)


def kill_all_in(namespace: str, timeout_s: float = 10.0) -> None:
    """Kills every process inside the namespace and waits until they are gone.

    Raises:
        MiCSError: some survive for `timeout_s` (a process in an uninterruptible wait).
    """
    deadline = time.monotonic() + timeout_s
    while running := namespaces.pids(namespace):
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise MiCSError(f"processes {running} in {namespace} survive SIGKILL.")
        time.sleep(0.02)


def start_guard(record: Record) -> subprocess.Popen[bytes]:
    """A process that takes the cluster down when this one ends or closes the pipe to it."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", __name__, record.name],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C reaches the owner alone, which then takes the cluster down itself
    )


def _file(name: str) -> Path:
    return FOLDER / f"{name}.json"


def _guard(name: str) -> None:
    sys.stdin.read()
    record = read(name)
    if record is not None:
        take_down(record)


if __name__ == "__main__":
    _guard(sys.argv[1])
