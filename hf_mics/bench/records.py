"""What is kept of a run? One JSON record, and what follows from it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_mics.bench.configuration import Configuration
from hf_mics.bench.measure import Part
from hf_mics.errors import ConfigError


@dataclass(kw_only=True)
class Record:
    """One run of one configuration; lists have one entry per optimizer step, warm-up included.

    Attributes:
        repeat: which repeat, from 0.
        failure: why there are no measurements; None for a run that has them.
        losses: mean over the global batch.
        expected_losses, loss_tolerance: see `reference.py`; empty and None for the bound that trains something else.
        step_s: seconds, of the slowest rank.
        waits_s: seconds of a step that a rank waited, by collective, mean over ranks.
        nic_sent_bytes: bytes that left a node's NIC, mean over nodes. `nic_spread_bytes`: largest minus smallest node.
        micro_nic_sent_bytes: the same for each micro-step of the first step.
        expected_nic_bytes: what the system says it sends per optimizer step, by hop.
        gradient_bytes: gradients that a rank holds between micro-steps, of the rank that holds most.
        training_rss_bytes: what training adds to a rank's resident memory at its peak, of the rank that needs most.
        environment: versions, machine, command and commit.
    """

    configuration: Configuration
    repeat: int
    failure: str | None = None
    losses: list[float] = field(default_factory=list)
    expected_losses: list[float] = field(default_factory=list)
    loss_tolerance: float | None = None
    step_s: list[float] = field(default_factory=list)
    waits_s: list[dict[str, float]] = field(default_factory=list)
    nic_sent_bytes: list[float] = field(default_factory=list)
    nic_spread_bytes: list[float] = field(default_factory=list)
    micro_nic_sent_bytes: list[float] = field(default_factory=list)
    expected_nic_bytes: dict[str, float] | None = None
    gradient_bytes: int | None = None
    training_rss_bytes: int = 0
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def timed_s(self) -> list[float]:
        """Seconds of the steps after warm-up."""
        return self.step_s[self.configuration.warm_up_steps :]

    @property
    def timed_waits_s(self) -> dict[str, float]:
        """Seconds per timed step that a rank waited, by collective: the mean over steps."""
        return _means(self.waits_s[self.configuration.warm_up_steps :])

    @property
    def loss_error(self) -> float | None:
        """The largest distance of a loss from its expectation; None where nothing is expected."""
        if not self.expected_losses or not self.losses:
            return None
        return max(abs(a - b) for a, b in zip(self.losses, self.expected_losses, strict=True))

    @property
    def losses_are_equal(self) -> bool | None:
        """Whether every loss is within the tolerance; None where nothing is expected."""
        error = self.loss_error
        return None if error is None or self.loss_tolerance is None else error <= self.loss_tolerance

    def save(self, folder: Path) -> Path:
        """Writes the record into `folder`, over an earlier one of the same configuration and repeat."""
        path = record_path(folder, self.configuration, self.repeat)
        values = {**asdict(self), "configuration": self.configuration.to_json()}
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(_rounded(values), separators=(",", ":")) + "\n")
        scratch.replace(path)
        return path


def record_path(folder: Path, configuration: Configuration, repeat: int) -> Path:
    """Where the record of a run lies."""
    return folder / f"{configuration.identity}-r{repeat}.json"


def has_measurements(path: Path) -> bool:
    """Whether a record lies at `path` and is not that of a failure."""
    return path.exists() and _read(path).failure is None


def read_records(folder: Path) -> list[Record]:
    """Every record of a results folder, by file name.

    Raises:
        ConfigError: a file there is not a record.
    """
    return [_read(path) for path in sorted(folder.glob("*-r*.json"))]


def _read(path: Path) -> Record:
    try:
        values = json.loads(path.read_text())
        return Record(**{**values, "configuration": Configuration.from_json(values["configuration"])})
    except (json.JSONDecodeError, KeyError, TypeError, ConfigError) as error:
        raise ConfigError(f"{path} is not a record of this benchmark ({error}): remove it and run again.") from None


def merge(configuration: Configuration, repeat: int, parts: Sequence[Part], environment: dict[str, Any]) -> Record:
    """The record of a run from what its ranks saw."""
    firsts = [part for part in parts if part.rank % configuration.node_size == 0 and part.nic_sent_bytes]
    return Record(
        configuration=configuration,
        repeat=repeat,
        losses=[statistics.fmean(of_step) for of_step in zip(*(p.losses for p in parts), strict=True)],
        step_s=[max(of_step) for of_step in zip(*(p.step_s for p in parts), strict=True)],
        waits_s=[_means(of_step) for of_step in zip(*(p.waits_s for p in parts), strict=True)],
        nic_sent_bytes=[statistics.fmean(s) for s in zip(*(p.nic_sent_bytes for p in firsts), strict=True)],
        nic_spread_bytes=[max(s) - min(s) for s in zip(*(p.nic_sent_bytes for p in firsts), strict=True)],
        micro_nic_sent_bytes=[statistics.fmean(s) for s in zip(*(p.micro_nic_sent_bytes for p in firsts), strict=True)],
        expected_nic_bytes=parts[0].expected_nic_bytes,
        gradient_bytes=max((p.gradient_bytes for p in parts if p.gradient_bytes is not None), default=None),
        training_rss_bytes=max(p.peak_rss_bytes - p.rss_before_bytes for p in parts),
        environment={**environment, "versions": parts[0].versions},
    )


def _means(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each key's values; a row that lacks a key counts as 0."""
    rows = list(rows)
    keys = sorted({key for row in rows for key in row})
    return {key: sum(row.get(key, 0.0) for row in rows) / len(rows) for key in keys}


def _rounded(value: Any) -> Any:
    """Floats to 9 digits: enough for losses in float32, and short files."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
