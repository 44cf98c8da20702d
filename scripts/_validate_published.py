"""How do predictions from data sheets compare with the published MiCS figures, before and after a fit?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from rich import box
from rich.table import Table
from scipy.optimize import least_squares
from scipy.stats import qmc

from hf_mics.planning.cluster import Cluster, Rates
from hf_mics.planning.instances import NIC_EFFICIENCY
from hf_mics.planning.published import (
    BERT_SPEEDUP_UP_TO,
    DEEPSPEED_OVERLAPPED,
    DEEPSPEED_SERIAL,
    MICS_WEAK_SCALING,
    SETTINGS,
    ZERO3_WEAK_SCALING,
    Setting,
)
from hf_mics.planning.timing import predict_at, step_flops

INNER_SAMPLES = 128
FIT_SAMPLES = 1024
BERT_SIZES = (16, 128)
MICRO_BATCHES = (1, 2, 4, 8)
PUBLISHED = {
    "175B, MiCS on 128 A100 (TFLOPS per GPU)": 169.0,
    "100B, MiCS on 512 A100 (TFLOPS per GPU)": 170.0,
    "100B, MiCS, weak scaling 128 to 512 (%)": 100 * MICS_WEAK_SCALING,
    "100B, ZeRO-3 on 512 A100 (TFLOPS per GPU)": 62.0,
    "100B, ZeRO-3, weak scaling 128 to 512 (%)": 100 * ZERO3_WEAK_SCALING,
    "100B, MiCS over ZeRO-3 on 512 A100": 170 / 62,
    "BERT on p3dn, MiCS over ZeRO-3, largest": BERT_SPEEDUP_UP_TO,
}
# The ratio follows from two other rows.
FITTED = [name for name in PUBLISHED if "MiCS over ZeRO-3 on 512" not in name]


class Constants(NamedTuple):
    """What is fitted: one value for all instances. Rings run in lockstep, as in MiCS's model of latency."""

    compute_efficiency: float
    nic_share: float
    nic_latency_s: float
    zero3_overlap: float


class Bound(NamedTuple):
    low: float
    high: float


# Wider than what is declared: what no physical argument rules out.
BOUNDS = Constants(Bound(0.3, 0.8), Bound(0.3, 1.0), Bound(5e-6, 2e-4), Bound(0.0, 1.0))

RatesOf = Callable[[Cluster], Rates]


def published() -> list[Table]:
    """Every published row beside the range that the declared constants span; ratios share their constants."""
    values = np.array([figures(SETTINGS, rates, overlap) for rates, overlap in declared_samples()])
    table = Table("figure", "predicted", "published", "inside", box=box.MARKDOWN)
    inside = 0
    for name, found in zip(PUBLISHED, values.T, strict=True):
        low, high = found.min(), found.max()
        inside += (is_inside := low <= PUBLISHED[name] <= high)
        table.add_row(name, f"{low:.4g} to {high:.4g}", f"{PUBLISHED[name]:.3g}", "yes" if is_inside else "no")
    table.caption = (
        f"{inside} of {len(PUBLISHED)} inside; ranges over {len(values)} joint samples of the declared constants, all "
        "their corners among them."
    )
    return [table]


def sensitivity() -> list[Table]:
    """The same for other micro-batches of the 100B model, which is not published and decides most."""
    rows = [name for name in PUBLISHED if name.startswith("100B")]
    table = Table("figure", *(f"micro-batch {n}" for n in MICRO_BATCHES), "published", box=box.MARKDOWN)
    samples = list(declared_samples())
    columns = []
    for micro_batch in MICRO_BATCHES:
        settings = {**SETTINGS, "100B": replace(SETTINGS["100B"], micro_batch=micro_batch)}
        values = np.array([figures(settings, rates, overlap) for rates, overlap in samples])
        columns.append({n: (v.min(), v.max()) for n, v in zip(PUBLISHED, values.T, strict=True)})
    for name in rows:
        table.add_row(name, *("{:.4g} to {:.4g}".format(*column[name]) for column in columns), f"{PUBLISHED[name]:.3g}")
    return [table]


