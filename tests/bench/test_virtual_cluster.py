"""Are the virtual cluster's nodes hosts of their own with slow links, and is nothing left of it however it ends?"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from hf_mics.bench import cluster_state, cpu_share, namespaces
from hf_mics.bench.node_processes import NodeResult, require_success
from hf_mics.bench.virtual_cluster import VirtualCluster
from hf_mics.errors import ConfigError, MiCSError

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "tests" / "assets"
CONFIG = ROOT / "recipes" / "configs" / "cpu_2x2.yaml"
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}


def refusal() -> str:
    """Why no namespaces can be made here; empty if they can."""
    try:
        namespaces.require_kernel_access()
        namespaces.create(f"probe{os.getpid()}")
        namespaces.delete(f"probe{os.getpid()}")
    except MiCSError as error:
        return str(error)
    return ""


REFUSAL = refusal()
needs_root = pytest.mark.skipif(bool(REFUSAL), reason=f"no virtual cluster here: {REFUSAL}")


def share() -> float | None:
    """A share of the CPUs for a node, None where nodes cannot have one."""
    try:
        cpu_share.check(0.2, 2)
    except ConfigError:
        return None
    return 0.2


needs_shares = pytest.mark.skipif(share() is None, reason="no control groups with a cpu controller here")

# Node 0 sends argv[2] bytes to node 1 at argv[1]; node 1 prints how many seconds passed from first to last byte.
SEND = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 7000)) as s: s.sendall(bytes(int(sys.argv[2])))
"""
RECEIVE = """
import socket, sys, time
listener = socket.create_server((sys.argv[1], 7000))
print("ready", flush=True)
s, _ = listener.accept()
s.settimeout(20)
begin, total = None, 0
while chunk := s.recv(1 << 16):
    begin = begin or time.monotonic()
    total += len(chunk)
print(total, time.monotonic() - begin, flush=True)
"""


def machine(name: str) -> tuple[str, str, str, set[str]]:
    """What the cluster `name` might touch: interfaces, addresses, routes; namespaces and control groups of its name."""
    shown = [subprocess.check_output(["ip", *words], text=True) for words in (["link"], ["address"], ["route"])]
    # Not all namespaces: somebody may have a cluster of their own coming up or going down beside the tests.
    groups = set() if share() is None else {f"group {found}" for found in cpu_share.existing(f"{name}*")}
    return *shown, {namespace for namespace in namespaces.existing() if namespace.startswith(name)} | groups


@pytest.fixture(scope="module")
def cluster() -> Iterator[VirtualCluster]:
    name = f"test{os.getpid()}"
    before = machine(name)
    with VirtualCluster(2, 40, name=name) as up:
        *outside, inside = machine(name)
        assert (tuple(outside), len(inside)) == (before[:3], 3)  # two nodes and the switch between them
        yield up
    assert machine(name) == before
    assert cluster_state.read(up.name) is None


def receiver(cluster: VirtualCluster, amount: int, *, during: Callable[[], None] = lambda: None) -> tuple[int, float]:
    """Sends `amount` bytes from node 0 to node 1; (bytes received, seconds from first to last)."""
    with cluster.start(lambda node: [sys.executable, "-c", RECEIVE, cluster.addresses[1]], on=[1]) as listening:
        while "ready" not in listening.output(1)[0]:
            assert listening.running(), listening.output(1)
            time.sleep(0.02)
        command = [sys.executable, "-c", SEND, cluster.addresses[1], str(amount)]
        with cluster.start(lambda node: command, on=[0]) as sending:
            during()
            require_success(sending.wait(30))
        (result,) = require_success(listening.wait(30))
    total, seconds = result.stdout.split()[1:]
    return int(total), float(seconds)


