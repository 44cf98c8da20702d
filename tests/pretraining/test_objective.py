"""Is every label weighted alike however it is split up, and are metrics those of the whole evaluation set?"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from transformers import EvalPrediction

from hf_mics.pretraining.objective import (
    classification_metrics,
    masked_token_metrics,
    mean_cross_entropy,
    predictions,
    predictions_and_losses,
)
from hf_mics.testing import run_ranks

NUM_BLOCKS, NUM_TOKENS, VOCAB = 7, 5, 11
NOTHING = EvalPrediction(predictions=None, label_ids=None)
WRONG = EvalPrediction(predictions=np.array([0, 0]), label_ids=np.array([1, 2]))


def masked_batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Uneven: blocks with no, one and all tokens masked."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(NUM_BLOCKS, NUM_TOKENS, VOCAB, generator=generator, dtype=dtype)
    labels = torch.randint(VOCAB, (NUM_BLOCKS, NUM_TOKENS), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.6] = -100
    labels[0], labels[1] = -100, 4
    return logits, labels


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_micro_batches_add_up_to_the_loss_of_the_whole(label_smoothing: float):
    logits, labels = masked_batch(torch.float32)
    num_items = labels.ne(-100).sum()
    whole = torch.nn.CrossEntropyLoss(label_smoothing=label_smoothing)(logits.flatten(0, 1), labels.flatten())
    parts = [
        mean_cross_entropy(SimpleNamespace(logits=part), target, num_items, label_smoothing)
        for part, target in zip(logits.split(2), labels.split(2), strict=True)
    ]
    # 13 terms around 5 in fp32: a few units of 2^-24 relative.
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)
    assert mean_cross_entropy(SimpleNamespace(logits=logits), labels, None, label_smoothing).item() == pytest.approx(
        whole.item(), rel=1e-6
    )


def test_losses_of_bf16_logits_are_fp32():
    logits, labels = masked_batch(torch.bfloat16)
    loss = mean_cross_entropy(SimpleNamespace(logits=logits), labels)
    assert loss.dtype == torch.float32
    assert loss == mean_cross_entropy(SimpleNamespace(logits=logits.float()), labels)
    losses = predictions_and_losses(logits, labels)[1]
    assert losses.dtype == torch.float32
    assert torch.equal(losses, predictions_and_losses(logits.float(), labels)[1])


def test_a_micro_batch_without_labels_costs_nothing():
    logits, labels = masked_batch()
    for items in (None, 0, torch.tensor(0)):  # of this process, and of all of the optimizer step
        assert mean_cross_entropy(SimpleNamespace(logits=logits[:1]), labels[:1], items).item() == 0


def test_classes_are_labels_too():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = torch.nn.functional.cross_entropy(logits, labels)
    assert mean_cross_entropy(SimpleNamespace(logits=logits), labels).item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(predictions((logits, "state"), labels), logits.argmax(-1))


def gathered(logits: torch.Tensor, labels: torch.Tensor) -> EvalPrediction:
    """What the Trainer hands over after batches of 2, concatenated."""
    batches = [predictions_and_losses(*batch) for batch in zip(logits.split(2), labels.split(2), strict=True)]
    columns = tuple(torch.cat(column).numpy() for column in zip(*batches, strict=True))
    return EvalPrediction(predictions=columns, label_ids=labels.numpy())


def test_masked_metrics_are_means_over_masked_tokens_not_over_blocks_or_batches():
    logits, labels = masked_batch()
    result = masked_token_metrics(gathered(logits, labels))
    is_masked = labels != -100
    loss = torch.nn.functional.cross_entropy(logits[is_masked], labels[is_masked]).item()
    # The losses are fp32 on the way, as logits of a model are: 2^-24 relative each.
    assert result["loss_nats_per_token"] == pytest.approx(loss, rel=1e-6)
    assert result["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
    right = (logits.argmax(-1) == labels)[is_masked].double().mean().item()
    assert result["masked_accuracy"] == pytest.approx(right, abs=1e-12)
    frequent = torch.bincount(labels[is_masked]).max().item() / is_masked.sum().item()
    assert result["most_frequent_token_accuracy"] == pytest.approx(frequent, abs=1e-12)


def _metrics_on_rank() -> tuple[dict[str, float], dict[str, float]]:
    PartialState(cpu=True)
    logits, labels = masked_batch()
    classes = EvalPrediction(predictions=np.array([0, 1, 1, 2]), label_ids=np.array([0, 1, 2, 2]))
    if not PartialState().is_main_process:
        return masked_token_metrics(NOTHING), classification_metrics(WRONG)
    return masked_token_metrics(gathered(logits, labels)), classification_metrics(classes)


def test_every_rank_gets_the_metrics_that_the_main_process_computes():
    (masked, classes), other = run_ranks(_metrics_on_rank, 2)
    assert other == (masked, classes)
    assert masked == masked_token_metrics(gathered(*masked_batch()))
    assert classes["accuracy"] == 0.75
    assert classes["majority_class_accuracy"] == 0.5
