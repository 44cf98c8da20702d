"""What was to be shown, what was measured, and is it enough? One line per claim, misses included."""

from __future__ import annotations

from collections.abc import Sequence

from hf_mics.bench.summaries import Summary
from hf_mics.bench.tables import hop1_s

_FULL_SHARDING_FACTOR, _HYBRID_FACTOR, _BOUND_FACTOR = 3.5, 2.0, 1.5
_WIRE_SHARE, _SCALING_FACTOR = 0.03, 1.05
_FEW_NODES, _MANY_NODES = 2, 8


def _line(claim: str, measured: str, target: str, met: bool) -> str:
    return f"- {claim}: **{measured}** (target {target}: {'met' if met else '**missed**'})"


def best_mics(runs: Sequence[Summary]) -> Summary | None:
    """The fastest MiCS that shards, sends fp32 as every peer here does, all three techniques on; None without one.

    p = 1 keeps the whole state on every rank, which full sharding is there to avoid: it is no rival of that.
    """
    ours = [r for r in runs if r.configuration.system == "mics" and r.configuration.wire == "float32"]
    ours = [r for r in ours if r.configuration.two_hop and r.configuration.hierarchical]
    ours = [r for r in ours if r.configuration.topology.partition_size > 1]
    return min(ours, key=lambda run: run.step_s, default=None)


def throughput(runs: Sequence[Summary]) -> list[str]:
    """MiCS against full sharding and both hybrids, and its distance from the bound."""
    best = best_mics(runs)
    if best is None:
        return []
    by_system = {run.configuration.system: run for run in runs}
    lines = []
    for system, factor in (
        ("deepspeed-zero3", _FULL_SHARDING_FACTOR),
        ("deepspeed-zero3-reuse", None),
        ("fsdp2", _FULL_SHARDING_FACTOR),
        ("accelerate-fsdp2", _FULL_SHARDING_FACTOR),
        ("accelerate-hybrid", _HYBRID_FACTOR),
    ):
        if (other := by_system.get(system)) is None:
            continue
        ratio = other.step_s / best.step_s
        claim = f"throughput of {best.configuration.label} over {other.configuration.label}"
        if factor is None:
            lines.append(f"- {claim}: {ratio:.2f}x")
        else:
            lines.append(_line(claim, f"{ratio:.2f}x", f"at least {factor}x", ratio >= factor))
    if (no_sync := by_system.get("accelerate-hybrid-no-sync")) is not None:
        same = next(
            (r for r in runs if r.configuration.variant == f"mics-p{no_sync.configuration.partition_size}"), best
        )
        held = (no_sync.gradient_bytes or 0) / (same.gradient_bytes or 1)
        lines.append(
            f"- {same.configuration.label} against {no_sync.configuration.label}: "
            f"{no_sync.step_s / same.step_s:.2f}x its throughput, with 1/{held:.2f} of the gradients held between "
            "micro-steps"
        )
    whole = next((r for r in runs if r.configuration.variant == "mics-p1"), None)
    if whole is not None and (ddp := by_system.get("ddp")) is not None:
        lines.append(
            f"- where the whole state fits on every rank: {whole.configuration.label} takes {whole.step_s:.2f} s per "
            f"step, {ddp.configuration.label} {ddp.step_s:.2f} s"
        )
    if (compute := by_system.get("no-communication")) is not None and best.configuration.rate_mbit:
        least_s = best.sent_bytes * 8 / (best.configuration.rate_mbit * 1e6) + compute.step_s
        ratio = best.step_s / least_s
        claim = f"step of {best.configuration.label} over its bound (bytes / rate + computing)"
        lines.append(_line(claim, f"{ratio:.2f}x", f"at most {_BOUND_FACTOR}x", ratio <= _BOUND_FACTOR))
    return lines


def wire(runs: Sequence[Summary]) -> list[str]:
    """The largest difference between predicted and counted bytes."""
    pairs = [(run, predicted) for run in runs if (predicted := run.expected_sent_bytes)]
    if not pairs:
        return []
    run, difference = max(((r, r.sent_bytes / p - 1) for r, p in pairs), key=lambda pair: abs(pair[1]))
    claim = (
        f"bytes on the NIC against the prediction, largest of {len(pairs)} configurations ({run.configuration.label})"
    )
    return [_line(claim, f"{difference:+.2%}", f"within {_WIRE_SHARE:.0%}", abs(difference) <= _WIRE_SHARE)]


