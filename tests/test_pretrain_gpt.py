"""Does the GPT recipe train, resume, stop when it is told to, and save what `from_pretrained` loads?"""

from __future__ import annotations

import re
import signal
import string
import subprocess
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from hf_mics.checkpoint.folder import find_checkpoints
from tests.recipes import (
    ENVIRONMENT,
    MICS_4X2,
    ROOT,
    assert_told,
    command,
    count_on_ranks,
    run_alone,
    run_on_ranks,
)

RECIPE = "pretrain_gpt.py"
SCRIPT = ROOT / "recipes" / RECIPE
# 9 blocks on 4 ranks in batches of 1 are an epoch of 3 micro-steps: windows of 2 straddle every other epoch, and step 5
# is in the middle of one.
BLOCK_TOKENS, NUM_BLOCKS = 16, 9
NEVER = ["--eval_steps", 0, "--logging_steps", 0]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """A tiny model with dropout, so that a resumed run must also find the random state, and a text of a few blocks."""
    folder = tmp_path_factory.mktemp("inputs")
    GPT2Config(
        vocab_size=300, n_positions=BLOCK_TOKENS, n_embd=12, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    ).save_pretrained(folder)
    train, validation = folder / "train.txt", folder / "validation.txt"
    letters = string.ascii_letters * 3
    train.write_text(letters[: BLOCK_TOKENS * NUM_BLOCKS - 1])  # one token a letter, and the end of text
    validation.write_text(letters[::-1][: BLOCK_TOKENS * 5 - 1])
    flags = ["--model_config", folder, "--train_file", train, "--validation_file", validation, "--vocab_size", 257]
    return [*flags, "--per_device_train_batch_size", 1, "--warmup_steps", 2, "--eval_steps", 5, "--logging_steps", 1]


def logged(output_dir: Path, tag: str) -> list[float]:
    # Not below: the flags of the run are logged into a folder of their own.
    (events,) = (output_dir / "logs").glob("events*")
    return [event.value for event in EventAccumulator(str(events)).Reload().Scalars(tag)]


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(output_dir / "model").state_dict()


def test_recipe_resumes_bit_equal_in_mid_epoch_and_saves_a_hugging_face_folder(
    common: list[str | Path], tmp_path: Path
):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    first = run_on_ranks(RECIPE, *common, "--output_dir", whole, "--max_steps", 8, "--save_steps", 5)
    assert all(rank.returncode == 0 for rank in first), first[0].stderr[-4000:]
    assert MICS_4X2 in first[0].stderr + first[0].stdout
    assert (whole / "loss.png").stat().st_size > 10_000
    assert list((whole / "logs").rglob("events*"))

    checkpoint = whole / "checkpoints" / "step_00000005"
    flags = ("--output_dir", resumed, "--max_steps", 8, "--resume_from_checkpoint", checkpoint)
    second = run_on_ranks(RECIPE, *common, *flags)
    assert all(rank.returncode == 0 for rank in second), second[0].stderr[-4000:]
    assert "at step 5" in second[0].stdout
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    generated = model.generate(**tokenizer("ABC", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > tokenizer("ABC", return_tensors="pt")["input_ids"].shape[1]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_sigterm_to_the_launcher_saves_at_the_end_of_the_step_on_all_ranks(common: list[str | Path], tmp_path: Path):
    """Launched as a user would."""
    log = tmp_path / "log.txt"
    flags = [*common, "--output_dir", tmp_path, "--max_steps", 100_000, "--report_to", "none", *NEVER]
    with log.open("w") as output:
        job = subprocess.Popen(command(SCRIPT, *flags), env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 150
        while not re.search(r"[1-9]\d*/100000", log.read_text()):
            assert job.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        job.wait(timeout=60)
    finally:
        job.kill()
    said = re.search(r"Stopped by SIGTERM after step (\d+); --resume_from_checkpoint (\S+) goes on", log.read_text())
    assert said, log.read_text()[-4000:]
    found = find_checkpoints(tmp_path / "checkpoints", "step_")
    assert [str(path) for path in found.complete] == [said[2]]
    assert not found.skipped
    state = torch.load(Path(said[2], "custom_checkpoint_0.pkl"), weights_only=True)
    assert state["step"] == int(said[1]) > 0
    # Every rank came to the end of its own: none was killed with its random state unsaved.
    assert len(list(Path(said[2]).glob("random_states_*.pkl"))) == 4
    assert AutoTokenizer.from_pretrained(said[2]).eos_token_id is not None


def test_four_ranks_train_like_one_process_with_hop_2_once_per_optimizer_step(common: list[str | Path], tmp_path: Path):
    """Without dropout, and on 12 blocks: 3 micro-steps an epoch on 4 ranks, with no block twice to fill them up."""
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": None, "eos_token_id": None}
    GPT2Config(
        vocab_size=300, n_positions=BLOCK_TOKENS, n_embd=12, n_layer=2, n_head=2, **no_dropout, **ids
    ).save_pretrained(tmp_path)
    (tmp_path / "train.txt").write_text((string.ascii_letters * 4)[: BLOCK_TOKENS * 12 - 1])
    flags = [*common, "--model_config", tmp_path, "--train_file", tmp_path / "train.txt", "--max_steps", 5]
    ours, alone = tmp_path / "ours", tmp_path / "alone"
    (counts,) = count_on_ranks(
        *(RECIPE, tmp_path / "report", *flags, "--output_dir", ours, "--gradient_accumulation_steps", 2)
    )
    for of_rank in counts:
        assert of_rank["all_reduce/replication"] == 5 * of_rank["units"]
        assert of_rank["reduce_scatter/partition"] == 10 * of_rank["units"]
    run_alone(RECIPE, *flags, "--output_dir", alone, "--gradient_accumulation_steps", 8)
    # fp32 sums over 120 tokens in another order: relative 120 x 2^-24 = 7e-6 at worst in a gradient, no more in AdamW's
    # steps, but for weights without any effect, whose gradients are rounding alone.
    for tag in ("train/loss_nats_per_token", "validation/loss_nats_per_token"):
        assert logged(ours, tag) == pytest.approx(logged(alone, tag), rel=2e-5), tag
    losses = logged(ours, "train/loss_nats_per_token")
    assert len(losses) == 5
    assert losses[-1] < losses[0]


def test_a_loss_that_is_not_finite_stops_every_rank_and_leaves_the_checkpoints_before_it(
    common: list[str | Path], tmp_path: Path
):
    """The second step's rate makes weights whose products overflow, so the third loss is NaN; every step saves."""
    flags = (*common, "--output_dir", tmp_path, "--report_to", "none", "--max_steps", 4, "--save_steps", 1)
    ranks = run_on_ranks(RECIPE, *flags, "--learning_rate", 1e30)
    assert_told(ranks, "the loss is not finite: optimizer step 3, micro-step 1, seen first by rank 0 on node")
    found = find_checkpoints(tmp_path / "checkpoints", "step_")
    assert [path.name for path in found.complete] == ["step_00000001", "step_00000002"]
    assert sorted((tmp_path / "checkpoints").iterdir()) == found.complete
    assert not (tmp_path / "model").exists()


def test_bad_input_is_one_clear_error_that_ends_every_rank(common: list[str | Path], tmp_path: Path):
    """An output folder that is a file, found before the data is looked at, whose mistake would be the next."""
    (tmp_path / "file").touch()
    ranks = run_on_ranks(RECIPE, *common, "--output_dir", tmp_path / "file", "--max_steps", 2, "--block_size", 4096)
    assert_told(ranks, "pretrain_gpt.py: error: --output_dir cannot be written")
