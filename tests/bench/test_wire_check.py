"""Does each NIC carry what the engine counts and Topology predicts, phase by phase, in every configuration?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_mics.bench import wire_check
from hf_mics.bench.node_processes import require_success
from hf_mics.bench.virtual_cluster import VirtualCluster
from hf_mics.bench.wire_check import nic_bytes
from hf_mics.meter import Tally
from hf_mics.topology import Topology
from tests.bench.test_virtual_cluster import ENVIRONMENT, needs_root

# Headers of 66 bytes per segmentation unit of at least one 8948-byte segment are 0.7 %, acknowledgements of the other
# direction as much again; barriers are some kilobytes beside at least 2 MB. A wrong algorithm is off by 14 % or more.
ALLOWED = 0.03


@needs_root
def test_every_nic_carries_what_topology_and_counters_say(tmp_path: Path):
    # Three nodes, so that a group over all of them is not a power of two.
    with VirtualCluster(3, name=f"wire{os.getpid()}") as cluster:
        worker = ["-m", wire_check.__name__, str(tmp_path)]
        environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
        require_success(cluster.torchrun(2, worker, env=environment, timeout_s=150))
    found = wire_check.read(tmp_path)
    # p = 1, 2 and 6, the last both flat and hierarchical; two wires, three parts, three nodes.
    assert len(found) == (2 + 2) * 2 * 3 * 3
    for m in found:
        assert m.counted_bytes == pytest.approx(m.predicted_bytes, rel=1e-12)
        if m.predicted_bytes:
            assert m.measured_bytes == pytest.approx(m.predicted_bytes, rel=ALLOWED), m
            assert m.predicted_bytes > 2e6
        else:
            assert m.measured_bytes < 50_000, m


def test_the_published_factors_follow_from_what_ranks_send():
    """Per unit of gathered bytes, over gloo: (p-k)/p per node hierarchical, (p-1)/p flat (MiCS section 3.3)."""
    topology = Topology(world_size=8, node_size=2, partition_size=8)
    unit = 8 * 1000
    flat = nic_bytes(topology, {("all_gather", "partition"): Tally(1, 7 * 1000)})
    staged = nic_bytes(
        topology, {("all_gather", "inter_node"): Tally(1, 3 * 1000), ("all_gather", "intra_node"): Tally(4, 4 * 1000)}
    )
    assert flat / unit == 7 / 8
    assert staged / unit == 6 / 8
    # Each of a node's two ranks sends 6 of its 7 slices to other nodes.
    assert nic_bytes(topology, {("reduce_scatter", "partition"): Tally(1, 7 * 1000)}) / unit == 12 / 8
    inside = Topology(world_size=8, node_size=2, partition_size=2)
    assert nic_bytes(inside, {("reduce_scatter", "partition"): Tally(1, 1000)}) == 0
    # Two replication groups of four, one edge of each leaves every node.
    assert nic_bytes(inside, {("all_reduce", "replication"): Tally(1, 1500)}) == 3000
