"""What cluster do the measurements add up to?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any, NamedTuple

from hf_mics.calibration.computing import Computing
from hf_mics.calibration.fitting import FittedLink, Timing, fit_link, range_of
from hf_mics.calibration.links import LinkPoint
from hf_mics.meter import Phase
from hf_mics.planning.cluster import Accelerator, Cluster, Lane, Link
from hf_mics.planning.collective_times import timed
from hf_mics.traffic import Backend

Fits = dict[tuple[Phase, Lane], FittedLink]


class Comparison(NamedTuple):
    """A gather over the whole job, which no constant was fitted to: measured, and as the fitted links have it."""

    name: str
    unit_bytes: int
    measured_s: float
    predicted_s: float


def fit_links(points: Sequence[LinkPoint]) -> Fits:
    """A latency and a bandwidth for each collective that runs on one lane."""
    timings: dict[tuple[Phase, Lane], list[Timing]] = {}
    for point in points:
        if len(point.loads) == 1 and point.name == point.loads[0].phase:
            load = point.loads[0]
            load_bytes = load.nic_bytes if load.lane == "inter_node" else load.rank_bytes
            timings.setdefault((load.phase, load.lane), []).append(Timing(load_bytes, load.steps, point.seconds))
    return {key: fit_link(found) for key, found in timings.items()}


def calibrated_cluster(
    *,
    name: str,
    nodes: int,
    node_size: int,
    backend: Backend,
    device_name: str,
    memory_bytes: float,
    fits: Fits,
    computing: Computing,
) -> Cluster:
    """The cluster whose ranges are what was measured."""
    links = {key: fit.link for key, fit in fits.items()}
    inter: Link | None = links.get(("all_gather", "inter_node"))
    intra = links.get(("all_gather", "intra_node")) or inter
    if intra is None:
        raise AssertionError("a cluster of one rank has nothing to measure")
    measured = f"measured over {backend}, {nodes} nodes of {node_size}"
    inside = measured if node_size > 1 else "not measured: one rank per node, so nothing stays inside"
    peak = computing.peak_flops_per_s
    on_all = f"on all {nodes * node_size} ranks"
    return Cluster(
        name=name,
        nodes=nodes,
        gpus_per_node=node_size,
        backend=backend,
        accelerator=Accelerator(name=device_name, memory_bytes=memory_bytes, peak_flops_per_s=peak),
        intra_node=intra,
        inter_node=inter,
        collectives=links,
        compute_efficiency=range_of([rate / peak for rate in computing.layer_flops_per_s], most=1.0),
        head_efficiency=range_of([rate / peak for rate in computing.head_flops_per_s], most=1.0),
        update_bytes_per_s=range_of(computing.update_bytes_per_s),
        update_s_per_tensor=range_of(computing.update_s_per_tensor),
        sources={
            "intra_node": inside,
            "inter_node": measured if inter else "not measured: one node",
            "compute_efficiency": f"measured: one layer, forward and backward, {on_all}",
            "head_efficiency": f"measured: the model without layers, forward and backward, {on_all}",
            "update_bytes_per_s": f"measured: AdamW {on_all}",
            "update_s_per_tensor": f"measured: AdamW on small tensors {on_all}",
            "ring_lockstep": "not measured; of flat collectives over several nodes",
        },
    )


def compare_gathers(points: Sequence[LinkPoint], cluster: Cluster) -> list[Comparison]:
    """The gathers over the whole job, flat and hierarchical, against the fit."""
    rates = cluster.rates(0.5)
    return [
        Comparison(
            point.name,
            point.unit_bytes,
            median(point.seconds),
            sum(stage.seconds for stage in timed(point.loads, rates)),
        )
        for point in points
        if point.name.endswith("gather") and " " in point.name
    ]


def as_records(points: Sequence[LinkPoint], fits: Fits, computing: Computing) -> dict[str, Any]:
    """Everything that was measured, for the cluster file."""
    return {
        "collectives": [
            {
                "name": p.name,
                "unit_bytes": p.unit_bytes,
                "loads": [asdict(load) for load in p.loads],
                "seconds": p.seconds,
            }
            for p in points
        ],
        "fits": {f"{phase}/{lane}": fit._asdict() for (phase, lane), fit in fits.items()},
        "computing": computing._asdict(),
    }
