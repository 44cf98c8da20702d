"""How do the published MiCS figures look beside predictions from data sheets?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich import box
from rich.table import Table

from hf_mics.commands.scaling_report import ScalingReport, scaling_table, span
from hf_mics.planning.cluster import Range
from hf_mics.planning.published import (
    BERT_SPEEDUP_UP_TO,
    DEEPSPEED_OVERLAPPED,
    DEEPSPEED_SERIAL,
    POINTS,
    SETTINGS,
)
from hf_mics.planning.scaling import ScalePoint, simulate, sizes_between
from hf_mics.planning.scaling_plots import NAMES, Marker, Panel
from hf_mics.planning.timing import FSDP2, Implementation, StepTime, System

_SIZES = {"175B": (128, 512), "100B": (128, 512), "BERT 10B": (8, 128)}


def paper_report() -> ScalingReport:
    """Every setting with published figures: MiCS, and DeepSpeed 0.5.6's ZeRO-3 as a range over its overlap."""
    points = {name: paper_points(name) for name in SETTINGS}
    panels = [
        Panel(
            f"{name} on {setting.instance}, weak scaling",
            "TFLOPS per GPU, recomputation counted",
            points[name],
            lambda point: point.step.tflops_per_gpu,
            [Marker(p.system, p.world_size, p.tflops_per_gpu) for p in POINTS if p.setting == name],
        )
        for name, setting in SETTINGS.items()
    ]
    record = {
        "published": [
            {
                "setting": p.setting,
                "system": p.system,
                "world_size": p.world_size,
                "published_tflops_per_gpu": p.tflops_per_gpu,
                "predicted_tflops_per_gpu": predicted(points[p.setting], p.system, p.world_size).ends,
            }
            for p in POINTS
        ],
        "points": {name: [point.record() for point in found] for name, found in points.items()},
    }
    tables = [_published_table(points)]
    tables += [scaling_table(found, f"{name}, weak scaling, predicted") for name, found in points.items()]
    return ScalingReport(tables, record, {"paper": panels})


def paper_points(name: str) -> list[ScalePoint]:
    """MiCS and ZeRO-3 in the setting called `name`, at its sizes."""
    setting = SETTINGS[name]

    def points(system: System, implementation: Implementation) -> list[ScalePoint]:
        return simulate(
            setting.workload,
            setting.cluster(_SIZES[name][0]),
            scaling="weak",
            systems=[system],
            world_sizes=sizes_between(*_SIZES[name]),
            partition_size=setting.partition_size,
            implementation=implementation,
        ).points

    overlapped, serial = points("zero3", DEEPSPEED_OVERLAPPED), points("zero3", DEEPSPEED_SERIAL)
    return points("mics", FSDP2) + [_hull(*pair) for pair in zip(overlapped, serial, strict=True)]


def predicted(points: list[ScalePoint], system: str, world_size: int) -> Range:
    """TFLOPS per GPU of one point."""
    return next(p for p in points if (p.system, p.world_size) == (system, world_size)).step.tflops_per_gpu


def _hull(a: ScalePoint, b: ScalePoint) -> ScalePoint:
    """One point whose ranges hold those of both."""
    ranges: dict[str, Any] = {
        name: Range.over(*x.ends, *y.ends)
        for name in StepTime.__dataclass_fields__
        if isinstance(x := getattr(a.step, name), Range) and isinstance(y := getattr(b.step, name), Range)
    }
    return replace(a, step=replace(a.step, **ranges))


def _published_table(points: dict[str, list[ScalePoint]]) -> Table:
    table = Table("model", "system", "GPUs", "predicted TFLOPS per GPU", "published", box=box.SIMPLE)
    table.title = "published figures and predictions from data sheets; stars in the plot"
    for p in POINTS:
        found = span(predicted(points[p.setting], p.system, p.world_size))
        table.add_row(p.setting, NAMES[p.system], str(p.world_size), found, f"{p.tflops_per_gpu:.0f}")
    table.caption = f"BERT on p3dn: published up to {BERT_SPEEDUP_UP_TO} x ZeRO-2/3"
    return table
