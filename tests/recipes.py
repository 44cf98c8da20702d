"""How does a test run a recipe: on 4 ranks as a user would launch it, on forked ones, or in one process without MiCS?

A launch takes several times as long as the training of these tests (see `tests.scripts`), so each recipe's tests launch
it once and fork the ranks of their other runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests import scripts
from tests.scripts import CONFIG, ROOT

RUN_RECIPE = ROOT / "tests" / "assets" / "run_recipe.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TIMEOUT_S = 240
MICS_4X2 = "MiCS: 4 ranks on 1 node of 4, 2 partition groups of 2"


def command(*words: str | Path | float) -> list[str]:
    """Returns what launches `words` on 4 ranks in partition groups of 2."""
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", 0, "--config_file", CONFIG)
    return list(map(str, (*launcher, *words)))


def launch(*words: str | Path | float) -> subprocess.CompletedProcess[str]:
    """Runs `words` on 4 ranks in partition groups of 2, from the root of the repository and without the hub."""
    return subprocess.run(command(*words), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S)


def launch_recipe(recipe: str, report: Path, *flags: str | Path | float) -> list[list[dict[str, int]]]:
    """Launches a recipe on 4 ranks, again after each `--then` in `flags`; returns each rank's counts of each run."""
    report.mkdir(parents=True)
    result = launch(RUN_RECIPE, report, "mics", ROOT / "recipes" / recipe, *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    assert MICS_4X2 in result.stderr + result.stdout
    return _read_counts(report, runs=1 + flags.count("--then"))


def count_on_ranks(recipe: str, report: Path, *flags: str | Path | float) -> list[list[dict[str, int]]]:
    """As `launch_recipe`, on forked ranks."""
    report.mkdir(parents=True)
    ranks = scripts.run_on_ranks(RUN_RECIPE, report, "mics", ROOT / "recipes" / recipe, *flags)
    assert all(rank.returncode == 0 for rank in ranks), ranks[0].stderr[-4000:]
    assert MICS_4X2 in ranks[0].stderr + ranks[0].stdout
    return _read_counts(report, runs=1 + flags.count("--then"))


def _read_counts(report: Path, *, runs: int) -> list[list[dict[str, int]]]:
    counts = [json.loads((report / f"rank{rank}.json").read_text()) for rank in range(scripts.WORLD_SIZE)]
    assert all(len(engines) == runs for engines in counts)
    return [list(run) for run in zip(*counts, strict=True)]


def run_alone(recipe: str, *flags: str | Path | float) -> None:
    """Runs a recipe in one process without MiCS, again after each `--then`."""
    result = scripts.run_alone(RUN_RECIPE, "-", "alone", ROOT / "recipes" / recipe, *flags)
    assert result.returncode == 0, result.stderr[-4000:]


def run_on_ranks(recipe: str, *flags: str | Path | float) -> list[scripts.Ran]:
    """Runs a recipe under MiCS on 4 forked ranks."""
    return scripts.run_on_ranks(ROOT / "recipes" / recipe, *flags)


def history(output_dir: Path, key: str) -> list[float]:
    """Returns what the Trainer logged as `key`, in order."""
    log: list[dict[str, Any]] = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in log if key in entry]


def weights(output_dir: Path, auto_class: Any) -> dict[str, torch.Tensor]:
    """Returns the weights that a recipe saved, tied ones wherever they are used."""
    return auto_class.from_pretrained(output_dir / "model").state_dict()


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Returns the largest absolute difference between two models' weights."""
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def assert_told(ranks: list[scripts.Ran], message: str) -> None:
    """All ended with exit code 2 and said why, in the recipe's words; a launcher ends the others once the first has."""
    assert [rank.returncode for rank in ranks] == [2] * len(ranks)
    for rank in ranks:
        assert rank.stderr.count(message) == 1, rank.stderr[-4000:]
        assert "Traceback" not in rank.stderr
