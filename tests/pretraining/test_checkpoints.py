"""Is the right checkpoint found, and anything else refused?"""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_mics.checkpoint.mark import write_mark
from hf_mics.errors import ConfigError
from hf_mics.pretraining.checkpoints import Progress, checkpoint_path, find_checkpoint
from tests.checkpoint.test_folder import make_mark


def make(output_dir: Path, step: int, complete: bool = True) -> Path:
    path = checkpoint_path(output_dir, step)
    path.mkdir(parents=True)
    if complete:
        write_mark(path, make_mark({}, saved_at_s=float(step)))
    return path


def test_latest_is_the_newest_complete_one_by_number(tmp_path: Path):
    make(tmp_path, 9)
    newest = make(tmp_path, 1_000)
    unfinished = make(tmp_path, 2_000, complete=False)
    found, skipped = find_checkpoint("latest", tmp_path)
    assert found == newest
    assert str(unfinished) in skipped


def test_path_is_taken_as_it_is(tmp_path: Path):
    path = make(tmp_path, 3)
    assert find_checkpoint(str(path), "elsewhere") == (path, "")


@pytest.mark.parametrize("wanted", ["latest", "/no/such/folder", "."])
def test_folder_that_is_no_checkpoint_is_refused_and_others_are_named(tmp_path: Path, wanted: str):
    with pytest.raises(ConfigError, match=r"not a checkpoint: .*: none"):
        find_checkpoint(wanted, tmp_path)
    make(tmp_path, 7)
    with pytest.raises(ConfigError, match=r"step_00000007"):
        find_checkpoint(str(tmp_path), tmp_path)


def test_progress_survives_the_round_trip():
    progress = Progress(step=4, epoch=1, sequences=24, train_loss=[(1, 5.0), (4, 4.0)], validation_loss=[(4, 4.5)])
    restored = Progress()
    restored.load_state_dict(progress.state_dict())
    assert restored == progress
