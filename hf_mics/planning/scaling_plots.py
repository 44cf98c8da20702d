"""How does predicted scaling look as a picture, its ranges drawn and published points on top?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hf_mics.planning.cluster import Range
from hf_mics.planning.scaling import ScalePoint
from hf_mics.planning.timing import System

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES: dict[System, str] = {"mics": "MiCS", "zero3": "ZeRO-3", "zero2": "ZeRO-2", "hsdp": "FSDP2 hybrid", "ddp": "DDP"}
_COLORS: dict[System, str] = {"mics": "C0", "zero3": "C3", "zero2": "C1", "hsdp": "C2", "ddp": "C7"}


class Marker(NamedTuple):
    """A published point to draw: `value` of `system` at `world_size`."""

    system: System
    world_size: int
    value: float


class Panel(NamedTuple):
    """One picture: `value(point)` over the number of GPUs, a band for each system."""

    title: str
    label: str
    points: Sequence[ScalePoint]
    value: Callable[[ScalePoint], Range]
    markers: Sequence[Marker] = ()
    logarithmic: bool = False


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Writes a PNG of `panels` side by side, over whatever `path` holds; needs no display."""
    from matplotlib.figure import Figure

    # Figure without pyplot draws with Agg and leaves the process's own matplotlib settings alone.
    figure = Figure(figsize=(6.5 * len(panels), 4.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel)
    figure.savefig(path, dpi=150, format="png")


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for system in dict.fromkeys(point.system for point in panel.points):
        points = [point for point in panel.points if point.system == system]
        sizes = [point.world_size for point in points]
        low, high = ([getattr(panel.value(point), end) for point in points] for end in ("low", "high"))
        color = _COLORS[system]
        axes.fill_between(sizes, low, high, color=color, alpha=0.2, label=f"{NAMES[system]}, predicted range")
        for edge in (low, high):
            axes.plot(sizes, edge, color=color, linewidth=0.8, marker=".", markersize=4)
    for system in dict.fromkeys(marker.system for marker in panel.markers):
        marked = [marker for marker in panel.markers if marker.system == system]
        places = [marker.world_size for marker in marked], [marker.value for marker in marked]
        axes.plot(*places, "*", color=_COLORS[system], markersize=14, label=f"{NAMES[system]}, published")
    sizes = sorted({point.world_size for point in panel.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45)
    if panel.logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel="GPUs", ylabel=panel.label, title=panel.title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
