"""What did the loss do over the run, as a picture?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

StepLoss = Sequence[tuple[float, float]]


def plot_losses(train: StepLoss, validation: StepLoss, path: str | Path, title: str, per: str = "token") -> None:
    """Writes a PNG of training and validation loss (nats per token) against the optimizer step; needs no display.

    Args:
        per: what a loss is the mean of.
    """
    from matplotlib.figure import Figure

    # Figure without pyplot draws with Agg and leaves the process's own matplotlib settings alone.
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for points, style, label in ((train, "-", "training"), (validation, "o-", "validation")):
        axes.plot([step for step, _ in points], [loss for _, loss in points], style, label=label)
    axes.set(xlabel="optimizer step", ylabel=f"loss (nats per {per})", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