@needs_root
def test_a_nic_carries_what_was_sent_and_no_faster_than_its_rate(cluster: VirtualCluster):
    amount = 3_000_000
    before = cluster.nic_bytes()
    total, seconds = receiver(cluster, amount)
    sender, recipient = (after - earlier for after, earlier in zip(cluster.nic_bytes(), before, strict=True))
    assert total == amount
    # One header of 66 bytes per segment of at least 8948 bytes of payload, plus ARP and the handshake.
    assert amount < sender.sent_bytes < amount * 1.01 + 2000
    assert amount < recipient.received_bytes < amount * 1.01 + 2000
    # Acknowledgements: fewer than one of 66 bytes per 8948 received, even if each segment is acknowledged.
    assert recipient.sent_bytes < amount * 0.01 + 2000
    # A lower bound that no scheduling can break: the bucket lets 128 KiB through at each end, the rest at 40 Mbit/s.
    assert seconds > (amount - 2 * 131072) * 8 / 40e6
    cluster.set_rate(0, 160)
    assert all(tbf_rate(cluster, *where) == 20_000_000 for where in ((cluster._names[0], "eth0"), ("", "port0")))
    cluster.set_rate(0, None)
    assert not any(tbf_rate(cluster, *where) for where in ((cluster._names[0], "eth0"), ("", "port0")))
    assert tbf_rate(cluster, cluster._names[1], "eth0") == 5_000_000
    cluster.set_rate(0, 40)


def tbf_rate(cluster: VirtualCluster, namespace: str, interface: str) -> int:
    """Bytes per second that the interface is limited to, 0 if it is not."""
    qdiscs = json.loads(
        subprocess.check_output(["tc", "-n", namespace or cluster._switch, "-j", "qdisc", "show", "dev", interface])
    )
    return next((qdisc["options"]["rate"] for qdisc in qdiscs if qdisc["kind"] == "tbf"), 0)


@needs_root
def test_a_cut_link_carries_nothing_until_it_is_restored(cluster: VirtualCluster):
    before = cluster.nic_bytes()[1]

    def cut_and_restore() -> None:
        time.sleep(0.2)
        cluster.cut(1)
        time.sleep(0.5)
        while_cut = cluster.nic_bytes()[1]
        time.sleep(0.3)
        assert cluster.nic_bytes()[1].received_bytes == while_cut.received_bytes
        assert (while_cut - before).received_bytes < 4_000_000
        cluster.restore(1)

    total, _ = receiver(cluster, 4_000_000, during=cut_and_restore)
    assert total == 4_000_000


@needs_root
def test_launch_runs_one_process_per_node_and_captures_what_it_says(cluster: VirtualCluster):
    code = (
        "import os, socket, sys; print(sys.argv[1], os.environ['GLOO_SOCKET_IFNAME'], os.environ['EXTRA'], "
        "socket.gethostname()); sys.exit({})"
    )
    results = cluster.launch(
        lambda node: [sys.executable, "-c", code.format(node * 3), cluster.addresses[node]],
        env={"EXTRA": "x"},
        timeout_s=20,
    )
    hosts = [f"{cluster.name}-node{node}" for node in (0, 1)]
    assert [r.stdout for r in results] == [f"10.77.0.1 eth0 x {hosts[0]}\n", f"10.77.0.2 eth0 x {hosts[1]}\n"]
    assert [(r.node, r.returncode, r.timed_out) for r in results] == [(0, 0, False), (1, 3, False)]
    with pytest.raises(MiCSError, match="node 1 exited 3"):
        require_success(results)
    # What a rank reads of its own node's NIC is what the cluster reads from outside.
    read = "print(open('/sys/class/net/eth0/statistics/tx_bytes').read())"
    before = cluster.nic_bytes()
    inside = [int(r.stdout) for r in cluster.launch(lambda node: [sys.executable, "-c", read], timeout_s=20)]
    # Not equal to either: a node may look up its neighbour's address (ARP) at any moment.
    after = cluster.nic_bytes()
    assert all(a.sent_bytes <= seen <= b.sent_bytes for a, seen, b in zip(before, inside, after, strict=True))
    assert min(inside) > 0


# Turns for argv[1] seconds, then prints the seconds of CPU that it got.
TURN = """
import sys, time
begin = time.monotonic()
while time.monotonic() < begin + float(sys.argv[1]): pass
print(time.process_time())
"""


