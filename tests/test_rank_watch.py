"""Is a rank that hangs named by the rank before it, and does nobody wait for one that is known to be dead?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from hf_mics import rank_watch
from hf_mics.rank_watch import RankWatch

HOSTS = ("alpha", "alpha", "beta")


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_rank_before_a_silent_one_says_so_after_30_s_and_of_one_that_raised_after_5(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three ranks in one process whose beats are fast and whose clock is the test's: no real silence counts."""
    now_s, said = 0.0, ""
    monkeypatch.setattr(rank_watch, "_BEAT_S", 0.005)
    monkeypatch.setattr(rank_watch, "time", SimpleNamespace(monotonic=lambda: now_s, sleep=time.sleep))
    store = dist.HashStore()
    watches = [RankWatch(rank, HOSTS, store) for rank in range(3)]
    beating = [0, 1, 2]

    def pass_s(seconds: float) -> str:
        """Moves the clock; returns all that was said once every rank that beats has looked and been looked at.

        In steps of less than 30 s: a rank that looks twice between two beats of its neighbour must not miss one.
        """
        nonlocal now_s, said
        for step_s in (*[20.0] * int(seconds // 20), seconds % 20):
            now_s += step_s
            for _ in range(2):
                before = {rank: int(store.get(f"beat/{rank}")) for rank in beating}
                wait_until(lambda b=before: all(int(store.get(f"beat/{rank}")) >= b[rank] + 3 for rank in beating))
        said += capsys.readouterr().err
        return said

    for _ in range(4):
        assert pass_s(20) == ""

    def hang(rank: int) -> None:
        """Stops this rank without a last word, as a SIGSTOP would."""
        beating.remove(rank)
        watches[rank]._stop.set()
        watches[rank]._thread.join()
        pass_s(0)

    hang(2)
    assert pass_s(29) == ""
    told = "MiCS: rank 2 on node beta has given no sign of life for 30 s, rank 1 reports."
    assert told in pass_s(2)
    assert pass_s(100).count("MiCS") == 1

    store.set("beat/2", "back")
    assert pass_s(0).count("MiCS") == 1
    assert pass_s(31).count(told) == 2

    beating.remove(1)
    watches[1].leave(b"raised")
    pass_s(0)
    assert pass_s(4).count("MiCS") == 2
    assert "MiCS: rank 1 on node alpha has ended with an error; see its output, rank 0 reports." in pass_s(2)
    assert pass_s(100).count("MiCS") == 3

    store.set("beat/1", "back")
    pass_s(0)
    store.set("beat/1", "left")
    assert pass_s(100).count("MiCS") == 3
    watches[0].leave()


def test_a_rank_that_would_wait_on_ends_once_another_has_failed_for_want_of_a_dead_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_watch, "_BEAT_S", 0.1)
    monkeypatch.setattr(rank_watch, "_GRACE_S", 2.0)
    ended = mock.Mock()
    monkeypatch.setattr(rank_watch, "os", SimpleNamespace(_exit=ended))
    store = dist.HashStore()
    first, waiting, dead, second = (RankWatch(rank, (*HOSTS, "beta"), store) for rank in range(4))
    dead._stop.set()
    dead._thread.join()
    error = RuntimeError("Timed out waiting 30000ms for recv operation to complete")
    assert "rank 2 on node beta died" in (first.explain(error) or "")
    # One that fails by itself meanwhile says so with its traceback.
    assert "rank 2 on node beta died" in (second.explain(error) or "")
    ended.assert_not_called()
    assert "died" not in capsys.readouterr().err
    wait_until(lambda: not waiting._thread.is_alive())
    ended.assert_called_once_with(1)
    assert capsys.readouterr().err.startswith("MiCS: rank 2 on node beta died, which has ended another rank. Rank 1 ")


def test_no_rank_ends_for_one_that_has_left_or_for_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "_BEAT_S", 0.005)
    monkeypatch.setattr(rank_watch, "_GRACE_S", 0.0)
    ended = mock.Mock()
    monkeypatch.setattr(rank_watch, "os", SimpleNamespace(_exit=ended))
    store = dist.HashStore()
    left, raised, last = (RankWatch(rank, HOSTS, store) for rank in range(3))
    left.leave()
    assert raised.explain(ValueError("no such column")) is None
    beats = int(store.get("beat/2"))
    wait_until(lambda: int(store.get("beat/2")) >= beats + 5)
    ended.assert_not_called()
    assert last.explain(RuntimeError("Connection closed by peer")) is None, "nobody died"


