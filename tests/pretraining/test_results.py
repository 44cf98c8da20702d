"""Does a recipe report how good the weights are that it saves, and evaluate them once?"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_mics.errors import ConfigError
from hf_mics.pretraining.results import finish

EVALUATIONS = [{"eval_loss": 2.0, "step": 2}, {"loss": 1.0, "step": 4}, {"eval_loss": 3.0, "step": 4}]


@pytest.mark.parametrize(
    ("log", "load_best", "expected_loss", "evaluations"),
    [
        (EVALUATIONS, False, 3.0, 0),
        (EVALUATIONS, True, 2.0, 0),
        (EVALUATIONS[:2], False, 9.0, 1),
        ([], True, 9.0, 1),
    ],
)
def test_the_evaluation_reported_is_that_of_the_weights_saved(
    tmp_path: Path, log: list[dict[str, float]], load_best: bool, expected_loss: float, evaluations: int
) -> None:
    evaluated: list[None] = []
    saved: dict[str, Any] = {}

    def evaluate() -> dict[str, float]:
        evaluated.append(None)
        return {"eval_loss": 9.0}

    best = {"best_global_step": 2, "best_model_checkpoint": "checkpoint-2"}
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path), load_best_model_at_end=load_best),
        state=SimpleNamespace(global_step=4, log_history=log, **best),
        evaluate=evaluate,
        save_model=lambda folder: saved.update(model=folder),
        save_metrics=lambda split, metrics: saved.update({split: metrics}),
        save_state=lambda: saved.update(state="saved"),
        is_world_process_zero=lambda: False,
    )
    metrics = finish(trainer, "title", "token")
    assert metrics == saved["eval"] == {"eval_loss": expected_loss}
    assert len(evaluated) == evaluations
    assert saved["model"] == str(tmp_path / "model")
    assert saved["state"] == "saved"


def test_an_evaluation_of_no_rows_is_told_and_costs_no_model(tmp_path: Path) -> None:
    saved: list[str] = []
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path), load_best_model_at_end=False),
        state=SimpleNamespace(global_step=4, log_history=[], best_model_checkpoint=None),
        evaluate=lambda: {"eval_runtime": 0.1},
        save_model=saved.append,
    )
    with pytest.raises(ConfigError, match="no held-out row was evaluated: --dataloader_drop_last"):
        finish(trainer, "title", "token")
    assert saved == [str(tmp_path / "model")]
