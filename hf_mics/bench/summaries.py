"""What do the repeats of one run say together, and what follows from them?"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_mics.bench.configuration import Configuration
from hf_mics.bench.records import Record
from hf_mics.bench.wire import HOP1, HOP2


@dataclass(frozen=True)
class Summary:
    """All records of one configuration; those that failed count only in `failure`."""

    configuration: Configuration
    records: tuple[Record, ...]
    failure: str | None

    @property
    def times_s(self) -> list[float]:
        """Seconds of every timed step of every repeat."""
        return [seconds for record in self.records for seconds in record.timed_s]

    @property
    def step_s(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.times_s)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all ranks per second, at the median step."""
        return self.configuration.tokens_per_step / self.step_s

    @property
    def sent_bytes(self) -> float:
        """Bytes that left a node's NIC per timed step: the mean over nodes, the median over steps."""
        warm_up = self.configuration.warm_up_steps
        return statistics.median(sent for record in self.records for sent in record.nic_sent_bytes[warm_up:])

    @property
    def expected_sent_bytes(self) -> float | None:
        """The same as the engine predicts it; None for systems that do not."""
        expected = self.records[0].expected_nic_bytes
        return None if expected is None else sum(expected.values())

    @property
    def waits_s(self) -> dict[str, float]:
        """Seconds per step that a rank waits, by collective: the mean over ranks, steps and repeats."""
        keys = sorted({key for record in self.records for key in record.timed_waits_s})
        rows = [record.timed_waits_s for record in self.records]
        return {key: statistics.fmean(row.get(key, 0.0) for row in rows) for key in keys}

    @property
    def communication_s(self) -> float:
        """Seconds per step that a rank waits for any collective."""
        return sum(self.waits_s.values())

    @property
    def hop1_s(self) -> float:
        """Seconds per step that a rank waits in hop 1."""
        return sum(self.waits_s.get(phase, 0.0) for phase in ("all_gather", "reduce_scatter", "exchange"))

    @property
    def hop2_on_the_wire_s(self) -> float:
        """Seconds that hop 2's bytes need at the NIC's rate, whatever else happens; 0 for systems without."""
        expected, rate_mbit = self.records[0].expected_nic_bytes, self.configuration.rate_mbit
        return 0.0 if expected is None or rate_mbit is None else expected[HOP2] * 8e-6 / rate_mbit

    @property
    def gradient_bytes(self) -> int | None:
        """Gradients that a rank holds between micro-steps."""
        return self.records[0].gradient_bytes

    @property
    def training_rss_bytes(self) -> float:
        """What training adds to a rank's resident memory at its peak, of the rank that needs most."""
        return statistics.median(record.training_rss_bytes for record in self.records)

    @property
    def loss_error(self) -> float | None:
        """The largest distance of any loss from its expectation."""
        return max((e for record in self.records if (e := record.loss_error) is not None), default=None)

    @property
    def loss_tolerance(self) -> float | None:
        """The distance that rounding explains."""
        return self.records[0].loss_tolerance

    @property
    def losses_are_equal(self) -> bool | None:
        """Whether every repeat's losses are within the tolerance."""
        verdicts = [record.losses_are_equal for record in self.records]
        return None if None in verdicts else all(verdicts)

    def split_sent_bytes(self) -> dict[str, float] | None:
        """Bytes per NIC of hop 1 and hop 2 of one step, from the micro-steps of the first one; None with only one.

        Micro-steps before the last send hop 1 alone, so the last sends hop 2 in what it sends more. The first one also
        opens connections, and is left out where there are others.
        """
        sent = self.records[0].micro_nic_sent_bytes
        if len(sent) < 2 or not self.configuration.two_hop:
            return None
        hop1 = statistics.fmean(sent[1:-1] or sent[:-1])
        return {HOP1: hop1 * len(sent), HOP2: sent[-1] - hop1}


def summarize(records: Iterable[Record]) -> dict[str, Summary]:
    """Summaries by the configuration's identity."""
    groups: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.configuration.identity].append(record)
    return {identity: _summary(group) for identity, group in groups.items()}


def _summary(group: Sequence[Record]) -> Summary:
    good = tuple(record for record in group if record.failure is None)
    failure = None if good else group[0].failure
    # Runs with other numbers of steps share a name; the one with most steps speaks for the configuration.
    configuration = max((record.configuration for record in good or group), key=lambda c: c.steps)
    return Summary(configuration, good, failure)


def found(summaries: dict[str, Summary], runs: Iterable[Configuration]) -> list[Summary]:
    """The summaries of those `runs` that have measurements, in their order."""
    chosen = (summaries.get(run.identity) for run in runs)
    return [summary for summary in chosen if summary is not None and summary.records]


def failed(summaries: dict[str, Summary], runs: Iterable[Configuration]) -> list[Summary]:
    """The summaries of those `runs` that were tried and never succeeded."""
    chosen = (summaries.get(run.identity) for run in runs)
    return [summary for summary in chosen if summary is not None and not summary.records]