def fitted() -> list[Table]:
    """The best set of constants, and how far sets that fit almost as well differ from one another."""
    names = list(FITTED)
    target = np.array([PUBLISHED[name] for name in names])
    keep = [list(PUBLISHED).index(name) for name in names]
    low, high = np.array(BOUNDS).T

    def misfit(unit: np.ndarray) -> np.ndarray:
        return np.log(fit_figures(Constants(*(low + unit * (high - low))))[keep] / target)

    points = qmc.Sobol(len(BOUNDS), rng=0).random(FIT_SAMPLES)
    errors = np.array([np.abs(misfit(point)).max() for point in points])
    best = min(
        (least_squares(misfit, points[i], bounds=(0, 1), diff_step=1e-3) for i in np.argsort(errors)[:4]),
        key=lambda result: result.cost,
    ).x
    found = fit_figures(Constants(*(low + best * (high - low))))
    rows = Table("figure", "fitted", "published", "error", box=box.MARKDOWN)
    for name, value in zip(PUBLISHED, found, strict=True):
        how = "" if name in FITTED else " (not fitted: follows)"
        error = f"{100 * (value / PUBLISHED[name] - 1):+.1f} %"
        rows.add_row(name + how, f"{value:.3g}", f"{PUBLISHED[name]:.3g}", error)
    rows.title = f"{len(BOUNDS)} constants, {len(names)} points:"
    close = points[errors <= np.log(1.15)]
    constants = Table("constant", "searched", "best", "sampled sets within 15 % of every point", box=box.MARKDOWN)
    for i, name in enumerate(Constants._fields):
        spread = low[i] + close[:, i] * (high[i] - low[i]) if len(close) else np.array([np.nan])
        constants.add_row(
            name,
            f"{low[i]:.3g} to {high[i]:.3g}",
            f"{low[i] + best[i] * (high[i] - low[i]):.3g}",
            f"{spread.min():.3g} to {spread.max():.3g}",
        )
    constants.title = f"{len(close)} of {FIT_SAMPLES} sets tried come within 15 % of every point:"
    return [rows, constants]


def figures(settings: dict[str, Setting], rates: RatesOf, overlap: float) -> list[float]:
    """The published figures' predictions at one set of constants, in the order of PUBLISHED."""
    large, bert = settings["100B"], settings["BERT 10B"]
    mics = {n: tflops(large, n, mics_s(large, n, rates)) for n in (128, 512)}
    zero3 = {n: tflops(large, n, zero3_s(large, n, rates, overlap)) for n in (128, 512)}
    speedups = [zero3_s(bert, n, rates, overlap) / mics_s(bert, n, rates) for n in BERT_SIZES]
    return [
        tflops(settings["175B"], 128, mics_s(settings["175B"], 128, rates)),
        mics[512],
        100 * mics[512] / mics[128],
        zero3[512],
        100 * zero3[512] / zero3[128],
        mics[512] / zero3[512],
        max(speedups),
    ]


def mics_s(setting: Setting, world_size: int, rates: RatesOf) -> float:
    cluster = setting.cluster(world_size)
    return predict_at(setting.workload, cluster, rates(cluster), partition_size=setting.partition_size).step_s


def zero3_s(setting: Setting, world_size: int, rates: RatesOf, overlap: float) -> float:
    """DeepSpeed 0.5.6's ZeRO-3, of whose communication the share `overlap` runs beside computing where it could."""
    cluster = setting.cluster(world_size)
    hidden, serial = (
        predict_at(
            setting.workload, cluster, rates(cluster), system="zero3", partition_size=1, implementation=implementation
        ).step_s
        for implementation in (DEEPSPEED_OVERLAPPED, DEEPSPEED_SERIAL)
    )
    return overlap * hidden + (1 - overlap) * serial


def tflops(setting: Setting, world_size: int, step_s: float) -> float:
    return sum(step_flops(setting.workload)) / step_s / 1e12


def declared_samples() -> Iterable[tuple[RatesOf, float]]:
    """Joint samples of the declared ranges, and of how much ZeRO-3 overlaps, none to all: all corners, then inside."""
    names = list(SETTINGS["100B"].cluster(128).constants)
    corners = itertools.product((0.0, 1.0), repeat=len(names) + 1)
    points = qmc.Sobol(len(names) + 1, rng=0).random(INNER_SAMPLES).tolist()
    for *speeds, overlap in [*corners, *points]:
        at = dict(zip(names, speeds, strict=True))
        yield (lambda cluster, at=at: cluster.rates(at)), overlap


def fit_figures(constants: Constants) -> np.ndarray:
    def rates(cluster: Cluster) -> Rates:
        middle = cluster.rates(0.5)
        nic = cluster.inter_node.bandwidth_bytes_per_s.high / NIC_EFFICIENCY.high
        links = {**middle.links, "inter_node": (constants.nic_latency_s, constants.nic_share * nic)}
        flops_per_s = cluster.accelerator.peak_flops_per_s * constants.compute_efficiency
        return replace(middle, flops_per_s=flops_per_s, links=links, ring_lockstep=1.0)

    return np.array(figures(SETTINGS, rates, constants.zero3_overlap))
