"""How is a node kept to its share of the machine's CPUs? By a control group of its own, of version 1 or 2.

A host has its CPUs to itself. Nodes that all take from the same ones run hop 1 faster when the others happen to wait
for their NICs, so a cluster of two nodes is quicker inside a node than one of eight. With a quota each node computes at
the same speed whatever runs beside it.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from pathlib import Path

import psutil

from hf_mics.errors import ConfigError, MiCSError

LEAST_CPUS = 0.1
"""The kernel takes quotas from 1 ms on, which is a tenth of the period."""

# Short: ranks that have used up their share stand still until the next period, and whoever waits for them as well.
_PERIOD_US = 10_000


def check(cpus_per_node: float | None, nodes: int) -> None:
    """Raises:
    ConfigError: not a share that a quota can hold, more than the machine has for all nodes, or no control groups here.
    """
    if cpus_per_node is None:
        return
    available = os.cpu_count() or 1
    if not (math.isfinite(cpus_per_node) and cpus_per_node >= LEAST_CPUS):
        raise ConfigError(
            f"a node's share must be at least {LEAST_CPUS} CPUs, or none to let all nodes take what they can; got "
            f"{cpus_per_node}."
        )
    if cpus_per_node * nodes > available:
        raise ConfigError(
            f"{nodes} nodes of {cpus_per_node} CPUs need {cpus_per_node * nodes:g}, but this machine has {available}: "
            f"give a node at most {available / nodes:g}."
        )
    _controller()


def existing(pattern: str) -> list[str]:
    """Names of the control groups of this machine that match a shell pattern, whoever made them."""
    mount, _ = _controller()
    return sorted(group.name for group in mount.glob(pattern) if group.is_dir())


def create(name: str, cpus: float) -> None:
    """A control group whose processes together use at most `cpus` CPUs, on average over 10 ms."""
    mount, version = _controller()
    group = mount / name
    try:
        if version == 2:
            (mount / "cgroup.subtree_control").write_text("+cpu")
        group.mkdir()
        limit(name, cpus)
    except OSError as error:
        raise ConfigError(
            f"the kernel did not make a control group {group} of {cpus} CPUs: {error.strerror}. Run outside of a "
            "container, or leave nodes without a share."
        ) from None


def limit(name: str, cpus: float | None) -> None:
    """Gives the control group another share from now on; None: whatever is free."""
    mount, version = _controller()
    quota_us = None if cpus is None else round(cpus * _PERIOD_US)
    if version == 2:
        (mount / name / "cpu.max").write_text(f"{'max' if quota_us is None else quota_us} {_PERIOD_US}")
        return
    (mount / name / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
    (mount / name / "cpu.cfs_quota_us").write_text(str(-1 if quota_us is None else quota_us))


def inside(name: str, command: list[str]) -> list[str]:
    """`command`, to be run as part of the control group with all that it starts."""
    mount, _ = _controller()
    return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(mount / name / "cgroup.procs"), *command]


def delete(name: str, timeout_s: float = 10.0) -> None:
    """Kills what runs in the control group and removes it; nothing if there is none.

    Raises:
        MiCSError: something in it survives for `timeout_s`.
    """
    mount, _ = _controller()
    group = mount / name
    deadline = time.monotonic() + timeout_s
    while group.exists():
        # The owner of a cluster and its guard may both be at it.
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            for pid in (group / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise MiCSError(f"control group {group} could not be removed: {error.strerror}.") from None
            time.sleep(0.02)


def _controller() -> tuple[Path, int]:
    """Where control groups that limit CPUs are mounted, and their version.

    Raises:
        ConfigError: nowhere.
    """
    for partition in psutil.disk_partitions(all=True):
        mount = Path(partition.mountpoint)
        if partition.fstype == "cgroup" and "cpu" in partition.opts.split(","):
            return mount, 1
        if partition.fstype == "cgroup2" and "cpu" in (mount / "cgroup.controllers").read_text().split():
            return mount, 2
    raise ConfigError(
        "nodes cannot have a share of the CPUs here: no control groups with a cpu controller are mounted. Mount them "
        "(mount -t cgroup2 none /sys/fs/cgroup), or leave nodes without a share."
    )
