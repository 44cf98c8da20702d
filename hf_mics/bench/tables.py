"""Which tables does the report hold? One function each, from summaries to Markdown."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from hf_mics.bench.configuration import Configuration
from hf_mics.bench.summaries import Summary
from hf_mics.bench.wire import HOP1, HOP2

Row = Sequence[str]


def markdown(header: Row, rows: Iterable[Row]) -> str:
    """A Markdown table, numbers to the right."""
    rows = [list(row) for row in rows]
    table = Table(box=box.MARKDOWN)
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=1000, color_system=None).print(table, markup=False)
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())


def throughput(runs: Sequence[Summary], ours: Summary | None) -> str:
    """Every system, the fastest first; `ours` is what speed is compared with."""
    header = (
        "system", "s/step", "min to max", "tokens/s", "time / MiCS's", "sent per NIC (MB)", "waiting (s)",
        "gradients held (MB)", "training adds (MB)",
    )  # fmt: skip
    rows = []
    for run in sorted(runs, key=lambda run: run.step_s):
        gradients = run.gradient_bytes
        rows.append(
            (
                run.configuration.label,
                f"{run.step_s:.2f}",
                f"{min(run.times_s):.2f} to {max(run.times_s):.2f}",
                f"{run.tokens_per_s:.0f}",
                f"{run.step_s / ours.step_s:.2f}" if ours else "",
                f"{run.sent_bytes / 1e6:.1f}",
                # DDP waits in C++, where the stopwatch does not reach.
                f"{run.communication_s:.2f}" if run.configuration.system != "ddp" else "inside backward",
                f"{gradients / 1e6:.1f}" if gradients else "not seen",
                f"{run.training_rss_bytes / 1e6:.0f}",
            )
        )
    return markdown(header, rows)


def losses(runs: Iterable[Summary]) -> str:
    """The distance of every system's losses from exact arithmetic, beside what rounding explains."""
    rows = [
        (
            run.configuration.label,
            run.configuration.model,
            str(len(run.records[0].losses)),
            f"{run.loss_error:.1e}",
            f"{run.loss_tolerance:.1e}",
            "yes" if run.losses_are_equal else "**no**",
        )
        for run in runs
        if run.loss_error is not None
    ]
    return markdown(("system", "model", "steps", "largest distance", "tolerance", "equal"), rows)


def bound(runs: Iterable[Summary], compute_s: float) -> str:
    """Measured steps beside bytes over the NIC's rate plus computation."""
    rows = []
    for run in runs:
        rate = run.configuration.rate_mbit
        if rate is None:
            continue
        on_wire_s = run.sent_bytes * 8 / (rate * 1e6)
        least_s = on_wire_s + compute_s
        rows.append(
            (
                run.configuration.label,
                f"{on_wire_s:.2f}",
                f"{compute_s:.2f}",
                f"{least_s:.2f}",
                f"{run.step_s:.2f}",
                f"{run.step_s / least_s:.2f}",
            )
        )
    return markdown(
        ("system", "bytes / rate (s)", "computing (s)", "bound (s)", "measured (s)", "measured / bound"), rows
    )


def wire(runs: Iterable[Summary]) -> str:
    """Predicted and counted bytes per NIC and step, in all and by hop."""
    header = (
        "configuration", "predicted (MB)", "counted (MB)", "difference", "hop 1 predicted", "hop 1 counted",
        "hop 2 predicted", "hop 2 counted",
    )  # fmt: skip
    rows = []
    for run in runs:
        expected, predicted = run.records[0].expected_nic_bytes, run.expected_sent_bytes
        if expected is None or not predicted:
            continue
        split = run.split_sent_bytes()
        counted = {hop: f"{split[hop] / 1e6:.2f}" if split else "" for hop in (HOP1, HOP2)}
        rows.append(
            (
                run.configuration.label,
                f"{predicted / 1e6:.2f}",
                f"{run.sent_bytes / 1e6:.2f}",
                f"{run.sent_bytes / predicted - 1:+.2%}",
                *(f"{expected[HOP1] / 1e6:.2f}", counted[HOP1], f"{expected[HOP2] / 1e6:.2f}", counted[HOP2]),
            )
        )
    return markdown(header, rows)


def sweep(runs: Sequence[Summary], name: str, of: str) -> str:
    """Seconds per step, one row for each value of the configuration's field `of`, one column for each system."""
    systems = list(dict.fromkeys(run.configuration.variant for run in runs))
    labels = {run.configuration.variant: run.configuration.label for run in runs}
    values = sorted({getattr(run.configuration, of) for run in runs})
    by_cell = {(getattr(run.configuration, of), run.configuration.variant): run for run in runs}
    rows = []
    for value in values:
        cells = [by_cell.get((value, system)) for system in systems]
        rows.append((f"{value:g}", *(f"{cell.step_s:.2f}" if cell else "" for cell in cells)))
    return markdown((name, *(labels[system] for system in systems)), rows)


def weak_scaling(runs: Iterable[Summary]) -> str:
    """Communication and bytes as nodes grow, by hop, and what hop 2's bytes cannot take less than."""
    header = (
        "system", "nodes x ranks", "s/step", "waiting (s)", "hop 1 (s)", "hop 2 (s)", "hop 2's bytes / rate (s)",
        "sent per NIC (MB)",
    )  # fmt: skip
    rows = []
    for run in runs:
        c = run.configuration
        hops = (run.hop1_s, run.waits_s.get("all_reduce", 0.0), run.hop2_on_the_wire_s) if c.spec.partitioned else ()
        cells = [f"{seconds:.2f}" for seconds in hops] or ["", "", ""]
        where, sent = f"{c.nodes} x {c.node_size}", f"{run.sent_bytes / 1e6:.1f}"
        rows.append((c.label, where, f"{run.step_s:.2f}", f"{run.communication_s:.2f}", *cells, sent))
    return markdown(header, rows)


def spanning(runs: Sequence[Summary]) -> str:
    """Bytes per NIC of partition groups that span nodes, as a share of what is gathered and scattered."""
    header = ("partition group", "collectives", "sent per NIC (MB)", "share of the volume", "(p-k)/p", "(p-1)/p")
    rows, volumes = [], _hop1_volume_bytes(runs)
    for run in runs:
        c = run.configuration
        p, k = c.topology.partition_size, c.topology.node_size
        volume = volumes.get(p)
        expected = run.records[0].expected_nic_bytes or {}
        hop1 = run.sent_bytes - expected.get(HOP2, 0.0)
        rows.append(
            (
                f"{p} ranks on {c.topology.nodes_per_partition} nodes",
                "hierarchical" if c.hierarchical else "flat",
                f"{run.sent_bytes / 1e6:.1f}",
                f"{hop1 / volume:.3f}" if volume else "",
                f"{(p - k) / p:.3f}",
                f"{(p - 1) / p:.3f}",
            )
        )
    return markdown(header, rows)


def _hop1_volume_bytes(runs: Iterable[Summary]) -> dict[int, float]:
    """Bytes that hop 1 gathers and scatters per step, by partition size: staged predictions over (p-k)/p."""
    volumes = {}
    for run in runs:
        expected, topology = run.records[0].expected_nic_bytes, run.configuration.topology
        p, k = topology.partition_size, topology.node_size
        if expected is not None and run.configuration.hierarchical and p > k:
            volumes[p] = expected[HOP1] * p / (p - k)
    return volumes


def settings(configurations: Iterable[Configuration]) -> str:
    """How each system was configured."""
    systems = {c.system: c.spec for c in configurations}
    return markdown(("system", "how"), ((spec.label, spec.how) for spec in systems.values()))
