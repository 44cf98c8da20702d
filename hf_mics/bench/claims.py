"""What was to be shown, what was measured, and is it enough? One line per claim, misses included."""

from __future__ import annotations

from collections.abc import Sequence

from hf_mics.bench.summaries import Summary

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
    """Growth of communication from the smaller to the larger cluster, MiCS's beside that of full sharding.

    What (r-1)/r makes hop 2 send more, at the NICs' rate, is taken out: no all-reduce could do without it.
    """
    return [line for node_size in (2, 1) for line in _weak_scaling_on_nodes_of(node_size, runs)]


def _weak_scaling_on_nodes_of(node_size: int, runs: Sequence[Summary]) -> list[str]:
    pair = _smaller_and_larger(runs, "mics", node_size)
    if pair is None:
        return []
    small, large = pair
    unavoidable_s = large.hop2_on_the_wire_s - small.hop2_on_the_wire_s
    growth = (large.communication_s - unavoidable_s) / small.communication_s
    where = "hop 1 never leaves a node" if node_size > 1 else "both hops go over the NICs"
    claim = (
        f"on nodes of {node_size}, where {where}: communication time of MiCS at {_MANY_NODES} nodes over {_FEW_NODES}, "
        "without the growth of (r-1)/r"
    )
    sent = large.sent_bytes / small.sent_bytes
    expected = (large.expected_sent_bytes or 0.0) / (small.expected_sent_bytes or 1.0)
    return [
        _line(claim, f"{growth:.3f}x", f"at most {_SCALING_FACTOR}x", growth <= _SCALING_FACTOR),
        f"- from {small.communication_s:.2f} to {large.communication_s:.2f} s in all, of which a rank waits for hop 1 "
        f"{small.hop1_s:.2f} and {large.hop1_s:.2f} s; the bytes of hop 2 take {small.hop2_on_the_wire_s:.2f} "
        f"and {large.hop2_on_the_wire_s:.2f} s at the NICs' rate",
        f"- bytes per NIC of MiCS at {_MANY_NODES} nodes over {_FEW_NODES}: {sent:.2f}x (predicted: {expected:.2f}x)",
        *_full_sharding_growth(runs, node_size),
    ]


def _full_sharding_growth(runs: Sequence[Summary], node_size: int) -> list[str]:
    pair = _smaller_and_larger(runs, "fsdp2", node_size)
    if pair is None:
        return []
    small, large = pair
    return [
        f"- {large.configuration.label} (ZeRO-3) at {_MANY_NODES} nodes over {_FEW_NODES}: communication time "
        f"{large.communication_s / small.communication_s:.2f}x, bytes per NIC "
        f"{large.sent_bytes / small.sent_bytes:.2f}x"
    ]


def _smaller_and_larger(runs: Sequence[Summary], system: str, node_size: int) -> tuple[Summary, Summary] | None:
    mine = [run for run in runs if run.configuration.system == system and run.configuration.node_size == node_size]
    by_nodes = {run.configuration.nodes: run for run in mine}
    return (by_nodes[_FEW_NODES], by_nodes[_MANY_NODES]) if {_FEW_NODES, _MANY_NODES} <= by_nodes.keys() else None


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
