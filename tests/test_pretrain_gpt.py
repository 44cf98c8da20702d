"""Does the GPT recipe train, resume and save what `from_pretrained` loads, launched as a user would?"""

from __future__ import annotations

import os
import re
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from hf_mics.checkpoint.folder import find_checkpoints

ROOT = Path(__file__).resolve().parents[1]
# 9 blocks on 4 ranks in batches of 1 are an epoch of 3 micro-steps: windows of 2 straddle every other epoch, and step 5
# is in the middle of one.
BLOCK_TOKENS, NUM_BLOCKS = 16, 9


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*flags: str | Path | int) -> list[str]:
    words = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
        *("--config_file", ROOT / "recipes/configs/cpu_2x2.yaml", ROOT / "recipes/pretrain_gpt.py", *flags),
    ]
    return list(map(str, words))


def launch(*flags: str | Path | int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*flags), env=ENVIRONMENT, capture_output=True, text=True, timeout=180)


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
    return [*flags, "--per_device_batch_size", 1, "--warmup_steps", 2, "--eval_steps", 5, "--logging_steps", 1]


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(output_dir / "model").state_dict()


def test_recipe_resumes_bit_equal_in_mid_epoch_and_saves_a_hugging_face_folder(
    common: list[str | Path], tmp_path: Path
):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    first = launch(*common, "--output_dir", whole, "--max_steps", 8, "--save_steps", 5)
    assert first.returncode == 0, first.stderr[-4000:]
    assert "MiCS: 4 ranks on 1 node of 4, 2 partition groups of 2" in first.stderr + first.stdout
    assert (whole / "loss.png").stat().st_size > 10_000
    assert list((whole / "logs").rglob("events*"))

    checkpoint = whole / "checkpoints" / "step_00000005"
    second = launch(*common, "--output_dir", resumed, "--max_steps", 8, "--resume_from_checkpoint", checkpoint)
    assert second.returncode == 0, second.stderr[-4000:]
    assert "at step 5" in second.stdout
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    generated = model.generate(**tokenizer("ABC", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > tokenizer("ABC", return_tensors="pt")["input_ids"].shape[1]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_sigterm_to_the_launcher_saves_at_the_end_of_the_step_on_all_ranks(common: list[str | Path], tmp_path: Path):
    log = tmp_path / "log.txt"
    flags = [*common, "--output_dir", tmp_path, "--max_steps", 100_000, "--report_to", "none", "--eval_steps", 100_000]
    with log.open("w") as output:
        job = subprocess.Popen(command(*flags), env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
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


def test_bad_input_is_the_same_clear_error_on_every_rank(common: list[str | Path], tmp_path: Path):
    result = launch(*common, "--output_dir", tmp_path, "--max_steps", 2, "--block_size", 4096)
    assert result.returncode != 0
    expected = "ConfigError: Blocks longer than the corpus: expected at least one block of 4096 tokens, got 144"
    assert result.stderr.count(expected) == 4
