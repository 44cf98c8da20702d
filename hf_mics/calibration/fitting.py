"""Which latency and bandwidth explain the times that were measured, and how far do the times stray from them?"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from hf_mics.errors import MiCSError
from hf_mics.planning.cluster import Link, Range

# A range goes from the 5 % to the 95 % quantile of what was measured, and at least this factor either way: repeats
# within minutes cannot show how two days differ. The factor is an assumption.
SPREAD_QUANTILES = (0.05, 0.95)
LEAST_SPREAD = 1.05


class Timing(NamedTuple):
    """One size of a collective: `seconds`, one for each sample, for `load_bytes` on the link in `steps` steps."""

    load_bytes: float
    steps: int
    seconds: Sequence[float]


class FittedLink(NamedTuple):
    """seconds = steps * latency_s + bytes / bandwidth_bytes_per_s, times a factor from `fast` to `slow`.

    `fast` <= 1 <= `slow` are quantiles of measured / fitted over all samples, weighted as the fit is.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    fast: float
    slow: float

    @property
    def link(self) -> Link:
        """The fit as ranges around it."""
        latency, bandwidth = self.latency_s, self.bandwidth_bytes_per_s
        return Link(
            bandwidth_bytes_per_s=Range(bandwidth / self.slow, bandwidth / self.fast, bandwidth),
            latency_s=Range(latency * self.fast, latency * self.slow, latency),
        )


def fit_link(timings: Sequence[Timing]) -> FittedLink:
    """Fits latency and bandwidth to the medians, in logarithms, each size weighted by the seconds that it takes.

    Training waits for large messages, in which seconds are spent; weighted alike, many small sizes would bend the
    bandwidth to what the noise of their latency asks for. The latency is still theirs: it changes nothing else.

    Raises:
        MiCSError: fewer than two sizes.
    """
    if len({timing.load_bytes for timing in timings}) < 2:
        raise MiCSError(
            "a latency and a bandwidth need at least two message sizes, and this link was too slow, or --largest-mb "
            "too small, for more than one. Raise --limit-s or --largest-mb."
        )
    loads = np.array([timing.load_bytes for timing in timings])
    steps = np.array([timing.steps for timing in timings], dtype=float)
    medians = np.array([median(timing.seconds) for timing in timings])
    weights = medians / medians.sum()

    def fitted(logs: np.ndarray) -> np.ndarray:
        latency, seconds_per_byte = np.exp(logs)
        return steps * latency + loads * seconds_per_byte

    start = np.log([medians.min() / steps.max(), medians.max() / loads.max()])
    # Of weights that span four orders of magnitude the smallest decide on the latency: converge for them too.
    found = least_squares(
        lambda logs: np.sqrt(weights) * np.log(fitted(logs) / medians), start, x_scale="jac", ftol=1e-14, xtol=1e-12
    ).x
    ratios = [np.array(timing.seconds) / expected for timing, expected in zip(timings, fitted(found), strict=True)]
    shares = [np.full(len(ratio), weight / len(ratio)) for ratio, weight in zip(ratios, weights, strict=True)]
    fast, slow = np.quantile(
        np.concatenate(ratios), SPREAD_QUANTILES, weights=np.concatenate(shares), method="inverted_cdf"
    )
    latency_s, seconds_per_byte = np.exp(found)
    return FittedLink(
        float(latency_s),
        float(1 / seconds_per_byte),
        min(float(fast), 1 / LEAST_SPREAD),
        max(float(slow), LEAST_SPREAD),
    )


def range_of(values: Sequence[float], *, most: float = np.inf) -> Range:
    """The range of what was measured around its median, as wide as links' are; nothing of it above `most`."""
    typical = min(median(values), most)
    low, high = np.quantile(values, SPREAD_QUANTILES)
    return Range(min(float(low), typical / LEAST_SPREAD), min(max(float(high), typical * LEAST_SPREAD), most), typical)
