"""Does deferring hop 2 save what others measured on real hardware?"""

from __future__ import annotations

from dataclasses import replace

from rich import box
from rich.table import Table
from scipy.optimize import brentq

from hf_mics.planning.cluster import Cluster, Link, Range
from hf_mics.planning.instances import instance_cluster
from hf_mics.planning.models import find_model
from hf_mics.planning.timing import predict, step_flops
from hf_mics.planning.workload import Workload

# NVIDIA cosmos-framework, issue 162: 2 x 8 A100 80 GB over Ethernet, shard 8 x replicate 2, accumulation 4.
COMPUTE_S = 10.8
EVERY_MICRO_STEP_S = 88.8
DEFERRED_S = (54.3, 54.9)
# Its model is not known to us; any will do, because computing and synchronization are set to what was measured.
WORKLOAD = Workload(model=find_model("gpt-20b"), seq_length=1024, micro_batch=1, accumulation=4)


def synchronization() -> list[Table]:
    """Sets the interface's rate by the run that synchronizes every micro-step, and predicts the deferred one."""
    rate = brentq(lambda bytes_per_s: step_s(bytes_per_s, two_hop=False) - EVERY_MICRO_STEP_S, 1e8, 1e12)
    table = Table("2 x 8 A100, Ethernet, accumulation 4", "predicted (s)", "measured (s)", box=box.MARKDOWN)
    always, once = (step_s(rate, two_hop=two_hop) for two_hop in (False, True))
    table.add_row("all-reduce in every micro-step (sets the one constant)", f"{always:.1f}", f"{EVERY_MICRO_STEP_S}")
    table.add_row("at the accumulation boundary only", f"{once:.1f}", "{} to {}".format(*DEFERRED_S))
    return [table]


def step_s(bytes_per_s: float, *, two_hop: bool) -> float:
    cluster = measured_cluster(bytes_per_s)
    return predict(WORKLOAD, cluster, partition_size=8, two_hop=two_hop).step_s.low


def measured_cluster(bytes_per_s: float) -> Cluster:
    """A micro-step's computing, gathers inside the node included, takes what was measured."""
    cluster = instance_cluster("dgx-a100", 2)
    flops_per_s = sum(step_flops(WORKLOAD)) / WORKLOAD.accumulation / COMPUTE_S
    return replace(
        cluster,
        compute_efficiency=Range.over(flops_per_s / cluster.accelerator.peak_flops_per_s),
        update_bytes_per_s=None,
        intra_node=Link(bandwidth_bytes_per_s=Range.over(1e30), latency_s=Range.over(0.0)),
        inter_node=Link(bandwidth_bytes_per_s=Range.over(bytes_per_s), latency_s=Range.over(0.0)),
    )
