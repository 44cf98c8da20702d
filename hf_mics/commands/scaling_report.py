"""How is predicted scaling shown: as tables, as JSON and as pictures?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from hf_mics.errors import ConfigError
from hf_mics.planning.cluster import Range
from hf_mics.planning.scaling import ScalePoint, efficiency
from hf_mics.planning.scaling_plots import NAMES, Panel, draw


@dataclass(frozen=True)
class ScalingReport:
    """Tables to print between a header and notes, the same as one JSON object, and panels by picture name."""

    tables: list[Table]
    record: dict[str, Any]
    pictures: dict[str, list[Panel]]
    header: str = ""
    notes: Sequence[str] = ()

    def save_pictures(self, folder: Path, *, force: bool) -> list[Path]:
        """Writes every picture as a PNG into `folder`, which is created, and returns their paths.

        Raises:
            ConfigError: one exists and `force` is False, or the folder cannot be; then nothing is written.
        """
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--plots must be a folder, got the file {str(folder)!r}.")
        paths = [folder / f"{name}.png" for name in self.pictures]
        present = [str(path) for path in paths if path.exists()]
        if present and not force:
            raise ConfigError(
                f"{', '.join(present)} exist and are not overwritten; choose another folder or add --force."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, panels in zip(paths, self.pictures.values(), strict=True):
                draw(panels, path)
        except OSError as error:
            raise ConfigError(f"cannot write plots into {str(folder)!r}: {error}") from None
        return paths


def scaling_table(points: Sequence[ScalePoint], title: str) -> Table:
    """One row for each number of GPUs, two columns for each system."""
    systems = list(dict.fromkeys(point.system for point in points))
    table = Table(title=title, box=box.SIMPLE)
    table.add_column("GPUs", justify="right")
    for system in systems:
        table.add_column(f"{NAMES[system]}\ntokens/s per GPU", justify="right")
        table.add_column("of smallest", justify="right")
    at = {(point.system, point.world_size): point for point in points}
    for world_size in sorted({point.world_size for point in points}):
        cells = []
        for system in systems:
            point = at.get((system, world_size))
            cells += ["-", "-"] if point is None else _cells(points, point)
        table.add_row(f"{world_size:,}", *cells)
    return table


def span(found: Range, form: str = ",.0f") -> str:
    """A range as text; one number where both ends look alike."""
    low, high = format(found.low, form), format(found.high, form)
    return low if low == high else f"{low}-{high}"


def _cells(points: Sequence[ScalePoint], point: ScalePoint) -> list[str]:
    return [span(point.tokens_per_s_per_gpu), span(efficiency(points, point), ".0%")]
