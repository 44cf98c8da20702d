"""Does a run resume whose model has parameters that are trained but, so far, had no gradient?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_mics import MiCSAccelerator, MiCSPlugin
from hf_mics.checkpoint.mark import read_mark
from hf_mics.errors import CheckpointError
from hf_mics.testing import run_ranks
from tests.test_accelerator import fresh_accelerator, full_weights

STEPS, SAVED_AT, POOLED_FROM = 6, 2, 4


class Pooled(nn.Module):
    """An encoder whose pooler is not read until it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.pooler = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, rows: torch.Tensor, pooled: bool) -> torch.Tensor:
        rows = self.encoder(rows)
        return self.pooler(rows) if pooled else rows


def start(form: str) -> tuple[MiCSAccelerator, nn.Module, Any]:
    plugin = MiCSPlugin(partition_size=2, state_dict_type=f"{form.upper()}_STATE_DICT")
    accelerator = fresh_accelerator(gradient_accumulation_steps=2, mics_plugin=plugin)
    torch.manual_seed(0)
    model = Pooled()
    # One group has parameters with and without state, the other none with.
    groups = [
        {"params": [model.encoder.weight, model.encoder.bias, model.pooler.weight]},
        {"params": [model.pooler.bias]},
    ]
    groups[0]["weight_decay"] = 0.1
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups, lr=0.01))
    return accelerator, model, optimizer


def train(accelerator: MiCSAccelerator, model: nn.Module, optimizer: Any, first: int, folder: str | None) -> None:
    for step in range(first, STEPS):
        for micro_step in range(2):
            seed = 100 * step + 10 * micro_step + accelerator.process_index
            rows = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))
            with accelerator.accumulate(model):
                accelerator.backward(model(rows, step >= POOLED_FROM).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        if step + 1 == SAVED_AT and folder:
            accelerator.save_state(folder)


def save_and_resume(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for form in ("sharded", "full"):
        whole = start(form)
        train(*whole, 0, f"{folder}/{form}")
        resumed = start(form)
        resumed[0].load_state(f"{folder}/{form}")
        train(*resumed, SAVED_AT, None)
        # A second load over state that the run has made by now.
        again = full_weights(whole[1]), full_weights(resumed[1])
        resumed[0].load_state(f"{folder}/{form}")
        stateless = sum(not resumed[2].state.get(p) for group in resumed[2].param_groups for p in group["params"])
        found[form] = {
            "equal": all(torch.equal(weight, again[1][name]) for name, weight in again[0].items()),
            "stateless": stateless,
        }
        # The other way around: a run that is behind takes up one that has state of more parameters.
        whole[0].save_state(f"{folder}/{form}_end")
        behind = start(form)
        behind[0].load_state(f"{folder}/{form}")
        behind[0].load_state(f"{folder}/{form}_end")
        moments = [
            [
                optimizer.state[param]["exp_avg"].full_tensor()
                for group in optimizer.param_groups
                for param in group["params"]
            ]
            for _, _, optimizer in (whole, behind)
        ]
        found[form]["ahead"] = all(torch.equal(*pair) for pair in zip(*moments, strict=True))
    frozen = start("sharded")
    frozen[1].pooler.weight.requires_grad_(False)
    with pytest.raises(CheckpointError) as caught:
        frozen[0].load_state(f"{folder}/sharded")
    found["said"] = str(caught.value)
    train(*frozen, POOLED_FROM, None)
    frozen[0].save_state(f"{folder}/frozen")
    with pytest.raises(CheckpointError, match=r"trains other parameters: here only: 1 \(pooler.weight\)"):
        start("sharded")[0].load_state(f"{folder}/frozen")
    return found


def test_parameters_that_had_no_gradient_when_a_run_was_saved_resume_bit_equal_without_state(tmp_path: Path) -> None:
    for rank in run_ranks(save_and_resume, 4, str(tmp_path)):
        for form in ("sharded", "full"):
            assert rank[form] == {"equal": True, "stateless": 2, "ahead": True}, form
        assert "trains other parameters: there only: 1 (pooler.weight). Freeze the same" in rank["said"]
    mark = read_mark(tmp_path / "sharded")
    assert mark is not None
    assert mark.optimizers[0].without_state == ["pooler.weight", "pooler.bias"]
