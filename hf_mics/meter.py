"""What did this rank send, by phase and by group?

Counts calls and bytes where the collectives are issued, so that a prediction (`traffic.py`) can be checked against
what ran rather than against itself.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Phase = Literal["all_gather", "reduce_scatter", "all_reduce"]
Scope = Literal["partition", "inter_node", "intra_node", "replication"]
Key = tuple[Phase, Scope]
Hop = Literal["hop1", "hop2"]


class Clock(Protocol):
    """What times collectives; `hf_mics.clock.CollectiveClock` does."""

    def span(self, hop: Hop, device: Any) -> AbstractContextManager[None]:
        """Times what runs inside on `device`, a torch.device."""


@dataclass
class Tally:
    """`calls` collectives in which this rank sent `bytes_sent` bytes.

    `bytes_sent` is the volume that the collective must move per rank, whatever the algorithm: (n-1)/n of the gathered
    or scattered buffer, twice that for an all-reduce. Headers and protocol overhead are left out.
    """

    calls: int = 0
    bytes_sent: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.calls + other.calls, self.bytes_sent + other.bytes_sent)


class TrafficMeter:
    """Running tallies of one rank, keyed by (phase, scope).

    Attributes:
        clock: what times the collectives as well, None by default.
    """

    def __init__(self) -> None:
        self.clock: Clock | None = None
        self._tallies: defaultdict[Key, Tally] = defaultdict(Tally)

    def add(self, phase: Phase, scope: Scope, *, calls: int = 1, bytes_sent: int) -> None:
        """Adds `calls` collectives that together send `bytes_sent` bytes from this rank."""
        tally = self._tallies[phase, scope]
        tally.calls += calls
        tally.bytes_sent += bytes_sent

    def timed(self, hop: Hop, device: Any) -> AbstractContextManager[None]:
        """Inside runs a collective of `hop` on `device`, timed if there is a clock."""
        return nullcontext() if self.clock is None else self.clock.span(hop, device)

    def read(self) -> dict[Key, Tally]:
        """A copy of the tallies; keys that never ran are absent."""
        return {key: Tally(tally.calls, tally.bytes_sent) for key, tally in self._tallies.items()}

    def reset(self) -> None:
        """Starts again from zero."""
        self._tallies.clear()
