"""How long does one micro-step take, when computing and two links each do one thing at a time?

A tiny event simulation of FSDP2's schedule over three lanes (compute, intra-node, inter-node). Every operation's order
on its lane is that in which FSDP2 issues it, whatever the durations are: so times are sums and maxima of durations, and
never fall when a duration grows. The fast and the slow end of every constant therefore bound the predicted time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hf_mics.planning.cluster import Lane


class Stage(NamedTuple):
    """`seconds` during which a collective holds `lane`."""

    lane: Lane
    seconds: float


Stages = tuple[Stage, ...]
"""A collective: its stages, one after the other. Empty when nothing has to be sent."""


class Segment(NamedTuple):
    """A stretch of computing, and the collectives that it waits for or starts.

    Args:
        forward_s, backward_s: computing, recomputation in `backward_s`.
        gather_before_forward, gather_before_backward: hop 1's all-gathers.
        reduce: hop 1's reduce-scatter, after backward.
        hop2: the all-reduce over the replication group, after `reduce`.
    """

    forward_s: float
    backward_s: float
    gather_before_forward: Stages = ()
    gather_before_backward: Stages = ()
    reduce: Stages = ()
    hop2: Stages = ()


def micro_step_s(segments: Sequence[Segment], *, hop2: bool, overlap: bool, hop2_beside: bool = False) -> float:
    """Seconds of one forward and backward through `segments`, until the compute lane may go on.

    Modelled, as torch 2.11 to 2.13 do it: one gather is prefetched (it starts when the computing before it starts), a
    reduce-scatter starts when backward of its unit ends, and the next-but-one backward waits for it (one input buffer);
    hop 2 runs beside the rest of backward; everything is waited for at the end of backward.

    Args:
        hop2: whether this micro-step ends in hop 2.
        overlap: False makes every collective wait for computing and computing for it, as over gloo.
        hop2_beside: without overlap, still runs hop 2 beside what follows it in backward, as the engine does over gloo.
    """
    if not overlap:
        return _one_by_one(segments, hop2=hop2, beside=hop2_beside)
    lanes = _Lanes()
    clock = _forward(segments, lanes)
    return _backward(segments, lanes, clock, hop2)


def lane_seconds(segments: Sequence[Segment], *, hop2: bool) -> dict[Lane, float]:
    """Seconds that each link is held during one micro-step."""
    held: dict[Lane, float] = {"intra_node": 0.0, "inter_node": 0.0}
    for segment in segments:
        for stage in _collectives(segment, hop2):
            held[stage.lane] += stage.seconds
    return held


class _Lanes:
    """When each link is free again."""

    def __init__(self) -> None:
        self._free: dict[Lane, float] = {"intra_node": 0.0, "inter_node": 0.0}

    def run(self, stages: Stages, ready: float) -> float:
        """When a collective ends that may start at `ready`."""
        for lane, seconds in stages:
            ready = self._free[lane] = max(ready, self._free[lane]) + seconds
        return ready


def _forward(segments: Sequence[Segment], lanes: _Lanes) -> float:
    clock = last_start = 0.0
    for segment in segments:
        gathered = lanes.run(segment.gather_before_forward, last_start)
        last_start = max(clock, gathered)
        clock = last_start + segment.forward_s
    return clock


def _backward(segments: Sequence[Segment], lanes: _Lanes, clock: float, hop2: bool) -> float:
    order = segments[::-1]
    gathered = lanes.run(order[0].gather_before_backward, clock)
    reduced = synchronized = 0.0
    waiting: Stages = ()
    for segment, following in zip(order, (*order[1:], None), strict=True):
        start = max(clock, gathered)
        if following is not None:
            gathered = lanes.run(following.gather_before_backward, start)
        # Behind that gather, which was issued before it and which backward is about to wait for.
        synchronized = max(synchronized, lanes.run(waiting, reduced))
        clock = max(start + segment.backward_s, reduced)
        reduced = max(reduced, lanes.run(segment.reduce, clock))
        waiting = segment.hop2 if hop2 else ()
    synchronized = max(synchronized, lanes.run(waiting, reduced))
    return max(clock, reduced, synchronized)


def _one_by_one(segments: Sequence[Segment], *, hop2: bool, beside: bool) -> float:
    """Nothing overlaps but hop 2, if it runs `beside`; then a link carries what was asked for first."""
    lanes = _Lanes()
    clock = synchronized = 0.0
    for segment in segments:
        clock = lanes.run(segment.gather_before_forward, clock) + segment.forward_s
    for segment in reversed(segments):
        clock = lanes.run(segment.gather_before_backward, clock) + segment.backward_s
        clock = lanes.run(segment.reduce, clock)
        if hop2:
            synchronized = lanes.run(segment.hop2, clock)
            clock = clock if beside else synchronized
    return max(clock, synchronized)


def _collectives(segment: Segment, hop2: bool) -> Stages:
    once = segment.gather_before_forward + segment.gather_before_backward + segment.reduce
    return once + segment.hop2 if hop2 else once
