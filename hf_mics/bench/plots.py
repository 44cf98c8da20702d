"""Which plots does the report hold? One function each, from summaries to a PNG; all say where they were measured."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from hf_mics.bench.summaries import Summary

_OURS, _THEIRS, _PALE = "#d1495b", "#30638e", "#b8c4ce"
_PHASES = {
    "all_gather": ("all-gather", "#30638e"),
    "reduce_scatter": ("reduce-scatter", "#7fb0d6"),
    "exchange": ("slices between ranks (hop 1 of hf_mics)", "#a8dadc"),
    "all_reduce": ("all-reduce (hop 2)", _OURS),
    "other": ("other waits", "#999999"),
}


@contextmanager
def _figure(path: Path, size: tuple[float, float], note: str) -> Iterator[Axes]:
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    figure.supxlabel(textwrap.fill(note, int(19 * size[0])), fontsize=6, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _color(run: Summary) -> str:
    if not run.configuration.spec.equal_losses:
        return _PALE
    return _OURS if run.configuration.system == "mics" else _THEIRS


def throughput(runs: Sequence[Summary], path: Path, note: str) -> None:
    """Horizontal bars of tokens per second, with the range of single steps."""
    runs = sorted((r for r in runs if r.configuration.spec.equal_losses), key=lambda run: run.tokens_per_s)
    tokens = [run.configuration.tokens_per_step for run in runs]
    speeds = [run.tokens_per_s for run in runs]
    below = [max(0.0, s - n / max(run.times_s)) for s, n, run in zip(speeds, tokens, runs, strict=True)]
    above = [max(0.0, n / min(run.times_s) - s) for s, n, run in zip(speeds, tokens, runs, strict=True)]
    with _figure(path, (8, 0.6 + 0.27 * len(runs)), note) as axes:
        labels = [run.configuration.label for run in runs]
        bars = axes.barh(labels, speeds, xerr=[below, above], color=[_color(run) for run in runs], ecolor="#444444")
        axes.bar_label(bars, fmt=" %.0f", fontsize=7)
        axes.set_xlabel("tokens per second, all ranks")
        axes.tick_params(labelsize=8)


def phases(runs: Sequence[Summary], path: Path, note: str) -> None:
    """Stacked bars: seconds of a micro-step by what a rank waits for."""
    runs = sorted((r for r in runs if r.configuration.spec.equal_losses), key=lambda run: -run.step_s)
    labels = [run.configuration.label for run in runs]
    left = [0.0] * len(runs)
    with _figure(path, (8, 0.8 + 0.27 * len(runs)), note) as axes:
        for phase, (label, color) in _PHASES.items():
            widths = [run.waits_s.get(phase, 0.0) / run.configuration.micro_steps for run in runs]
            if max(widths) > 0.005 * max(run.step_s for run in runs):
                axes.barh(labels, widths, left=left, label=label, color=color)
                left = [a + b for a, b in zip(left, widths, strict=True)]
        rest = [max(0.0, r.step_s / r.configuration.micro_steps - done) for r, done in zip(runs, left, strict=True)]
        axes.barh(labels, rest, left=left, label="computing, and what DDP waits for in C++", color=_PALE)
        axes.set_xlabel("seconds per micro-step (a step's time over its micro-steps)")
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7, frameon=False)


def traffic(runs: Sequence[Summary], path: Path, note: str) -> None:
    """Counted bytes per NIC beside the engine's prediction."""
    runs = [run for run in runs if run.expected_sent_bytes]
    with _figure(path, (8, 0.8 + 0.3 * len(runs)), note) as axes:
        rows = range(len(runs))
        axes.barh([i - 0.2 for i in rows], [run.sent_bytes / 1e6 for run in runs], 0.38, label="counted", color=_OURS)
        predicted = [(run.expected_sent_bytes or 0.0) / 1e6 for run in runs]
        axes.barh([i + 0.2 for i in rows], predicted, 0.38, label="predicted", color=_PALE)
        axes.set_yticks(list(rows), [run.configuration.label for run in runs], fontsize=8)
        axes.set_xlabel("MB sent per NIC and optimizer step")
        axes.legend(fontsize=7, frameon=False)


def lines(runs: Sequence[Summary], of: str, title: str, path: Path, note: str) -> None:
    """Seconds per step of every system against a field of the configuration, both on logarithmic axes."""
    with _figure(path, (6.5, 4), note) as axes:
        for system in dict.fromkeys(run.configuration.variant for run in runs):
            mine = sorted(
                (r for r in runs if r.configuration.variant == system), key=lambda r: getattr(r.configuration, of)
            )
            values = [getattr(run.configuration, of) for run in mine]
            style: dict[str, Any] = {"color": _OURS, "linewidth": 2.5} if mine[0].configuration.system == "mics" else {}
            axes.plot(values, [r.step_s for r in mine], "o-", label=mine[0].configuration.label, **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(title)
        axes.set_ylabel("seconds per optimizer step")
        axes.legend(fontsize=7, frameon=False)


def weak_scaling(runs: Sequence[Summary], path: Path, note: str) -> None:
    """Seconds of communication per step against nodes, on nodes of two ranks; MiCS's hop 1 also by itself."""
    runs = [run for run in runs if run.configuration.node_size == 2]
    with _figure(path, (6.5, 4), note) as axes:
        for system in dict.fromkeys(run.configuration.variant for run in runs):
            mine = sorted((r for r in runs if r.configuration.variant == system), key=lambda r: r.configuration.nodes)
            nodes, ours = [r.configuration.nodes for r in mine], mine[0].configuration.system == "mics"
            color = _OURS if ours else _THEIRS
            axes.plot(nodes, [r.communication_s for r in mine], "o-", color=color, label=mine[0].configuration.label)
            if ours:
                axes.plot(nodes, [r.hop1_s for r in mine], "o:", color=color, label="of which hop 1")
        axes.set_xticks(sorted({run.configuration.nodes for run in runs}))
        axes.set_xlabel("nodes of 2 ranks, the same work per rank")
        axes.set_ylabel("seconds that a rank waits per optimizer step")
        axes.legend(fontsize=8, frameon=False)