@needs_root
@needs_shares
def test_a_node_with_a_share_of_the_cpus_gets_no_more():
    name = f"share{os.getpid()}"
    before = machine(name)
    with VirtualCluster(2, name=name, cpus_per_node=0.2) as cluster:
        results = require_success(cluster.launch(lambda node: [sys.executable, "-c", TURN, "0.6"], timeout_s=60))
        # A process with a CPU to itself gets 0.6 s. The kernel hands out slices of 5 ms before it looks at the quota.
        assert all(float(result.stdout) <= 0.2 * result.wall_s + 0.05 for result in results)
        cluster.set_share(0, None)
        cluster.set_share(1, 0.1)
        _, slower = require_success(cluster.launch(lambda node: [sys.executable, "-c", TURN, "0.6"], timeout_s=60))
        assert float(slower.stdout) <= 0.1 * slower.wall_s + 0.05
    assert machine(name) == before


# A launcher whose worker has a session of its own, out of reach of its process group.
DETACHED = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True).pid, flush=True)
time.sleep(600)
"""


def is_dead(pid: int) -> bool:
    """Whether no such process runs; an orphan may stay a zombie where process 1 reaps none."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@needs_root
def test_timeout_kills_everything_that_a_node_started(cluster: VirtualCluster):
    results = cluster.launch(lambda node: [sys.executable, "-c", DETACHED], timeout_s=2)
    assert all(result.timed_out and result.returncode == -signal.SIGKILL for result in results)
    assert all(is_dead(int(result.stdout)) for result in results)
    with pytest.raises(MiCSError, match=r"node 0 was killed after \d s"):
        require_success(results)