def losses(runs: Sequence[Summary]) -> list[str]:
    """How many systems see the losses of one process."""
    compared = [run for run in runs if run.losses_are_equal is not None]
    if not compared:
        return []
    equal = sum(bool(run.losses_are_equal) for run in compared)
    claim = "runs whose every loss is within the tolerance"
    return [_line(claim, f"{equal} of {len(compared)}", "all", equal == len(compared))]


def weak_scaling(runs: Sequence[Summary]) -> list[str]:
    """Growth of MiCS's communication from the smaller to the larger cluster of 2-rank nodes, hop 2 without (r-1)/r."""
    of_shape = {
        r.configuration.nodes: r for r in runs if r.configuration.system == "mics" and r.configuration.node_size == 2
    }
    if not {_FEW_NODES, _MANY_NODES} <= of_shape.keys():
        return []

    def hop2_s(run: Summary) -> float:
        r = run.configuration.topology.replication_size
        return run.waits_s.get("all_reduce", 0.0) * r / (r - 1)

    small, large = of_shape[_FEW_NODES], of_shape[_MANY_NODES]
    growth = (hop1_s(large) + hop2_s(large)) / (hop1_s(small) + hop2_s(small))
    claim = f"communication time of MiCS at {_MANY_NODES} nodes over {_FEW_NODES}, hop 2 times r/(r-1)"
    lines = [_line(claim, f"{growth:.2f}x", f"at most {_SCALING_FACTOR}x", growth <= _SCALING_FACTOR)]
    lines.append(
        f"- of which hop 2 times r/(r-1), over the NICs: {hop2_s(large) / hop2_s(small):.2f}x, "
        f"from {hop2_s(small):.2f} to {hop2_s(large):.2f} s; hop 1, which never leaves a node here: "
        f"from {hop1_s(small):.2f} to {hop1_s(large):.2f} s"
    )
    sent = large.sent_bytes / small.sent_bytes
    expected = (large.expected_sent_bytes or 0.0) / (small.expected_sent_bytes or 1.0)
    lines.append(
        f"- bytes per NIC of MiCS at {_MANY_NODES} nodes over {_FEW_NODES}: {sent:.2f}x "
        f"((r-1)/r alone: {expected:.2f}x)"
    )
    zero3 = {r.configuration.nodes: r for r in runs if r.configuration.variant == "fsdp2"}
    if {_FEW_NODES, _MANY_NODES} <= zero3.keys():
        small, large = zero3[_FEW_NODES], zero3[_MANY_NODES]
        lines.append(
            f"- {large.configuration.label} (ZeRO-3) at {_MANY_NODES} nodes over {_FEW_NODES}: communication time "
            f"{large.communication_s / small.communication_s:.2f}x, bytes per NIC "
            f"{large.sent_bytes / small.sent_bytes:.2f}x"
        )
    return lines


def sweep(runs: Sequence[Summary], of: str, title: str) -> list[str]:
    """MiCS beside its fastest peer at every value of the configuration's field `of`."""
    lines = []
    for value in sorted({getattr(run.configuration, of) for run in runs}):
        here = [run for run in runs if getattr(run.configuration, of) == value]
        ours = best_mics(here)
        peers = [run for run in here if run.configuration.system != "mics"]
        if ours is not None and peers:
            best = min(peers, key=lambda run: run.step_s)
            lines.append(
                f"- {title} {value:g}: {ours.configuration.label} has {best.step_s / ours.step_s:.2f}x the throughput "
                f"of its fastest peer, {best.configuration.label}"
            )
    return lines


def other_side(runs: Sequence[Summary]) -> list[str]:
    """Peers that beat the best fp32 MiCS of the same cluster, and what MiCS's replicas cost in memory."""
    best = best_mics(runs)
    if best is None:
        return []
    lines = [
        f"- {run.configuration.label} is faster than {best.configuration.label}: {run.step_s:.2f} s against "
        f"{best.step_s:.2f} s per step"
        for run in sorted(runs, key=lambda run: run.step_s)
        if run.configuration.system != "mics" and run.configuration.spec.equal_losses and run.step_s < best.step_s
    ]
    smallest = min((r for r in runs if r.configuration.spec.equal_losses), key=lambda r: r.training_rss_bytes)
    ours, least = best.training_rss_bytes / 1e6, smallest.training_rss_bytes / 1e6
    other = "the least of all" if least == ours else f"{least:.0f} MB under {smallest.configuration.label}, the least"
    lines.append(f"- memory: training adds {ours:.0f} MB to a rank under {best.configuration.label}, {other}")
    return lines
