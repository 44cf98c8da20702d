"""Which rank died, and on which node?

A dead rank shows as a network error on its neighbours in some collective, or as a hang, and neither names it. So every
rank counts a beat in the job's store once a second, from a thread. A rank whose collective fails looks who has stopped
beating, says so below its traceback, and leaves the finding in the store. Ranks that fail later find it there, when the
store may soon be gone with its host; and one that waits for a rank that waits for the dead one, and would only fail at
another timeout, says it and ends after `_GRACE_S` seconds.

Where no error comes (a machine that lost its power, a stopped process, NCCL before its timeout), the rank before the
silent one in rank order says so after `_SILENCE_S` seconds, and of one that raised an error after `_GRACE_S`. A process
that still runs and only waits beats on. Over NCCL these lines are all: torch's watchdog ends a process whose collective
failed or timed out without a Python error.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from hf_mics._torch_compat import job_store

_BEAT_S = 1.0
_SILENCE_S = 30.0
# A rank that fails by itself says more: its traceback.
_GRACE_S = 5.0
# How long a rank waits for the beats of the others.
_LOOK_BEATS = 3
_LOOK_S = _LOOK_BEATS * _BEAT_S
_NETWORK_ERROR = re.compile(r"connection|broken pipe|timed out|timeout|gloo|nccl", re.IGNORECASE)
# How long a rank that ends waits for the store, which may have lost its power with rank 0's node.
_ANSWER_S = 15.0
_LEFT, _RAISED = b"left", b"raised"

T = TypeVar("T")


class RankWatch:
    """This rank's beat, and its eye on the others.

    Args:
        rank: this rank.
        hosts: node name of every rank.
        store: what the ranks share, used by nobody else under these keys.
    """

    def __init__(self, rank: int, hosts: Sequence[str], store: Any) -> None:
        self._rank = rank
        self._hosts = hosts
        self._store = store
        self._stop = threading.Event()
        self._finding: list[int] = []
        self._thread = threading.Thread(target=self._beat, name="hf_mics rank watch", daemon=True)
        self._say(b"0")
        self._thread.start()

    @property
    def has_left(self) -> bool:
        """Whether this rank has stopped beating, with a last word or on its way to one."""
        return self._stop.is_set()

    def leave(self, word: bytes = _LEFT) -> bool:
        """Stops beating, with a last word that says why; returns whether the store took it."""
        self._stop.set()
        self._thread.join(timeout=_LOOK_S)
        try:
            _in_time(lambda: self._say(word), _LOOK_S)
        except (RuntimeError, TimeoutError):
            return False
        return True

    def missing(self) -> list[int]:
        """Ranks that have stopped beating without a last word, as first found by any rank; takes some seconds.

        Raises:
            RuntimeError: the store does not answer, and nothing was found while it did.
        """
        if not self._finding:
            self._look()
        # This process may host the store: the others read the finding with their next beat.
        time.sleep(2 * _BEAT_S)
        return self._finding

    def _look(self) -> None:
        before = self._words()
        for _ in range(_LOOK_BEATS):
            time.sleep(_BEAT_S)
            # Of a rank that looked earlier, whose store may be gone before this look ends.
            self._read_finding()
            if self._finding:
                return
        after = self._words()
        self._finding = [r for r, word in after.items() if word == before.get(r) and word not in (_LEFT, _RAISED)]
        self._store.set("finding", ",".join(map(str, self._finding)))

    def describe(self, ranks: Sequence[int]) -> str:
        """The ranks with their nodes."""
        named = [f"rank {rank} on node {self._hosts[rank]}" for rank in ranks[:8]]
        return ", ".join(named) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")

    def explain(self, error: BaseException) -> str | None:
        """What to add to an error that ends this rank, None if no other rank has to do with it."""
        is_network_error = isinstance(error, RuntimeError) and _NETWORK_ERROR.search(str(error))
        answers = self.leave(_RAISED)
        if not is_network_error:
            return None
        no_answer = (
            f"MiCS: the store of the job, on the node of rank 0 ({self._hosts[0]}), does not answer rank {self._rank}: "
            "rank 0 or its launcher has died, or the network to it."
        )
        if not answers and not self._finding:
            return no_answer
        try:
            missing = _in_time(self.missing, _ANSWER_S)
        except (RuntimeError, TimeoutError):
            return no_answer
        if not missing:
            return None
        return (
            f"MiCS: {self.describe(missing)} died, without a sign of life for {_LOOK_S:.0f} s. That is why rank "
            f"{self._rank} failed above. See the dead rank's own output, and resume from the last checkpoint."
        )

    def _beat(self) -> None:
        beats = 0
        following = (self._rank + 1) % len(self._hosts)
        last, since = b"", time.monotonic()
        try:
            while not self._stop.wait(_BEAT_S):
                beats += 1
                self._say(str(beats).encode())
                self._read_finding()
                if self._finding:
                    break
                word = self._words([following]).get(following, b"")
                if word != last:
                    last, since = word, time.monotonic()
                elif word == _RAISED and time.monotonic() - since > _GRACE_S:
                    # Over gloo this rank would have failed as well by now; NCCL waits for its timeout, without a word.
                    self._report(following, "has ended with an error; see its output")
                    since = float("inf")
                elif word not in (_LEFT, _RAISED) and time.monotonic() - since > _SILENCE_S:
                    self._report(following, f"has given no sign of life for {_SILENCE_S:.0f} s")
                    since = float("inf")
        except RuntimeError:
            # The store went first: the job ends, or rank 0's node died, which `explain` says.
            pass
        if self._finding and not self._stop.wait(_GRACE_S):
            self._end()

    def _report(self, rank: int, what: str) -> None:
        print(
            f"MiCS: {self.describe([rank])} {what}, rank {self._rank} reports. Collectives with it fail at their "
            "timeout.",
            file=sys.stderr,
            flush=True,
        )

    def _end(self) -> None:
        """Ends this process, whose job is over: an uncaught error has ended another rank, for want of the dead ones."""
        print(
            f"MiCS: {self.describe(self._finding)} died, which has ended another rank. Rank {self._rank} would go on "
            "waiting and ends too. Resume from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        # The main thread waits in a collective and cannot be asked.
        os._exit(1)

    def _read_finding(self) -> None:
        if not self._finding and self._store.check(["finding"]):
            self._finding = [int(rank) for rank in self._store.get("finding").decode().split(",") if rank]

    def _say(self, word: bytes) -> None:
        self._store.set(f"beat/{self._rank}", word)

    def _words(self, ranks: Sequence[int] | None = None) -> dict[int, bytes]:
        everyone = [rank for rank in range(len(self._hosts)) if rank != self._rank] if ranks is None else ranks
        # get() on a key that is not there yet would block.
        known = everyone
        if not self._store.check([f"beat/{rank}" for rank in everyone]):
            known = [rank for rank in everyone if self._store.check([f"beat/{rank}"])]
        return dict(zip(known, self._store.multi_get([f"beat/{rank}" for rank in known]), strict=True)) if known else {}


def _in_time(ask: Callable[[], T], limit_s: float) -> T:
    """What `ask()` returns or raises; TimeoutError after `limit_s` seconds.

    A TCPStore whose host lost its power or network answers neither with a value nor with an error, for a quarter of an
    hour (net.ipv4.tcp_retries2), and holds up every other thread that asks. Not in a pool, whose threads Python waits
    for when it ends.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # raised again by result()
            answer.set_exception(error)

    threading.Thread(target=run, name="hf_mics asks the store", daemon=True).start()
    return answer.result(timeout=limit_s)


_WATCHES: list[RankWatch] = []


def watch_ranks(hosts: Sequence[str]) -> None:
    """Starts the watch of this process, once; jobs of one rank and those that met through a file have none.

    Args:
        hosts: node name of every rank.
    """
    store = job_store()
    if _WATCHES or len(hosts) < 2 or store is None:
        return
    watch = RankWatch(dist.get_rank(), hosts, store)
    _WATCHES.append(watch)
    former = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        former(kind, error, trace)
        if explanation := watch.explain(error):
            print(explanation, file=sys.stderr, flush=True)

    sys.excepthook = excepthook

    def at_exit() -> None:
        if not watch.has_left:
            watch.leave(_RAISED if getattr(sys, "last_value", None) else _LEFT)

    # Registered after the one that leaves the job, hence run before it.
    atexit.register(at_exit)
