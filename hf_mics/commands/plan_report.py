"""What does a plan look like in a terminal?"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_mics.commands.console_width import widen
from hf_mics.planning.cluster import Range
from hf_mics.planning.memory import MEMORY_KINDS
from hf_mics.planning.plan import GB, Candidate, Plan, assumptions

_BAR_WIDTH = 16
_COLOURS = dict(zip(MEMORY_KINDS, ("blue", "cyan", "magenta", "green", "yellow"), strict=True))


def print_plan(plan: Plan) -> None:
    """Prints the table of partition sizes, the choice and what it rests on."""
    console = Console()
    table = _table(plan)
    widen(console, table)
    request, choice = plan.request, plan.choice
    model, cluster, workload = request.workload.model, request.cluster, request.workload
    console.print(
        f"{model.name}, {model.num_parameters / 1e9:.2f}B parameters, {request.system} on {cluster.nodes} x "
        f"{cluster.gpus_per_node} {cluster.accelerator.name} ({cluster.name}); sequences of {workload.seq_length}, "
        f"micro-batch {workload.micro_batch}, accumulation {workload.accumulation}, {workload.precision}"
    )
    console.print(table)
    legend = Text("memory: ")
    for kind in MEMORY_KINDS:
        legend.append("█ ", style=_COLOURS[kind]).append(f"{kind}  ")
    console.print(legend.append("▒ reserve"))
    console.print(f"\nchoice: partition size {choice.partition_size}. {plan.reason}")
    if plan.runner_up:
        console.print(f"runner-up: {plan.runner_up.partition_size}")
    for change in plan.would_change:
        console.print(f"would change it: {change}")
    if plan.network:
        console.print(plan.network)
    console.print("\nassumed:")
    for line in assumptions(request):
        console.print(f"  {line}", soft_wrap=True, highlight=False)


def _table(plan: Plan) -> Table:
    available = plan.request.cluster.accelerator.memory_bytes
    table = Table(box=None, pad_edge=False)
    table.add_column("GPUs in\na group", justify="right")
    table.add_column("memory\nGB", justify="right")
    table.add_column(f"\nof {available / GB:.0f} GB".ljust(_BAR_WIDTH))
    for name in ("NIC\nGB/node", "NVLink\nGB/GPU", "step\ns", "\ntokens/s", "model FLOPS\n% of peak"):
        table.add_column(name, justify="right", no_wrap=True)
    if plan.request.price_per_hour is not None:
        table.add_column("price of\n1B tokens", justify="right", no_wrap=True)
    table.add_column("\nfits", no_wrap=True)
    for candidate in plan.candidates:
        style = "bold" if candidate is plan.choice else "" if candidate.fits else "dim"
        table.add_row(*_row(plan, candidate, available), style=style)
    return table


def _row(plan: Plan, candidate: Candidate, available: float) -> list[str | Text]:
    time, phases = candidate.time, candidate.traffic.values()
    row: list[str | Text] = [
        f"{candidate.partition_size}",
        f"{candidate.total_bytes / GB:.1f}",
        _bar(candidate, available),
        _short(sum(phase.nic_per_node for phase in phases) / GB),
        _short(sum(phase.nvlink_per_gpu for phase in phases) / GB),
        _span(time.step_s),
        _span(time.tokens_per_s),
        _span(time.utilization.scaled(100)),
    ]
    cost = candidate.cost_per_billion_tokens(plan.request.cluster.nodes)
    if cost is not None:
        row.append(_span(cost))
    mark = "<- choice" if candidate is plan.choice else "yes" if candidate.fits else _shortfall(candidate, available)
    return [*row, mark]


def _shortfall(candidate: Candidate, available: float) -> str:
    return f"no, {_short((candidate.total_bytes - available) / GB)} GB over"


def _bar(candidate: Candidate, available: float) -> Text:
    """Each kind's part of the GPU's memory; what does not fit is cut off with an arrow."""
    bar, drawn, so_far = Text(), 0, 0.0
    parts = [(candidate.memory.memory_bytes[kind], "█", _COLOURS[kind]) for kind in MEMORY_KINDS]
    for size, mark, colour in [*parts, (candidate.reserve_bytes, "▒", "")]:
        so_far += size
        end = min(_BAR_WIDTH, round(so_far / available * _BAR_WIDTH))
        bar.append(mark * (end - drawn), style=colour)
        drawn = end
    return bar.append("·" * (_BAR_WIDTH - drawn)) if candidate.fits else bar.append("▶")


def _span(found: Range) -> str:
    return f"{_short(found.low)} - {_short(found.high)}"


def _short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.2f}M"
    if value >= 1e4:
        return f"{value / 1e3:.0f}k"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
