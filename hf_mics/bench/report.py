"""How do records become a report? Sections with tables and plots, for those experiments that were run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_mics.bench import claims, plots, tables
from hf_mics.bench.experiments import EXPERIMENTS
from hf_mics.bench.records import read_records
from hf_mics.bench.summaries import Summary, failed, found, summarize
from hf_mics.errors import ConfigError

MARK = "measured on a virtual cluster"
_COMPARED_STEPS = 5


@dataclass
class Report:
    """A Markdown report in the making; plots lie in `images` beside it."""

    path: Path
    images: Path
    summaries: dict[str, Summary]
    text: list[str] = field(default_factory=list)

    def section(self, name: str) -> list[Summary]:
        """Starts the section of an experiment that has measurements, and returns them; says which runs failed."""
        runs = EXPERIMENTS[name].runs()
        measured = found(self.summaries, runs)
        if measured:
            self.add(f"## {EXPERIMENTS[name].title}", EXPERIMENTS[name].question, f"*{note_of(measured)}*")
            for run in failed(self.summaries, runs):
                reason = (run.failure or "").strip().splitlines()[-1]
                self.add(f"{run.configuration.label} could not be measured: `{reason[:200]}`")
        return measured

    def add(self, *paragraphs: str) -> None:
        """Appends paragraphs; empty ones are left out."""
        self.text += [paragraph for paragraph in paragraphs if paragraph]

    def image(self, name: str, description: str) -> Path:
        """Appends a plot, which the caller then writes to the path returned."""
        path = self.images / f"{name}.png"
        self.add(f"![{description}; {MARK}]({os.path.relpath(path, self.path.parent)})")
        return path


def note_of(runs: Sequence[Summary]) -> str:
    """Where the figures come from, in one line: mark, rates, nodes, CPUs, versions."""
    cs = [run.configuration for run in runs]
    rates = sorted({c.rate_mbit for c in cs}, key=lambda rate: rate or 0.0)
    shapes = sorted({(c.nodes, c.node_size) for c in cs})
    environment = runs[0].records[0].environment
    versions: dict[str, set[str]] = {}
    for run in runs:
        for name, version in run.records[0].environment["versions"].items():
            versions.setdefault(name, set()).add(version)
    repeats = max(len(run.records) for run in runs)
    return (
        f"{MARK}: {_list(f'{n} x {k}' for n, k in shapes)} (nodes x ranks), "
        f"NICs {_list('without a limit' if rate is None else f'of {rate:g} Mbit/s' for rate in rates)}, all on "
        f"{environment['cpus']} CPUs ({environment['cpu']}); "
        f"{_list(f'{name} {_list(sorted(found))}' for name, found in sorted(versions.items()))}; "
        f"{max(len(run.times_s) for run in runs)} timed steps, {repeats} repeat{'s' * (repeats > 1)}; "
        f"commit {_list(sorted({r.environment['commit'] for run in runs for r in run.records}))}"
    )


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)


def write_report(results: Path, path: Path, images: Path) -> None:
    """Writes the report of all records in `results` to `path`, and its plots into `images`.

    Raises:
        ConfigError: there are no records.
    """
    summaries = summarize(read_records(results))
    if not summaries:
        raise ConfigError(f"no records in {results}: run `scripts/bench headline` first, or name the folder.")
    report = Report(path, images, summaries)
    report.add(*_introduction(report))
    for name in ("headline", "headline-bert", "short"):
        _throughput(report, name)
    _ablation(report)
    _sweep(report, "accumulation", "micro-steps", "micro_steps")
    _sweep(report, "rate", "Mbit/s", "rate_mbit")
    _weak_scaling(report)
    _spanning(report)
    _wire(report)
    _losses(report)
    _how(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(report.text) + "\n")


def _introduction(report: Report) -> list[str]:
    every = [run for run in report.summaries.values() if run.records]
    commands = sorted({r.environment["command"] for run in every for r in run.records})
    return [
        "# MiCS and its peers on a cluster with slow links",
        f"Everything below was *{MARK}*: each node is a Linux network namespace with its own address on a bridge, its "
        "NIC shaped both ways; ranks of one node talk over the node's unshaped loopback. All nodes share this one "
        "machine's CPUs, so computing is slow and the same for all, and what differs is communication. The "
        "collectives are gloo's. Neither says what GPUs and NCCL do; bytes and counts carry over, seconds do not.",
        "Regenerate: `scripts/bench setup`, then the commands below, then `scripts/report`. A run whose record is in "
        "`results/` is repeated with `--again` alone. Models have 10.6 M "
        "(GPT-2-like) and 10.8 M (BERT-like) parameters in fp32, AdamW, one sequence of 32 tokens per rank and "
        "micro-step: little computing for many parameters, as in large models on few tokens per GPU.",
        "```\n" + "\n".join(commands) + "\n```",
        "Columns: *sent per NIC* is what the kernel counted leaving a node's NIC in one optimizer step, mean over "
        "nodes; *waiting* is the time in which a rank sends or waits for communication, mean over ranks; *gradients "
        "held* is what a rank keeps between micro-steps; *training adds* is the growth of resident memory at its peak.",
    ]


def _throughput(report: Report, name: str) -> None:
    runs = report.section(name)
    if not runs:
        return
    note = note_of(runs)
    ours = claims.best_mics(runs)
    report.add("\n".join(claims.throughput(runs)), tables.throughput(runs, ours))
    plots.throughput(runs, report.image(f"{name}_throughput", "tokens per second of every system"), note)
    plots.phases(runs, report.image(f"{name}_phases", "seconds per micro-step by phase"), note)
    compute = next((run for run in runs if run.configuration.system == "no-communication"), None)
    if compute is not None:
        rest = [run for run in runs if run is not compute]
        report.add(
            "Where the time goes: the bytes that left the NIC over its rate, plus what a step takes without any "
            "communication on the same CPUs. Above 1 the NIC idles while ranks compute or wait for one another.",
            tables.bound(sorted(rest, key=lambda run: run.step_s), compute.step_s),
        )
    report.add("The other side:", "\n".join(claims.other_side(runs)))
    if name == "short":
        report.add(tables.losses(runs), tables.wire(runs))


def _ablation(report: Report) -> None:
    runs = report.section("ablation")
    if runs:
        report.add(
            "p = 2 is one node, p = 4 two nodes, p = 8 all ranks (no partition groups smaller than the cluster).",
            tables.throughput(runs, claims.best_mics(runs)),
        )


def _sweep(report: Report, name: str, title: str, of: str) -> None:
    runs = report.section(name)
    if runs:
        report.add("\n".join(claims.sweep(runs, of, title)), tables.sweep(runs, title, of))
        plots.lines(runs, of, title, report.image(name, f"seconds per step against {title}"), note_of(runs))


def _weak_scaling(report: Report) -> None:
    runs = report.section("weak-scaling")
    if runs:
        report.add(
            "Every rank has a tenth of a CPU at every size, as a quota of its node, so that what grows is "
            "communication and not the load of the CPUs. On nodes of 1 rank the last all-reduces share the NICs with "
            "hop 1: a rank that waits for hop 1 waits for bytes of hop 2 as well.",
            "\n".join(claims.weak_scaling(runs)),
            tables.weak_scaling(runs),
        )
        plots.weak_scaling(runs, report.image("weak_scaling", "communication time against nodes"), note_of(runs))


def _spanning(report: Report) -> None:
    runs = report.section("hierarchical")
    if runs:
        report.add(
            "The share is of everything that hop 1 gathers and scatters. Flat over gloo it exceeds (p-1)/p, because "
            "the reduce-scatter sends every slice straight to its owner, k (p-k)/p of the gradients per node; gathers "
            "alone are a ring.",
            tables.spanning(runs),
        )


def _wire(report: Report) -> None:
    runs = report.section("wire")
    if runs:
        report.add(
            "Predicted is payload, from the engine's counts and the groups; counted includes one header of 66 bytes "
            "per segmentation unit of up to 64 KiB (0.1 %), acknowledgements of the other direction, and the "
            "barriers around a step. Hops are told apart in the first step, which has a barrier after each micro-step.",
            "\n".join(claims.wire(runs)),
            tables.wire(runs),
        )
        plots.traffic(runs, report.image("wire", "bytes per NIC beside the prediction"), note_of(runs))


def _losses(report: Report) -> None:
    runs = report.section("equality")
    shown = {(run.configuration.model, run.configuration.label) for run in runs}
    for run in report.summaries.values():
        key = (run.configuration.model, run.configuration.label)
        if run.records and len(run.records[0].losses) >= _COMPARED_STEPS and key not in shown:
            shown.add(key)
            runs.append(run)
    if runs:
        report.add(
            "Every loss is compared with the same batches in one process in float64. The tolerance is 8 times what "
            "float32 rounding alone does in one process (with gradients rounded to bfloat16 where they travel so).",
            "\n".join(claims.losses(runs)),
            tables.losses(runs),
        )
    unequal = [run for run in report.summaries.values() if run.records and run.losses_are_equal is False]
    for run in unequal:
        distance, allowed = f"{run.loss_error:.1e}", f"{run.loss_tolerance:.1e}"
        report.add(f"Losses differ: {run.configuration.identity}, by {distance} where {allowed} is allowed.")


def _how(report: Report) -> None:
    every = [run.configuration for run in report.summaries.values()]
    report.add("## How each system was configured", tables.settings(sorted(every, key=lambda c: c.system)))
