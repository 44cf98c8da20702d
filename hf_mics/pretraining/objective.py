"""What do the Trainer recipes minimize, and how good is the result beside the simplest answer there is?

All of it goes into the stock Trainer: `compute_loss_func`, `preprocess_logits_for_metrics`, `compute_metrics`.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from hf_mics.pretraining.metrics import load_metric
from hf_mics.pretraining.ranks import broadcast_from_main

IGNORED = -100


def mean_cross_entropy(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None, label_smoothing: float = 0
) -> torch.Tensor:
    """Returns the cross-entropy summed over this micro-batch and divided by the labels of the whole optimizer step.

    So every label weighs the same, however many the ranks and micro-steps happen to have. Needed because the losses
    inside BERT and its kin are means of their own micro-batch, while the Trainer (transformers 5.23) takes any model
    whose forward has keyword arguments for one that divides by `num_items_in_batch`: gradients and logged loss would be
    accumulation steps x processes too large.

    Args:
        outputs: of the model, with `logits` of shape (..., classes).
        labels: one per row of logits; -100 where there is none.
        num_items_in_batch: labels of all micro-steps and all processes together; default those of `labels`. Where there
            are none, the loss is 0.
        label_smoothing: how much of each label's weight is spread over all classes.
    """
    logits = outputs.logits.flatten(0, -2).float()
    total = cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=label_smoothing)
    items = labels.ne(IGNORED).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return total / items.to(total.device).clamp(min=1)


def predictions_and_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shrinks the logits of masked tokens to what the metrics need, before they are gathered from all ranks.

    Returns:
        The most likely token at every place, shape (blocks, tokens), and each block's mean loss in nats per masked
        token, shape (blocks,), 0 where nothing is masked.
    """
    losses = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return logits.argmax(dim=-1), losses.sum(dim=1) / labels.ne(IGNORED).sum(dim=1).clamp(min=1)


def predictions(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Shrinks the logits of a classifier to the most likely class, shape (rows,)."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def masked_token_metrics(evaluated: EvalPrediction) -> dict[str, float]:
    """Returns loss, perplexity and accuracy on masked tokens, and the accuracy of one and the same answer throughout.

    A collective call, as the Trainer makes it: computed on the main process, the same on every rank.
    """

    def compute() -> dict[str, float]:
        tokens, losses = cast(tuple[np.ndarray, np.ndarray], evaluated.predictions)
        labels = cast(np.ndarray, evaluated.label_ids)
        counts = (labels != IGNORED).sum(axis=1)
        perplexity = load_metric("perplexity").compute(loss_nats_per_token=losses, num_tokens=counts)
        accuracy = load_metric("masked_accuracy").compute(predictions=tokens.ravel(), references=labels.ravel())
        return {**perplexity, **accuracy}

    return broadcast_from_main(compute)


def classification_metrics(evaluated: EvalPrediction) -> dict[str, float]:
    """Returns accuracy and macro F1, and both of one and the same answer throughout.

    A collective call, as the Trainer makes it: computed on the main process, the same on every rank.
    """

    def compute() -> dict[str, float]:
        metric = load_metric("classification")
        return metric.compute(predictions=evaluated.predictions, references=evaluated.label_ids)

    return broadcast_from_main(compute)
