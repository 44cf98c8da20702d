"""Does the stock Trainer with MiCSCallback train as one process does, and behave in every other way as it did?"""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_mics.errors import LossError
from hf_mics.loss_watch import LossWatch
from tests.assets.trainer_door import MODELS, make_model, make_trainer, report
from tests.recipes import launch
from tests.scripts import run_on_ranks

ASSETS = Path(__file__).parent / "assets"
# SGD keeps differences proportional to the fp32 rounding of sums over 4 ranks x 2 micro-steps x 24 tokens, about 1e-7
# of gradients of order 1, times 10 steps of rate 0.1; losses and norms are sums of as many terms.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the same script reports with the callback, under the runner, and in one process on the global batch."""
    folder = tmp_path_factory.mktemp("doors")
    script = ASSETS / "trainer_door.py"
    seen: dict[str, dict[str, Any]] = {"alone": {}}
    ranks = run_on_ranks(script, folder / "callback", "--callback")
    assert all(rank.returncode == 0 for rank in ranks), ranks[0].stderr[-4000:]
    stderr = "".join(rank.stderr for rank in ranks)
    assert stderr.count("MiCS: 4 ranks on 1 node of 4, 2 partition groups of 2") == len(MODELS)
    assert stderr.count("per optimizer step of 2 micro-steps") == len(MODELS)
    seen["callback"] = torch.load(folder / "callback")
    launched = launch("-m", "hf_mics", script, folder / "runner")
    assert launched.returncode == 0, launched.stderr[-4000:]
    seen["runner"] = torch.load(folder / "runner")
    for name in MODELS:
        trainer = make_trainer(name, str(folder / "alone"), 8, [])
        trainer.train()
        seen["alone"][name] = report(trainer)
    return seen


def series(of: dict[str, Any], key: str) -> list[float]:
    return [entry[key] for entry in of["log"] if key in entry]


@pytest.mark.parametrize("name", MODELS)
def test_the_callback_and_the_runner_give_the_same_weights(doors: dict[str, dict[str, Any]], name: str) -> None:
    ours, runner = doors["callback"][name], doors["runner"][name]
    assert ours["weights"].keys() == runner["weights"].keys()
    assert all(torch.equal(ours["weights"][key], runner["weights"][key]) for key in ours["weights"])
    for key in ("loss", "grad_norm", "eval_loss"):
        assert series(ours, key) == series(runner, key)
    assert ours["evaluation"] == runner["evaluation"]


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_curve_and_weights_are_those_of_one_process_on_the_same_global_batch(
    doors: dict[str, dict[str, Any]], name: str
) -> None:
    ours, alone = doors["callback"][name], doors["alone"][name]
    assert len(series(ours, "loss")) == 10
    for key in ("loss", "grad_norm", "eval_loss"):
        assert series(ours, key) == pytest.approx(series(alone, key), rel=TOLERANCE)
    assert ours["evaluation"] == pytest.approx(alone["evaluation"], rel=TOLERANCE)
    difference = max((ours["weights"][n] - alone["weights"][n]).abs().max().item() for n in alone["weights"])
    moved = max((w - make_model(name).state_dict()[n]).abs().max().item() for n, w in alone["weights"].items())
    assert difference < TOLERANCE < 1e-3 * moved


@pytest.mark.parametrize("name", MODELS)
def test_hop_2_runs_once_per_unit_and_optimizer_step_short_last_windows_included(
    doors: dict[str, dict[str, Any]], name: str
) -> None:
    assert doors["callback"][name]["hop 2 calls"] == list(range(1, 11))
    assert doors["runner"][name]["hop 2 calls"] == list(range(1, 11))


def test_the_first_of_several_losses_that_are_not_finite_is_named() -> None:
    passed_on: list[float] = []
    accelerator = SimpleNamespace(device="cpu", backward=lambda loss: passed_on.append(loss.item()))
    watch = LossWatch(accelerator)
    for step, losses in enumerate(([1.0], [2.0, 3.0])):
        for loss in losses:
            accelerator.backward(torch.tensor(loss))
        watch.check(step + 1)
    for loss in (1.0, float("inf"), 2.0, float("nan")):
        accelerator.backward(torch.tensor(loss))
    with pytest.raises(LossError, match="optimizer step 3, micro-step 2, seen first by rank 0"):
        watch.check(3)
    assert passed_on[:4] == [1.0, 2.0, 3.0, 1.0]


def test_the_other_ranks_name_a_rank_that_died_and_its_node() -> None:
    """Without a launcher, whose agent ends the others before they can speak, as on the other nodes of a cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = run_on_ranks(ASSETS / "trainer_loses_a_rank.py", 2, environment=meeting)
    assert [rank.returncode for rank in ranks] == [1, 1, -signal.SIGKILL, 1]
    for number in (0, 1, 3):
        told = ranks[number].stderr
        assert f"MiCS: rank 2 on node {socket.gethostname()} died" in told, told[-3000:]
        assert f"why rank {number} failed" in told
