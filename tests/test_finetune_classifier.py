"""Does the classifier recipe learn, train as one process does, and take any folder, launched as a user would?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from hf_mics.pretraining.tokenization import train_byte_level_bpe
from tests.recipes import assert_told, history, largest_difference, launch_recipe, run_alone, run_on_ranks, weights

# 24 rows on 4 ranks in batches of 2 are an epoch of 3 micro-steps: a window of 2 and one of 1. 5 rows to evaluate on
# leave three ranks without one in the second batch.
NUM_ROWS, NUM_EVAL_ROWS = 24, 5


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path | float]:
    """A decoder, which has no padding token of its own, and rows of different lengths."""
    folder = tmp_path_factory.mktemp("inputs")
    kinds = (("good", "up"), ("bad", "down"), ("dull", "level"))
    rows = [
        (f"a {'very ' * (row % 5)}{kinds[row % 3][0]} film number {row}", kinds[row % 3][1])
        for row in range(NUM_ROWS + NUM_EVAL_ROWS)
    ]
    for name, part in (("train", rows[:NUM_ROWS]), ("validation", rows[NUM_ROWS:])):
        text = "".join(json.dumps({"review": text, "grade": grade}) + "\n" for text, grade in part)
        (folder / f"{name}.jsonl").write_text(text)
    tokenizer = train_byte_level_bpe([text for text, _ in rows], 300)
    tokenizer.save_pretrained(folder / "gpt")
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(
        GPT2Config(n_embd=12, n_layer=2, n_head=3, vocab_size=301, n_positions=40, **no_dropout, **ids)
    ).save_pretrained(folder / "gpt")
    files = ("--train_file", folder / "train.jsonl", "--validation_file", folder / "validation.jsonl")
    columns = ("--text_column", "review", "--label_column", "grade", "--model_name_or_path", folder / "gpt")
    # SGD keeps differences in proportion to those of the gradients.
    training = ("--optim", "sgd", "--learning_rate", 0.5, "--num_train_epochs", 2, "--save_strategy", "no")
    logs = ("--logging_steps", 1, "--per_device_eval_batch_size", 1, "--disable_tqdm", "true", "--report_to", "none")
    return [*files, *columns, *training, *logs]


def test_four_ranks_train_a_decoder_like_one_process_with_hop_2_once_per_optimizer_step(
    common: list[str | Path | float], tmp_path: Path
):
    ours, alone = tmp_path / "ours", tmp_path / "alone"
    (counts,) = launch_recipe(
        *("finetune_classifier.py", tmp_path / "report", *common, "--output_dir", ours),
        *("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2),
    )
    for of_rank in counts:
        assert of_rank["all_reduce/replication"] == 4 * of_rank["units"]
        assert of_rank["reduce_scatter/partition"] == 6 * of_rank["units"]
    run_alone(
        *("finetune_classifier.py", *common, "--output_dir", alone),
        *("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 8),
    )
    # fp32 sums over 16 rows of up to 30 tokens in another order, and 4 steps of it.
    for key in ("loss", "eval_loss", "grad_norm"):
        assert history(ours, key) == pytest.approx(history(alone, key), rel=2e-5), key
    assert history(ours, "eval_accuracy") == history(alone, "eval_accuracy")
    assert largest_difference(*(weights(of, AutoModelForSequenceClassification) for of in (ours, alone))) < 1e-5

    classify = pipeline("text-classification", str(ours / "model"))
    assert classify("a good film")[0]["label"] in {"up", "down", "level"}
    assert AutoTokenizer.from_pretrained(ours / "model").pad_token is not None
    assert (ours / "loss.png").stat().st_size > 10_000


def test_default_task_is_learned_well_above_the_majority_class(tmp_path: Path):
    """As without any flag, from fresh weights, in one process and shorter."""
    run_alone(
        *("finetune_classifier.py", "--output_dir", tmp_path, "--report_to", "none", "--eval_strategy", "no"),
        *("--per_device_train_batch_size", 16, "--num_train_epochs", 3, "--save_strategy", "no"),
    )
    results = json.loads((tmp_path / "eval_results.json").read_text())
    # 117 passages: a standard error of 0.045.
    assert results["eval_accuracy"] > results["eval_majority_class_accuracy"] + 0.15
    assert results["eval_f1_macro"] > results["eval_majority_class_f1_macro"] + 0.15


def test_bad_input_is_one_clear_error_that_ends_every_rank(common: list[str | Path | float], tmp_path: Path):
    flags = ("--output_dir", tmp_path, "--class_names", "up", "down")
    ranks = run_on_ranks("finetune_classifier.py", *common, *flags)
    assert_told(ranks, "unknown label in row 2 of the train split: expected one of up, down")