def test_what_another_rank_has_found_ends_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its store may be gone before the look ends."""
    store = dist.HashStore()
    watch = RankWatch(0, HOSTS, store)
    watch.leave()
    store.set("finding", "2")
    slept_s: list[float] = []
    monkeypatch.setattr(rank_watch, "time", SimpleNamespace(sleep=slept_s.append))
    assert watch.missing() == [2]
    assert slept_s == [rank_watch._BEAT_S, 2 * rank_watch._BEAT_S]


def test_a_dead_rank_is_found_beside_one_that_never_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "_BEAT_S", 0.05)
    store = dist.HashStore()
    first, dead = (RankWatch(rank, HOSTS, store) for rank in range(2))
    dead._stop.set()
    dead._thread.join()
    assert "rank 1 on node alpha died" in (first.explain(RuntimeError("Connection reset by peer")) or "")


def test_a_beat_on_its_way_does_not_replace_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a rank that has left would be taken for a silent one."""
    monkeypatch.setattr(rank_watch, "_BEAT_S", 0.005)
    on_its_way, leaving = threading.Event(), threading.Event()

    class SlowStore(SilentStore):
        def set(self, key: str, word: bytes) -> None:
            if word == b"3":
                on_its_way.set()
                leaving.wait(30)
                time.sleep(0.05)
            self._store.set(key, word)

    store = SlowStore(lambda *_: False)
    watch = RankWatch(0, HOSTS, store)
    watch._stop = leaving
    assert on_its_way.wait(30)
    watch.leave()
    watch._thread.join()
    assert store.get("beat/0") == b"left"


def test_a_rank_that_hosts_the_store_stays_until_the_others_have_read_who_died(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = RankWatch(0, HOSTS, dist.HashStore())
    watch.leave()
    watch._finding = [2]
    slept_s: list[float] = []
    monkeypatch.setattr(rank_watch, "time", SimpleNamespace(sleep=slept_s.append))
    assert watch.missing() == [2]
    assert sum(slept_s) >= 2 * rank_watch._BEAT_S


class SilentStore:
    """A store that keeps who asks waiting once `is_gone(method, key, value, ...)` was true, until `back`."""

    def __init__(self, is_gone: Callable[..., bool]) -> None:
        self.gone, self.back, self._store, self._is_gone = False, threading.Event(), dist.HashStore(), is_gone

    def __getattr__(self, name: str) -> Any:
        def ask(*args: Any) -> Any:
            if self.gone:
                self.back.wait()
            self.gone |= self._is_gone(name, *args)
            return getattr(self._store, name)(*args)

        return ask


@pytest.mark.parametrize("when", ["before the last word", "after it"])
def test_a_store_that_lost_its_power_does_not_keep_a_failed_rank_from_ending(
    monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    for name in ("_BEAT_S", "_LOOK_S", "_ANSWER_S"):
        monkeypatch.setattr(rank_watch, name, 0.05)
    word = b"raised" if when == "after it" else b"3"
    store = SilentStore(lambda name, *args: name == "set" and args == ("beat/1", word))
    watch = RankWatch(1, HOSTS, store)
    if when != "after it":
        wait_until(lambda: store.gone)
    # So that a rank that does wait fails this test instead of hanging it.
    rescue = threading.Timer(30, store.back.set)
    rescue.start()
    said = watch.explain(RuntimeError("Timed out waiting 30000ms for recv operation to complete"))
    watch.leave()
    assert not store.back.is_set()
    rescue.cancel()
    store.back.set()
    assert said == (
        "MiCS: the store of the job, on the node of rank 0 (alpha), does not answer rank 1: rank 0 or its launcher has "
        "died, or the network to it."
    )


def test_a_death_that_was_found_is_told_although_the_store_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_BEAT_S", "_LOOK_S"):
        monkeypatch.setattr(rank_watch, name, 0.05)
    store = SilentStore(lambda name, *args: name == "set" and args == ("beat/1", b"3"))
    watch = RankWatch(1, HOSTS, store)
    wait_until(lambda: store.gone)
    watch._finding = [2]
    said = watch.explain(RuntimeError("Timed out waiting 30000ms for recv operation to complete"))
    store.back.set()
    assert "rank 2 on node beta died" in (said or "")
