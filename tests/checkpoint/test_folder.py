"""Is a checkpoint folder complete or not there, whenever the job dies, and is the right one found and kept?"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest

from hf_mics.checkpoint import folder as folders
from hf_mics.checkpoint.folder import commit, find_checkpoints, rotate, staging_folder, start_saving
from hf_mics.checkpoint.mark import FORMAT_VERSION, MARK_NAME, Mark, missing_files, read_mark
from hf_mics.errors import CheckpointError


def make_mark(files: dict[str, int], saved_at_s: float = 0.0) -> Mark:
    return Mark(
        format_version=FORMAT_VERSION, state_format="sharded", world_size=4, node_size=4, partition_size=2, models=[],
        optimizers=[], batch_sizes=[], files=files, versions={}, saved_at_s=saved_at_s,
    )  # fmt: skip


def save(target: Path, text: str, saved_at_s: float = 0.0) -> None:
    start_saving(target)
    (staging_folder(target) / "part").mkdir()
    (staging_folder(target) / "part" / "shard").write_text(text)
    commit(target, lambda files: make_mark(files, saved_at_s))


def state(target: Path) -> str | None:
    """What a resume would find: the text of a complete checkpoint, None where there is none."""
    complete = find_checkpoints(target.parent, target.name.rstrip("0123456789")).complete
    return (complete[-1] / "part" / "shard").read_text() if complete else None


class Killed(BaseException):
    """What a SIGKILL between two steps would leave behind."""


@pytest.mark.parametrize("there", ["nothing", "checkpoint", "other files"])
def test_killed_at_any_step_of_saving_the_former_or_the_new_checkpoint_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    """Every change of a name, and every deletion, is a place to die at; each is tried."""
    target = tmp_path / "step_7"
    outcomes = []
    for deadly in range(1, 50):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if there == "checkpoint":
            save(target, "former")
        elif there == "other files":
            target.mkdir()
        if there != "nothing":
            (target / "mine.txt").write_text("mine")
        calls = 0

        def dying(original):
            def step(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == deadly:
                    raise Killed
                return original(*args, **kwargs)

            return step

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", dying(Path.rename))
            patch.setattr(folders.shutil, "rmtree", dying(shutil.rmtree))
            with contextlib.suppress(Killed):
                save(target, "new")
        outcomes.append(state(target))
        if there == "checkpoint":
            assert outcomes[-1] in ("former", "new")
        assert not target.exists() or there == "other files" or read_mark(target) is not None
        if there == "other files":
            assert (target / "mine.txt").read_text() == "mine"
            mark = read_mark(target)
            assert mark is None or not missing_files(target, mark), "marked before all was there"
        save(target, "after")
        assert state(target) == "after"
        assert [path.name for path in tmp_path.iterdir()] == [target.name]
        assert there == "nothing" or (target / "mine.txt").read_text() == "mine"
        if calls < deadly:
            break
    assert outcomes[0] == ("former" if there == "checkpoint" else None)
    assert outcomes[-1] == "new"
    assert 4 < len(outcomes) < 20


def test_replacing_a_checkpoint_keeps_files_that_are_not_its_own(tmp_path: Path) -> None:
    save(tmp_path / "last", "one")
    (tmp_path / "last" / "epoch.txt").write_text("3")
    save(tmp_path / "last", "two")
    assert (tmp_path / "last" / "epoch.txt").read_text() == "3"
    assert (tmp_path / "last" / "part" / "shard").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_what_a_killed_job_was_about_to_replace_is_replaced_by_the_next(tmp_path: Path) -> None:
    save(tmp_path / "last", "one")
    (tmp_path / "last" / "epoch.txt").write_text("3")
    (tmp_path / "last").rename(tmp_path / ".last.former")
    save(tmp_path / "last", "two")
    assert (tmp_path / "last" / "epoch.txt").read_text() == "3"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_newest_is_the_one_saved_last_and_what_is_not_complete_is_named(tmp_path: Path) -> None:
    save(tmp_path / "step_20", "of an earlier run", saved_at_s=1.0)
    save(tmp_path / "step_9", "newest", saved_at_s=2.0)
    for step, damage in ((30, "mark"), (31, "shard"), (32, "length"), (34, "half a mark"), (35, "growth")):
        save(tmp_path / f"step_{step}", "damaged", saved_at_s=3.0)
        part = tmp_path / f"step_{step}" / "part" / "shard"
        if damage == "mark":
            (part.parents[1] / MARK_NAME).unlink()
        elif damage == "half a mark":
            (part.parents[1] / MARK_NAME).write_text('{"format_version": ')
        elif damage == "shard":
            part.unlink()
        else:
            part.write_text("short" if damage == "length" else "damaged by another program")
    start_saving(tmp_path / "step_33")
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_40").write_text("a file of that name")
    # What is left of a replaced checkpoint while it is deleted is none to bring back.
    (tmp_path / ".step_41.former" / "part").mkdir(parents=True)
    found = find_checkpoints(tmp_path, "step_")
    assert [path.name for path in found.complete] == ["step_20", "step_9"]
    reasons = {path.name: reason for path, reason in found.skipped.items()}
    assert "step_34/mics_checkpoint.json is damaged" in reasons.pop("step_34")
    assert reasons == {
        "step_30": "it has no completion mark",
        "step_31": "part/shard is missing",
        "step_32": "part/shard has 5 of 7 bytes",
        "step_35": "part/shard has 26 of 7 bytes",
        ".step_33.saving": "saving it was interrupted",
        ".step_41.former": "saving it was interrupted",
    }


def test_rotation_keeps_the_newest_complete_and_the_best_whatever_else_lies_there(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path / f"step_{step}", str(step), saved_at_s=float(step))
    save(tmp_path / "step_9", "damaged", saved_at_s=9.0)
    (tmp_path / "step_9" / MARK_NAME).unlink()
    rotate(tmp_path, "step_", 2, protected=str(tmp_path / "step_1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_5", "step_9"]
    rotate(tmp_path, "step_", 1, protected=str(tmp_path / "step_1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_5", "step_9"]
    rotate(tmp_path, "step_", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_5", "step_9"]
    rotate(tmp_path, "step_", None)
    assert state(tmp_path / "step_5") == "5"


def test_killed_while_an_old_checkpoint_is_deleted_no_half_of_it_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path / f"step_{step}", str(step), saved_at_s=float(step))

    def killed(path: Path, **_: object) -> None:
        if path.exists():
            (path / "part" / "shard").unlink()
            raise Killed

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(folders.shutil, "rmtree", killed)
        rotate(tmp_path, "step_", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step_1.saving", "step_2"]


@pytest.mark.parametrize("there", [False, True])
def test_files_mark_and_names_are_on_the_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """What a power cut leaves behind: bytes and names that were synced, at the places that were renamed since."""
    target = tmp_path / "step_7"
    if there:
        save(target, "former")
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        assert path.is_dir() or path.stat().st_size, "synced before it was written"
        synced.append(str(path.relative_to(tmp_path)))

    staging = staging_folder(target).relative_to(tmp_path)
    rename = Path.rename

    def renamed(self: Path, to: Path) -> Path:
        if to == target:
            names = ("part/shard", f".{MARK_NAME}", "part", ".")
            assert {str(staging / name) for name in names} <= {*synced}
            synced.clear()
        return rename(self, to)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    save(target, "new")
    assert synced == ["."]


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_a_mark_of_another_version_is_no_damage_and_says_which_hf_mics_wrote_it(tmp_path: Path, version: int) -> None:
    (tmp_path / MARK_NAME).write_text(json.dumps({"format_version": version, "versions": {"torch": "2.11.0"}}))
    with pytest.raises(CheckpointError, match=f"of format {version}; this hf_mics reads {FORMAT_VERSION}.*2.11.0"):
        read_mark(tmp_path)