@needs_root
def test_accelerate_launches_one_machine_per_node(cluster: VirtualCluster, tmp_path: Path):
    cluster.set_rate(0, None)
    cluster.set_rate(1, None)
    before = cluster.nic_bytes()
    script = [str(ASSETS / "run_and_report.py"), str(tmp_path), str(ASSETS / "accelerate_causal.py"), "--epochs", "1"]
    results = cluster.accelerate_launch(
        CONFIG, 2, script, env={**ENVIRONMENT, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, timeout_s=120
    )
    require_success(results)
    # Four ranks on two nodes: the launcher has told the engine which ranks share a host.
    assert [json.loads((tmp_path / f"rank{r}.json").read_text())[0]["topology"] for r in range(4)] == [[4, 2, 2]] * 4
    assert "MiCS: 4 ranks on 2 nodes of 2" in results[0].stderr
    assert all((a - b).sent_bytes > 10_000 for a, b in zip(cluster.nic_bytes(), before, strict=True))


OWNER = """
import os, signal, sys, time
from hf_mics.bench.virtual_cluster import VirtualCluster
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
with VirtualCluster(2, 40, name=sys.argv[1], cpus_per_node=float(sys.argv[2]) or None) as cluster:
    with cluster.start(lambda node: [sys.executable, "-c", "import time; time.sleep(600)"]):
        print(cluster._guard.pid, flush=True)
        time.sleep(600)
"""


def owner(name: str) -> tuple[subprocess.Popen[str], int]:
    """Another process that owns a cluster `name` with something running on it, and the id of its guard."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, name, str(share() or 0)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        start_new_session=True,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def script(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "cluster", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **ENVIRONMENT},
    )


@needs_root
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_its_owner_is_interrupted_or_killed(how: signal.Signals):
    name = f"own{how.value}x{os.getpid()}"
    before = machine(name)
    process, guard = owner(name)
    try:
        assert cluster_state.read(name) is not None
        # The shell that names the host may have a child of its own for a moment before it becomes the command.
        wait_until(lambda: len(namespaces.pids(f"{name}-node0")) == 1)
        (running,) = namespaces.pids(f"{name}-node0")
        with pytest.raises(ConfigError, match=f"process {process.pid} uses it"):
            VirtualCluster(2, name=name).up()
    finally:
        os.killpg(process.pid, how)  # as Ctrl-C does: the process and its children
        try:
            process.wait(20)
        finally:
            process.kill()
    wait_until(lambda: cluster_state.read(name) is None and is_dead(guard))
    assert machine(name) == before
    assert is_dead(running)


def test_a_later_process_with_the_owner_s_id_does_not_own_the_cluster():
    started_s = psutil.Process().create_time()
    for owner_started_s, standing in ((started_s, "in use"), (started_s - 5.0, "left over")):
        record = cluster_state.Record("c", 2, None, None, [], os.getpid(), owner_started_s)
        assert record.standing == standing


@needs_root
def test_a_cluster_left_over_from_a_crash_is_found_and_removed_on_request():
    name = f"crash{os.getpid()}"
    before = machine(name)
    process, guard = owner(name)
    os.kill(guard, signal.SIGKILL)  # a crash that takes the guard with it
    process.kill()
    process.wait(20)
    with pytest.raises(ConfigError, match=f"ended without taking it down.*scripts/cluster down --name {name}"):
        VirtualCluster(2, name=name).up()
    with pytest.raises(ConfigError, match="left over from process"):
        VirtualCluster.attach(name)
    assert "left over" in script("status").stdout
    done = script("down", "--name", name)
    assert (done.returncode, done.stdout) == (0, f"{name}: 2 nodes removed (left over)\n")
    assert machine(name) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "hf_mics", "train.py", "--epochs", "1", "-m"], ["-m", "hf_mics", "train.py", "--epochs", "1", "-m"]),
        (["train.py", "-m", "x", "--name", "y"], ["train.py", "-m", "x", "--name", "y"]),
    ],
)
def test_the_script_hands_on_a_module_or_a_script_with_all_its_arguments(
    monkeypatch: pytest.MonkeyPatch, words: list[str], expected: list[str]
):
    given: list[list[str]] = []

    class Cluster:
        @classmethod
        def attach(cls, name: str) -> Cluster:
            return cls()

        def nic_bytes(self) -> list[namespaces.NicBytes]:
            return [namespaces.NicBytes(0, 0, 0, 0)]

        def accelerate_launch(self, config: Path, ranks: int, target: list[str], timeout_s: float) -> list[NodeResult]:
            given.append(target)
            return [NodeResult(0, 0, "", "", 0.0, False)]

    monkeypatch.setattr("hf_mics.bench.virtual_cluster.VirtualCluster", Cluster)
    flags = ["run", "--ranks-per-node", "2", "--config_file", "my.yaml"]
    monkeypatch.setattr(sys, "argv", ["cluster", *flags, *words])
    main = runpy.run_path(str(ROOT / "scripts" / "cluster"))["main"]
    assert main() == 0
    assert given == [expected]


@needs_root
def test_the_script_brings_up_runs_and_takes_down(tmp_path: Path):
    name = f"cli{os.getpid()}"
    before = machine(name)
    cpus = [] if share() is None else ["--cpus-per-node", "0.2"]
    assert script("up", "--nodes", "2", "--rate-mbit", "50", *cpus, "--name", name).returncode == 0
    try:
        shown = script("status").stdout
        assert f"{name}: 2 nodes, 50 Mbit/s{', 0.2 CPUs each' if cpus else ''}, kept" in shown
        assert "node 1 10.77.0.2: NIC sent" in shown
        again = script("up", "--nodes", "2", "--name", name)
        assert again.returncode == 2
        assert "it was brought up to stay" in again.stderr
        wrong = script("run", "--name", name, "--ranks-per-node", "3", "--config_file", str(CONFIG), "x.py")
        assert wrong.returncode == 2
        assert "2 nodes of 3 ranks are 6 ranks" in wrong.stderr
    finally:
        assert script("down", "--name", name).returncode == 0
    assert machine(name) == before


@needs_root
def test_a_namespace_of_somebody_else_is_left_alone():
    name = f"other{os.getpid()}"
    namespaces.create(f"{name}-node1")
    try:
        with pytest.raises(ConfigError, match="belong to no virtual cluster"):
            VirtualCluster(2, name=name).up()
        assert f"{name}-node1" in namespaces.existing()
        assert cluster_state.read(name) is None
    finally:
        namespaces.delete(f"{name}-node1")


@needs_root
@needs_shares
def test_a_control_group_of_somebody_else_is_left_alone():
    name = f"group{os.getpid()}"
    cpu_share.create(f"{name}-node1", 0.2)
    try:
        with pytest.raises(ConfigError, match=rf"control groups \['{name}-node1'\] exist already"):
            VirtualCluster(2, name=name, cpus_per_node=0.2).up()
        assert cpu_share.existing(f"{name}*") == [f"{name}-node1"]
        assert cluster_state.read(name) is None
    finally:
        cpu_share.delete(f"{name}-node1")


@needs_root
@pytest.mark.parametrize("rate_mbit", [1e12, 2e9])
def test_a_rate_that_tc_does_not_take_is_refused_and_nothing_is_left(rate_mbit: float):
    name = f"rate{os.getpid()}"
    before = machine(name)
    with pytest.raises(ConfigError, match="rate of"):
        VirtualCluster(1, rate_mbit, name=name).up()
    assert machine(name) == before


@needs_root
def test_nodes_and_interfaces_that_are_not_there_are_named(cluster: VirtualCluster):
    with pytest.raises(ConfigError, match="has nodes 0 to 1, got 2"):
        cluster.cut(2)
    with pytest.raises(ConfigError, match="has no shares of CPUs to change"):
        cluster.set_share(0, 0.2)
    with pytest.raises(ConfigError, match=r"one of \['lo', 'eth0'\]; got 'ens5'"):
        cluster.launch(lambda node: ["true"], env={"GLOO_SOCKET_IFNAME": "ens5"}, timeout_s=5)
    with pytest.raises(ConfigError, match="no interface 'ens5'"):
        namespaces.shape(cluster._names[0], "ens5", 10)


@pytest.mark.parametrize(
    ("cpus", "message"),
    [
        (0, "at least 0.1 CPUs.*got 0"),
        (-1, "at least 0.1 CPUs.*got -1"),
        (float("nan"), "at least 0.1 CPUs.*got nan"),
        (1, "4 nodes of 1 CPUs need 4, but this machine has 2: give a node at most 0.5"),
    ],
)
def test_impossible_shares_are_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, cpus: float, message: str
):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        VirtualCluster(4, cpus_per_node=cpus)


def test_control_groups_of_version_2_are_given_quotas_in_its_own_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """In a plain folder: what is written where. The kernel's part is tested on what this machine has."""
    mounts = [("cgroup2", "unified", "hugetlb"), ("cgroup2", "all", "cpuset cpu io")]
    for _, name, controllers in mounts:
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.controllers").write_text(controllers)
    found = [SimpleNamespace(fstype=kind, mountpoint=str(tmp_path / name), opts="rw") for kind, name, _ in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: found)
    cpu_share.create("node", 0.25)
    assert (tmp_path / "all" / "cgroup.subtree_control").read_text() == "+cpu"
    assert (tmp_path / "all" / "node" / "cpu.max").read_text() == "2500 10000"
    cpu_share.limit("node", None)
    assert (tmp_path / "all" / "node" / "cpu.max").read_text() == "max 10000"
    assert str(tmp_path / "all" / "node" / "cgroup.procs") in cpu_share.inside("node", ["true"])


def test_a_machine_without_control_groups_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [])
    with pytest.raises(ConfigError, match="no control groups with a cpu controller are mounted. Mount them"):
        VirtualCluster(1, cpus_per_node=0.2)


@pytest.mark.parametrize(
    ("nodes", "rate_mbit", "name", "message"),
    [
        (0, 400, "mics", "1 to 250 nodes, got 0"),
        (-1, 400, "mics", "1 to 250 nodes, got -1"),
        (2, 0, "mics", "at least 0.001 Mbit/s.*got 0"),
        (2, -5, "mics", "at least 0.001 Mbit/s.*got -5"),
        (2, float("nan"), "mics", "got nan"),
        (2, 400, "Not ok", "name starts with a letter"),
    ],
)
def test_impossible_clusters_are_refused_before_anything_is_made(nodes: int, rate_mbit: float, name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        VirtualCluster(nodes, rate_mbit, name=name)


def test_without_root_or_iproute2_the_refusal_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="needs root.*expected user id 0, got 1000"):
        VirtualCluster(2).up()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ConfigError, match="iproute2.*`ip`, `tc`, `unshare`, `hostname` not found.*apt-get install iproute2"
    ):
        VirtualCluster(2).up()
