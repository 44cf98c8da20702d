"""How do iproute2's `ip` and `tc` make one node: a network namespace, its NIC, and the NIC's rate?

Every function is one step on the kernel and raises with the kernel's own words when refused.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from hf_mics.errors import ConfigError, MiCSError

NIC = "eth0"
"""The name of a node's interface inside its namespace."""

MTU_BYTES = 9000
"""Jumbo frames, as cluster networks use them (9001 on EC2)."""

_LATENCY_MS = 100  # how long a packet may queue before it is dropped
_LEAST_BURST_BYTES = 128 << 10  # two of the kernel's 64 KiB segmentation units
_BURST_S = 0.004  # one timer tick of a kernel with 250 Hz


@dataclass(frozen=True)
class NicBytes:
    """What a node's NIC has carried since it was made.

    Bytes as the kernel counts them on a virtual NIC: payload plus one header (66 bytes of Ethernet, IP and TCP) per
    segmentation unit of up to 64 KiB, and the acknowledgements of the other direction.
    """

    sent_bytes: int
    received_bytes: int
    sent_packets: int
    received_packets: int

    def __sub__(self, earlier: NicBytes) -> NicBytes:
        return NicBytes(
            self.sent_bytes - earlier.sent_bytes,
            self.received_bytes - earlier.received_bytes,
            self.sent_packets - earlier.sent_packets,
            self.received_packets - earlier.received_packets,
        )


def require_kernel_access() -> None:
    """Checks that namespaces can be made at all.

    Raises:
        ConfigError: not root, or iproute2 is not installed.
    """
    if os.geteuid() != 0:
        raise ConfigError(
            f"a virtual cluster needs root, to make network namespaces: expected user id 0, got {os.geteuid()}. "
            "Run it under sudo, or in a container started with --cap-add NET_ADMIN --cap-add SYS_ADMIN."
        )
    missing = [tool for tool in ("ip", "tc", "unshare", "hostname") if shutil.which(tool) is None]
    if missing:
        raise ConfigError(
            f"a virtual cluster needs iproute2, util-linux and hostname: `{'`, `'.join(missing)}` not found on PATH. "
            "Install them (Debian and Ubuntu: apt-get install iproute2 util-linux hostname)."
        )


def existing() -> set[str]:
    """Names of the network namespaces of this machine, whoever made them."""
    return {entry["name"] for entry in _json("ip", "netns", "list")}


def create(namespace: str) -> None:
    """A network namespace with its loopback up."""
    _run("ip", "netns", "add", namespace)
    _run("ip", "-n", namespace, "link", "set", "lo", "up")


def delete(namespace: str) -> None:
    """Removes the namespace and, with it, its interfaces; it must hold no process."""
    _run("ip", "netns", "delete", namespace)


def create_bridge(namespace: str, bridge: str) -> None:
    """A bridge inside `namespace`: the switch that nodes are plugged into."""
    _run("ip", "-n", namespace, "link", "add", bridge, "mtu", str(MTU_BYTES), "type", "bridge")
    _run("ip", "-n", namespace, "link", "set", bridge, "up")


def plug_in(node: str, address: str, *, switch: str, bridge: str, port: str) -> None:
    """Gives namespace `node` a NIC with `address` (as 10.0.0.1/24) on the `port` of the switch."""
    mtu = ("mtu", str(MTU_BYTES))
    _run("ip", "-n", switch, "link", "add", port, *mtu, "type", "veth", "peer", "name", NIC, *mtu, "netns", node)
    _run("ip", "-n", switch, "link", "set", port, "master", bridge, "up")
    _run("ip", "-n", node, "address", "add", address, "dev", NIC)
    _run("ip", "-n", node, "link", "set", NIC, "up")


def shape(namespace: str, interface: str, rate_mbit: float | None) -> None:
    """Limits what `interface` sends to `rate_mbit` (10^6 bits per second, headers included); None lifts the limit.

    A token bucket: after idling, up to 4 ms of the rate (at least 128 KiB) leave at once.

    Raises:
        ConfigError: no such interface, or a rate that tc refuses or does not set.
    """
    if interface not in interfaces(namespace):
        raise ConfigError(f"there is no interface {interface!r} in {namespace}: it has {interfaces(namespace)}.")
    if rate_mbit is None:
        if any(qdisc["kind"] == "tbf" for qdisc in _qdiscs(namespace, interface)):
            _run("tc", "-n", namespace, "qdisc", "delete", "dev", interface, "root")
        return
    check_rate(rate_mbit)
    rate = round(rate_mbit * 1e6)
    burst = max(_LEAST_BURST_BYTES, round(rate / 8 * _BURST_S))
    bucket = ("tbf", "rate", f"{rate}bit", "burst", f"{burst}b", "latency", f"{_LATENCY_MS}ms")
    try:
        _run("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root", *bucket)
    except MiCSError as error:
        raise ConfigError(f"tc refused a rate of {rate_mbit} Mbit/s: {error}") from None
    # tc takes some rates without a word and sets others: it reads what it can and wraps around.
    got = next((q["options"] for q in _qdiscs(namespace, interface) if q["kind"] == "tbf"), {"rate": 0, "burst": 0})
    if abs(got["rate"] * 8 - rate) > 0.01 * rate or not got["burst"]:
        raise ConfigError(
            f"the kernel did not take a rate of {rate_mbit} Mbit/s: tc reports {got['rate'] * 8 / 1e6} Mbit/s with a "
            f"burst of {got['burst']} bytes. Choose a rate between 0.1 and 100000 Mbit/s, or none for an unshaped NIC."
        )


def check_rate(rate_mbit: float | None) -> None:
    """Raises:
    ConfigError: not a positive, finite number.
    """
    if rate_mbit is not None and not (math.isfinite(rate_mbit) and rate_mbit >= 1e-3):
        raise ConfigError(f"a NIC's rate must be at least 0.001 Mbit/s, or none to leave it unshaped; got {rate_mbit}.")


def set_link(namespace: str, interface: str, *, up: bool) -> None:
    """Takes the link down or up, as pulling and replugging a cable does for the interface at its other end."""
    _run("ip", "-n", namespace, "link", "set", interface, "up" if up else "down")


def interfaces(namespace: str) -> list[str]:
    """Names of the interfaces of a namespace."""
    return [link["ifname"] for link in _json("ip", "-n", namespace, "link", "show")]


def read_nic(namespace: str) -> NicBytes:
    """The byte and packet counters of the namespace's NIC."""
    (link,) = _json("ip", "-n", namespace, "-s", "link", "show", "dev", NIC)
    sent, received = link["stats64"]["tx"], link["stats64"]["rx"]
    return NicBytes(sent["bytes"], received["bytes"], sent["packets"], received["packets"])


def pids(namespace: str) -> list[int]:
    """Ids of the processes that run inside the namespace."""
    return [int(word) for word in _run("ip", "netns", "pids", namespace).split()]


def inside(namespace: str, command: list[str]) -> list[str]:
    """`command`, to be run inside the namespace; /sys shows its interfaces there, and its host name is the node's."""
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', namespace]
    return ["ip", "netns", "exec", namespace, *named, *command]


def _qdiscs(namespace: str, interface: str) -> list[dict[str, Any]]:
    return _json("tc", "-n", namespace, "qdisc", "show", "dev", interface)


def _json(*command: str) -> Any:
    tool, *rest = command
    text = _run(tool, "-j", *rest)
    return json.loads(text) if text.strip() else []


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise MiCSError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout
