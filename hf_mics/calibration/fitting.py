"""Which latency and bandwidth explain the times that were measured, and how far do the times stray from them?"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import median_abs_deviation

from hf_mics.errors import MiCSError
from hf_mics.planning.cluster import Link, Range


class Timing(NamedTuple):
    """One size of a collective: `seconds`, one for each sample, for `load_bytes` on the link in `steps` steps."""

    load_bytes: float
    steps: int
    seconds: Sequence[float]


class FittedLink(NamedTuple):
    """seconds = steps * latency_s + bytes / bandwidth_bytes_per_s, within a factor of `spread` either way.

    `spread` is one robust standard deviation of log(measured / fitted) over all samples of all sizes.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    spread: float

    @property
    def link(self) -> Link:
        """The fit as ranges: each constant from a spread below to a spread above."""
        return Link(
            bandwidth_bytes_per_s=_around(self.bandwidth_bytes_per_s, self.spread),
            latency_s=_around(self.latency_s, self.spread),
        )


def fit_link(timings: Sequence[Timing]) -> FittedLink:
    """Fits latency and bandwidth to the medians, in logarithms, so that small and large sizes weigh the same.

    Raises:
        MiCSError: fewer than two sizes.
    """
    if len({timing.load_bytes for timing in timings}) < 2:
        raise MiCSError(
            "a latency and a bandwidth need at least two message sizes, and this link was too slow for more than one. "
            "Raise --limit-s."
        )
    loads = np.array([timing.load_bytes for timing in timings])
    steps = np.array([timing.steps for timing in timings], dtype=float)
    medians = np.array([median(timing.seconds) for timing in timings])

    def fitted(logs: np.ndarray) -> np.ndarray:
        latency, seconds_per_byte = np.exp(logs)
        return steps * latency + loads * seconds_per_byte

    start = np.log([medians.min() / steps.max(), medians.max() / loads.max()])
    # The soft loss keeps one size at which the backend changes its algorithm from bending the whole line.
    found = least_squares(lambda logs: np.log(fitted(logs) / medians), start, loss="soft_l1", f_scale=0.1).x
    samples = [
        np.log(np.array(timing.seconds) / expected) for timing, expected in zip(timings, fitted(found), strict=True)
    ]
    spread = np.exp(median_abs_deviation(np.concatenate(samples), center=_zero, scale="normal"))
    latency_s, seconds_per_byte = np.exp(found)
    return FittedLink(float(latency_s), float(1 / seconds_per_byte), float(spread))


def range_of(values: Sequence[float]) -> Range:
    """From the lower to the upper quartile of `values`."""
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Range(low, high)


def _around(value: float, spread: float) -> Range:
    return Range(value / spread, value * spread)


def _zero(values: np.ndarray, axis: int | None = None) -> float:
    return 0.0
