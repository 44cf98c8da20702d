"""Does the BERT recipe train as one process does, and save what `from_pretrained` loads, launched as a user would?"""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig

from tests.recipes import assert_told, history, largest_difference, launch_recipe, run_alone, run_on_ranks, weights

# 12 blocks on 4 ranks in batches of 1 are an epoch of 3 micro-steps: a window of 2 and one of 1. 5 blocks to evaluate
# on leave three ranks without one in the second batch.
BLOCK_TOKENS, NUM_BLOCKS, NUM_EVAL_BLOCKS = 16, 12, 5
NUM_STEPS = 4
TEXTS = ("packed", "streamed")
Runs = tuple[Path, dict[str, list[dict[str, int]]]]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path | float]:
    folder = tmp_path_factory.mktemp("inputs")
    BertConfig(
        vocab_size=300,
        max_position_embeddings=BLOCK_TOKENS,
        hidden_size=15,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=29,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ).save_pretrained(folder)
    for name, blocks, step in (("train", NUM_BLOCKS, 7), ("validation", NUM_EVAL_BLOCKS, 5)):
        # One token a letter, and the separator; [CLS] and [SEP] frame every block.
        letters = [string.ascii_lowercase[place * step % 26] for place in range(blocks * (BLOCK_TOKENS - 2) - 1)]
        (folder / f"{name}.txt").write_text(" ".join(letters))
    files = ("--train_file", folder / "train.txt", "--validation_file", folder / "validation.txt")
    model = ("--model_config", folder, "--whole_word_mask", "--mask_probability", 0.3)
    # SGD keeps differences in proportion to those of the gradients.
    training = ("--optim", "sgd", "--learning_rate", 0.5, "--max_steps", NUM_STEPS, "--save_strategy", "no")
    logs = ("--logging_steps", 1, "--eval_steps", 2, "--per_device_eval_batch_size", 1, "--disable_tqdm", "true")
    return [*files, *model, *training, *logs]


@pytest.fixture(scope="module")
def runs(common: list[str | Path | float], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder of four runs, ours|alone / packed|streamed, and each rank's counts of ours."""
    folder = tmp_path_factory.mktemp("runs")

    def flags(side: str, micro_steps: int) -> list[str | Path | float]:
        same = (*common, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", micro_steps)
        packed, streamed = (("--output_dir", folder / side / text) for text in TEXTS)
        return [*same, *packed, "--then", *same, *streamed, "--streaming"]

    counts = launch_recipe("pretrain_bert.py", folder / "report", *flags("ours", 2))
    run_alone("pretrain_bert.py", *flags("alone", 8))
    return folder, dict(zip(TEXTS, counts, strict=True))


def test_hop_2_runs_once_per_optimizer_step(runs: Runs):
    for of_rank in runs[1]["packed"]:
        assert of_rank["all_reduce/replication"] == NUM_STEPS * of_rank["units"]
        assert of_rank["reduce_scatter/partition"] == 6 * of_rank["units"]
    for of_rank in runs[1]["streamed"]:
        # The Trainer does not know where a stream ends: the third micro-step of each of the first three passes ends in
        # hop 2 without an optimizer step, and its gradient counts in the next one.
        assert of_rank["all_reduce/replication"] == (NUM_STEPS + 3) * of_rank["units"]
        assert of_rank["reduce_scatter/partition"] == (3 * 3 + 2) * of_rank["units"]


@pytest.mark.parametrize("text", TEXTS)
def test_four_ranks_train_like_one_process(runs: Runs, text: str):
    ours, alone = runs[0] / "ours" / text, runs[0] / "alone" / text
    # fp32 sums of about 50 masked tokens in another order: relative 50 x 2^-24 = 3e-6 at worst, and 4 steps of it.
    for key in ("loss", "eval_loss_nats_per_token", "grad_norm"):
        assert history(ours, key) == pytest.approx(history(alone, key), rel=1e-5), key
    assert len(history(ours, "loss")) == NUM_STEPS
    # Steps 2 and 4 have the short window of a pass, or what a stream left of one, which the Trainer's log adds.
    assert history(ours, "loss")[3] < history(ours, "loss")[1]
    assert history(ours, "eval_masked_accuracy") == history(alone, "eval_masked_accuracy")
    assert largest_difference(*(weights(of, AutoModelForMaskedLM) for of in (ours, alone))) < 1e-5
    assert len(history(ours, "eval_perplexity")) == 2  # after steps 2 and 4, and not again at the end


def test_folder_holds_what_from_pretrained_needs_and_what_a_run_has_to_show(runs: Runs):
    ours = runs[0] / "ours" / "packed"
    model, tokenizer = (load.from_pretrained(ours / "model") for load in (AutoModelForMaskedLM, AutoTokenizer))
    with torch.no_grad():
        logits = model(**tokenizer("a b [MASK] d", return_tensors="pt")).logits
    assert logits.shape == (1, 6, 300)
    assert tokenizer.model_max_length == BLOCK_TOKENS
    assert (ours / "loss.png").stat().st_size > 10_000
    assert list((ours / "runs").rglob("events*"))
    results = json.loads((ours / "eval_results.json").read_text())
    assert {"eval_masked_accuracy", "eval_most_frequent_token_accuracy", "eval_perplexity"} <= results.keys()


def test_bad_input_is_one_clear_error_that_ends_every_rank(common: list[str | Path | float], tmp_path: Path):
    ranks = run_on_ranks("pretrain_bert.py", *common, "--output_dir", tmp_path, "--text_column", "body")
    assert_told(ranks, "pretrain_bert.py: error: no column 'body' in the train split")
