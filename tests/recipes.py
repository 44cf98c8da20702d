"""How does a test run a recipe, on four ranks as a user would launch it, or in one process without MiCS?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "recipes" / "configs" / "cpu_2x2.yaml"
RUN_RECIPE = ROOT / "tests" / "assets" / "run_recipe.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TIMEOUT_S = 240


def command(*words: str | Path | float) -> list[str]:
    """Returns what launches `words` on 4 ranks in partition groups of 2."""
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", 0, "--config_file", CONFIG)
    return list(map(str, (*launcher, *words)))


def run(*words: str | Path | float) -> subprocess.CompletedProcess[str]:
    """Runs a command from the root of the repository and without the hub."""
    return subprocess.run(
        list(map(str, words)), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def launch(*words: str | Path | float) -> subprocess.CompletedProcess[str]:
    """Runs `words` on 4 ranks in partition groups of 2."""
    return run(*command(*words))


def launch_recipe(recipe: str, report: Path, *flags: str | Path | float) -> list[list[dict[str, int]]]:
    """Runs a recipe on 4 ranks, again after each `--then` in `flags`; returns each rank's counts of each run."""
    report.mkdir(parents=True)
    result = launch(RUN_RECIPE, report, "mics", ROOT / "recipes" / recipe, *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "MiCS: 4 ranks on 1 node of 4, 2 partition groups of 2" in result.stderr + result.stdout
    counts = [json.loads((report / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert all(len(engines) == 1 + flags.count("--then") for engines in counts)
    return [list(run) for run in zip(*counts, strict=True)]


def run_alone(recipe: str, *flags: str | Path | float) -> None:
    """Runs a recipe in one process without MiCS, again after each `--then`."""
    result = run(sys.executable, RUN_RECIPE, "-", "alone", ROOT / "recipes" / recipe, *flags)
    assert result.returncode == 0, result.stderr[-4000:]


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
