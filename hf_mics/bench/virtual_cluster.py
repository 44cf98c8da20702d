"""How does one machine become a cluster of hosts with slow links?

Each node is a network namespace with its own address, plugged into a bridge that has a namespace of its own: nothing is
created among the machine's own interfaces, addresses or routes, and no packet can leave. Both ends of a node's cable
are shaped, so it neither sends nor receives faster than its NIC's rate. Ranks of one node reach each other over the
namespace's loopback, unshaped: the fast link inside a node. A node may also be kept to a share of the CPUs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml

from hf_mics.bench import cluster_state, cpu_share, namespaces
from hf_mics.bench.namespaces import NIC, NicBytes
from hf_mics.bench.node_processes import NodeProcesses, NodeResult
from hf_mics.errors import ConfigError

DEFAULT_NAME = "mics"
MOST_NODES = 250
_PORT = 29500  # every cluster has a network of its own, so a fixed port never clashes
_BRIDGE = "br0"


class VirtualCluster:
    """A cluster of `nodes` virtual hosts; a context manager that brings it up and takes it down.

    Taken down on exit, on any exception and Ctrl-C, and by a guard process if this one is killed.

    Args:
        nodes: how many hosts.
        rate_mbit: the rate of every NIC in each direction, 10^6 bits per second; None leaves NICs unshaped.
        cpus_per_node: what all processes of a node together may use, in CPUs of this machine; None: whatever is free.
        name: tells clusters of one machine apart; up to 16 lower-case letters, digits and dashes.

    Attributes:
        nodes: how many hosts.
        rate_mbit, cpus_per_node: as it was asked for.
        addresses: the IPv4 address of each node.

    Raises:
        ConfigError: no nodes, too many, a rate that is no rate, a share that is none or that the machine cannot give to
            all nodes, or a name that cannot be one.
    """

    def __init__(
        self,
        nodes: int,
        rate_mbit: float | None = None,
        name: str = DEFAULT_NAME,
        *,
        cpus_per_node: float | None = None,
    ) -> None:
        if not 1 <= nodes <= MOST_NODES:
            raise ConfigError(f"a virtual cluster has 1 to {MOST_NODES} nodes, got {nodes}.")
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,15}", name):
            raise ConfigError(
                f"a cluster's name starts with a letter and has up to 16 lower-case letters, digits and dashes, got "
                f"{name!r}."
            )
        namespaces.check_rate(rate_mbit)
        cpu_share.check(cpus_per_node, nodes)
        self.nodes = nodes
        self.rate_mbit = rate_mbit
        self.cpus_per_node = cpus_per_node
        self.name = name
        self.addresses = [f"10.77.0.{node + 1}" for node in range(nodes)]
        self._switch = f"{name}-switch"
        self._names = [f"{name}-node{node}" for node in range(nodes)]
        self._guard: subprocess.Popen[bytes] | None = None

    @classmethod
    def attach(cls, name: str = DEFAULT_NAME) -> VirtualCluster:
        """The cluster that `scripts/cluster up` has left running.

        Raises:
            ConfigError: there is none of that name, or its owner is gone.
        """
        namespaces.require_kernel_access()
        record = cluster_state.read(name)
        if record is None:
            raise ConfigError(f"there is no virtual cluster {name!r}. Bring it up: scripts/cluster up --name {name}.")
        if record.standing == "left over":
            raise ConfigError(
                f"virtual cluster {name!r} is left over from process {record.owner_pid}, which ended without taking it "
                f"down. Remove it with `scripts/cluster down --name {name}`."
            )
        return cls(record.nodes, record.rate_mbit, name, cpus_per_node=record.cpus_per_node)

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def up(self, *, keep: bool = False) -> None:
        """Creates the switch and the nodes; with `keep` they outlive this process, until `down`.

        Raises:
            ConfigError: not root, no iproute2, a name that is taken, or a rate that tc refuses. Nothing is left behind.
        """
        namespaces.require_kernel_access()
        record = cluster_state.claim(
            self.name,
            nodes=self.nodes,
            rate_mbit=self.rate_mbit,
            cpus_per_node=self.cpus_per_node,
            names=[self._switch, *self._names],
            owner_pid=None if keep else os.getpid(),
        )
        try:
            if not keep:
                self._guard = cluster_state.start_guard(record)
            namespaces.create(self._switch)
            namespaces.create_bridge(self._switch, _BRIDGE)
            for node, name in enumerate(self._names):
                namespaces.create(name)
                address = f"{self.addresses[node]}/24"
                namespaces.plug_in(name, address, switch=self._switch, bridge=_BRIDGE, port=_port(node))
                self.set_rate(node, self.rate_mbit)
                if self.cpus_per_node is not None:
                    cpu_share.create(name, self.cpus_per_node)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Kills what runs on the nodes and removes everything that `up` created; nothing if it is down."""
        record = cluster_state.read(self.name)
        if record is not None:
            cluster_state.take_down(record)
        if self._guard is not None:
            self._guard.communicate()
            self._guard = None

    def set_rate(self, node: int, rate_mbit: float | None) -> None:
        """Shapes the NIC of one node, both ways, from now on.

        Raises:
            ConfigError: no such node, or a rate that tc refuses.
        """
        namespaces.shape(self._name(node), NIC, rate_mbit)
        namespaces.shape(self._switch, _port(node), rate_mbit)

    def set_share(self, node: int, cpus: float | None) -> None:
        """Gives the node of a cluster with shares another share of the CPUs from now on; None: whatever is free.

        Raises:
            ConfigError: no such node, a share that is none, or a cluster without shares.
        """
        if self.cpus_per_node is None:
            raise ConfigError(
                f"virtual cluster {self.name!r} has no shares of CPUs to change. Bring it up with some: "
                "cpus_per_node=..., or scripts/cluster up --cpus-per-node."
            )
        cpu_share.check(cpus, 1)
        cpu_share.limit(self._name(node), cpus)

    def cut(self, node: int) -> None:
        """Pulls the node's cable at the switch: its NIC loses the carrier, packets in both directions are lost."""
        self._name(node)
        namespaces.set_link(self._switch, _port(node), up=False)

    def restore(self, node: int) -> None:
        """Plugs the cable back in."""
        self._name(node)
        namespaces.set_link(self._switch, _port(node), up=True)

    def nic_bytes(self) -> list[NicBytes]:
        """What each node's NIC has sent and received since `up`.

        A rank reads its own node's in /sys/class/net/eth0/statistics.
        """
        return [namespaces.read_nic(name) for name in self._names]

    def start(
        self,
        command_for_node: Callable[[int], list[str]],
        *,
        env: Mapping[str, str] | None = None,
        on: Sequence[int] | None = None,
    ) -> NodeProcesses:
        """Starts `command_for_node(node)` on every node, or on the nodes `on`, and returns at once.

        Args:
            command_for_node: the command of a node.
            env: variables added to this process's own. GLOO_SOCKET_IFNAME is the node's NIC unless it is given. GPUs
                are hidden: there are not enough for all nodes, and NCCL would not use the virtual NICs.
            on: the nodes to run on.

        Raises:
            ConfigError: no such node, or GLOO_SOCKET_IFNAME names an interface that nodes do not have.
        """
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": NIC, "CUDA_VISIBLE_DEVICES": "", **(env or {})}
        names = {node: self._name(node) for node in (range(self.nodes) if on is None else on)}
        for name in names.values():
            found = namespaces.interfaces(name)
            if environment["GLOO_SOCKET_IFNAME"] not in found:
                raise ConfigError(
                    f"GLOO_SOCKET_IFNAME must be an interface of the node, one of {found}; got "
                    f"{environment['GLOO_SOCKET_IFNAME']!r}."
                )
        commands = {node: namespaces.inside(name, command_for_node(node)) for node, name in names.items()}
        if self.cpus_per_node is not None:
            commands = {node: cpu_share.inside(names[node], command) for node, command in commands.items()}
        return NodeProcesses(commands, names, environment)

    def launch(
        self,
        command_for_node: Callable[[int], list[str]],
        *,
        env: Mapping[str, str] | None = None,
        timeout_s: float,
        on: Sequence[int] | None = None,
    ) -> list[NodeResult]:
        """`start`, then waits for all nodes; those that still run after `timeout_s` are killed."""
        with self.start(command_for_node, env=env, on=on) as processes:
            return processes.wait(timeout_s)

    def accelerate_launch(
        self,
        config_path: str | Path,
        ranks_per_node: int,
        script_args: Sequence[str],
        *,
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
        timeout_s: float,
        on: Sequence[int] | None = None,
    ) -> list[NodeResult]:
        """One `accelerate launch` per node, each with its machine rank, and waits for all.

        Args:
            config_path: accelerate's YAML; what it says of machines and processes is overridden.
            ranks_per_node: ranks on each node (k).
            script_args: what follows accelerate's own flags: a script or `-m module`, and its arguments.
            python: the interpreter whose accelerate launches.
            env: see `start`.
            timeout_s: when nodes that still run are killed.
            on: the nodes to run on, machine ranks in this order.

        Raises:
            ConfigError: the config's partition groups do not divide the ranks.
        """
        command = self.accelerate_command(config_path, ranks_per_node, script_args, python=python, on=on)
        return self.launch(command, env=env, timeout_s=timeout_s, on=on)

    def accelerate_command(
        self,
        config_path: str | Path,
        ranks_per_node: int,
        script_args: Sequence[str],
        *,
        python: str = sys.executable,
        on: Sequence[int] | None = None,
    ) -> Callable[[int], list[str]]:
        """The commands of `accelerate_launch`, for `start`."""
        nodes = list(range(self.nodes) if on is None else on)
        _check_split(Path(config_path), len(nodes), ranks_per_node)

        def command(node: int) -> list[str]:
            return [
                *(python, "-m", "accelerate.commands.launch", "--config_file", str(config_path)),
                *("--num_machines", str(len(nodes)), "--machine_rank", str(nodes.index(node))),
                *("--num_processes", str(len(nodes) * ranks_per_node)),
                *("--main_process_ip", self.addresses[nodes[0]], "--main_process_port", str(_PORT)),
                *script_args,
            ]

        return command

    def torchrun(
        self,
        ranks_per_node: int,
        script_args: Sequence[str],
        *,
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
        timeout_s: float,
        on: Sequence[int] | None = None,
    ) -> list[NodeResult]:
        """One `torchrun` per node, and waits for all; arguments as for `accelerate_launch`."""
        command = self.torchrun_command(ranks_per_node, script_args, python=python, on=on)
        return self.launch(command, env=env, timeout_s=timeout_s, on=on)

    def torchrun_command(
        self,
        ranks_per_node: int,
        script_args: Sequence[str],
        *,
        python: str = sys.executable,
        on: Sequence[int] | None = None,
    ) -> Callable[[int], list[str]]:
        """The commands of `torchrun`, for `start`."""
        nodes = list(range(self.nodes) if on is None else on)

        def command(node: int) -> list[str]:
            return [
                *(python, "-m", "torch.distributed.run", "--nnodes", str(len(nodes))),
                *("--node-rank", str(nodes.index(node)), "--nproc-per-node", str(ranks_per_node)),
                *("--master-addr", self.addresses[nodes[0]], "--master-port", str(_PORT)),
                *script_args,
            ]

        return command

    def _name(self, node: int) -> str:
        if not 0 <= node < self.nodes:
            raise ConfigError(f"virtual cluster {self.name!r} has nodes 0 to {self.nodes - 1}, got {node}.")
        return self._names[node]


def _port(node: int) -> str:
    return f"port{node}"


def _check_split(config: Path, nodes: int, ranks_per_node: int) -> None:
    """Raises:
    ConfigError: no ranks, no such file, or sizes whose product is not the number of ranks.
    """
    if ranks_per_node < 1:
        raise ConfigError(f"a node runs at least one rank, got {ranks_per_node}.")
    try:
        settings = yaml.safe_load(config.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{config} is not a readable accelerate config: {error}") from None
    sizes = (settings or {}).get("parallelism_config") or {}
    partition = sizes.get("parallelism_config_dp_shard_size")
    replicas = sizes.get("parallelism_config_dp_replicate_size", 1)
    ranks = nodes * ranks_per_node
    if partition is not None and int(partition) * int(replicas) != ranks:
        raise ConfigError(
            f"{nodes} nodes of {ranks_per_node} ranks are {ranks} ranks, but {config} splits {partition} x {replicas} "
            f"(dp_shard_size x dp_replicate_size). Their product must be {ranks}."
        )
