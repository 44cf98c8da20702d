"""How does a checkpoint folder appear all at once or not at all, and which one is the newest complete one?

A checkpoint NAME is written to `.NAME.saving/NAME` beside its place, gets its mark, and is renamed. So the name NAME
never belongs to half a checkpoint, whoever looks for it. All of this is for the main process alone.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hf_mics.checkpoint.mark import MARK_NAME, Mark, list_files, missing_files, read_mark, write_mark
from hf_mics.errors import CheckpointError


def staging_folder(target: Path) -> Path:
    """Where the checkpoint `target` is written before it is complete; its last part is `target`'s name."""
    return target.parent / f".{target.name}.saving" / target.name


def start_saving(target: Path) -> None:
    """Makes the empty staging folder of `target`; what an interrupted attempt left there is removed."""
    restore_interrupted(target)
    if _former(target).is_dir():
        _take_over(target)
    staging = staging_folder(target)
    shutil.rmtree(staging.parent, ignore_errors=True)
    staging.mkdir(parents=True)


def discard(target: Path) -> None:
    """Removes the staging folder of a checkpoint that was not completed, and frees its space."""
    shutil.rmtree(staging_folder(target).parent, ignore_errors=True)


def commit(target: Path, make_mark: Callable[[dict[str, int]], Mark]) -> None:
    """Brings the staged files down to the disk, marks them complete and puts them in the place of `target`.

    A complete checkpoint that is there already is replaced in one rename; files in it that are not the checkpoint's own
    move over. A folder with other files keeps them, and the checkpoint moves in, its mark last.

    Args:
        make_mark: makes the mark from the bytes of every file by name.
    """
    staging = staging_folder(target)
    files = list_files(staging)
    for name in files:
        _sync(staging / name)
    write_mark(staging, make_mark(files))
    for folder in (path for path in (staging, *staging.rglob("*")) if path.is_dir()):
        _sync(folder)
    if not target.exists() or not any(target.iterdir()):
        staging.rename(target)
    elif read_mark(target):
        _replace(target, staging)
    else:
        _move_into(target, staging)
    shutil.rmtree(staging.parent, ignore_errors=True)
    _sync(target.parent)


def _replace(target: Path, staging: Path) -> None:
    former = _former(target)
    shutil.rmtree(former, ignore_errors=True)
    target.rename(former)
    # Killed here, the former checkpoint is complete under its second name: `restore_interrupted` brings it back.
    staging.rename(target)
    # Killed here, the next `start_saving` goes on.
    _take_over(target)


def _take_over(target: Path) -> None:
    """Moves files that are not the former checkpoint's own to the one in its place, and deletes it."""
    former = _former(target)
    if mark := read_mark(former):  # else it is being deleted, and they are gone from it
        own = {MARK_NAME, *(Path(name).parts[0] for name in mark.files)}
        for path in former.iterdir():
            if path.name not in own and not (target / path.name).exists():
                path.rename(target / path.name)
    shutil.rmtree(former, ignore_errors=True)


def _move_into(target: Path, staging: Path) -> None:
    entries = sorted(staging.iterdir(), key=lambda path: path.name == MARK_NAME)
    for path in entries:
        place = target / path.name
        if place.is_dir():
            shutil.rmtree(place)
        path.rename(place)


def _former(target: Path) -> Path:
    return target.parent / f".{target.name}.former"


def restore_interrupted(target: Path) -> None:
    """Brings back the checkpoint that `commit` was about to replace when the job died between two renames."""
    if not target.exists() and _former(target).is_dir() and read_mark(_former(target)):
        _former(target).rename(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class Found:
    """Complete checkpoints in the order in which they were saved, and what is not one, with the reason."""

    complete: list[Path] = field(default_factory=list)
    skipped: dict[Path, str] = field(default_factory=dict)

    def describe_skipped(self) -> str:
        """One line for each folder that was skipped."""
        return "\n".join(f"  skipped {path}: {reason}" for path, reason in self.skipped.items())


def find_checkpoints(parent: Path, prefix: str) -> Found:
    """The checkpoints `PREFIX<number>` in `parent`: complete ones, the newest last, and the others.

    Args:
        prefix: of their names, as "checkpoint-" for a Trainer's.
    """
    found = Found()
    pattern = re.compile(rf"\.?{re.escape(prefix)}(\d+)(\.saving|\.former)?")
    order: dict[Path, tuple[float, int]] = {}
    for path in parent.glob(f".{prefix}*.former"):
        restore_interrupted(path.parent / path.name.removeprefix(".").removesuffix(".former"))
    for path in sorted(parent.glob("*")):
        match = pattern.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        if match[2]:
            found.skipped[path] = "saving it was interrupted"
            continue
        try:
            mark = read_mark(path)
        except CheckpointError as error:
            found.skipped[path] = str(error)
            continue
        wrong = ["it has no completion mark"] if mark is None else missing_files(path, mark)
        if mark is None or wrong:
            found.skipped[path] = "; ".join(wrong[:3])
            continue
        order[path] = mark.saved_at_s, int(match[1])
    found.complete = sorted(order, key=lambda path: order[path])
    return found


def rotate(parent: Path, prefix: str, keep: int | None, protected: str | None = None) -> None:
    """Deletes the oldest complete checkpoints until `keep` are left; never the newest, nor `protected`.

    What is not complete does not count and is left alone: it may be another program's.
    """
    if not keep or keep <= 0:
        return
    complete = find_checkpoints(parent, prefix).complete
    spared = {complete[-1]} if complete else set()
    spared |= {path for path in complete if protected and path.absolute() == Path(protected).absolute()}
    surplus = max(len(complete) - keep, 0)
    for path in [path for path in complete if path not in spared][:surplus]:
        # Under another name first: killed while deleting, no half checkpoint keeps the name of a whole one.
        doomed = path.parent / f".{path.name}.saving"
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
