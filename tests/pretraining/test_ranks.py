"""Does every rank end alike when one of them cannot go on?"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
from accelerate import PartialState

from hf_mics.errors import ConfigError
from hf_mics.pretraining.ranks import broadcast_from_main, main_process_first, make_output_dir, mistakes_told_once
from hf_mics.testing import run_ranks


def fail(error: Exception) -> str:
    def build() -> None:
        raise error

    PartialState(cpu=True)
    with pytest.raises(Exception, match="no such thing") as caught:
        broadcast_from_main(build)
    return f"{caught.type.__name__}: {caught.value}"


def fail_on_main_alone() -> str:
    def build() -> None:
        if PartialState().is_main_process:
            raise ConfigError("no such thing")

    with pytest.raises(ConfigError) as caught:
        main_process_first(build)
    return str(caught.value)


def check_errors() -> list[str]:
    return [fail(ConfigError("no such thing")), fail(OSError("no such thing")), fail_on_main_alone()]


def test_an_error_of_the_main_process_is_raised_on_every_rank() -> None:
    first, other = run_ranks(check_errors, 2)
    assert first == ["ConfigError: no such thing", "OSError: no such thing", "no such thing"]
    assert other == [first[0], "RuntimeError: the main process raised OSError: no such thing", first[2]]


def test_what_the_main_process_builds_first_it_builds_once() -> None:
    built: list[int] = []
    assert main_process_first(lambda: built.append(1) or len(built)) == 1


def test_a_full_disk_is_found_before_training(tmp_path: Path) -> None:
    """A limit on the size of files, which a write meets as it would a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ConfigError, match="--output_dir cannot be written: .* on a disk with space"):
            make_output_dir(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_output_folder_is_made_or_refused_before_training(tmp_path: Path) -> None:
    make_output_dir(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="--output_dir cannot be written: .* Expected a folder"):
            make_output_dir(path)


def test_a_mistake_is_one_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes/train.py"])
    monkeypatch.setattr(sys, "last_value", None, raising=False)
    with pytest.raises(SystemExit) as ended, mistakes_told_once():
        raise ConfigError("no such column.")
    assert (ended.value.code, capsys.readouterr().err) == (2, "train.py: error: no such column.\n")
    # The rank watch and the end of the job tell a mistake from a regular end by it.
    assert isinstance(sys.last_value, ConfigError)
