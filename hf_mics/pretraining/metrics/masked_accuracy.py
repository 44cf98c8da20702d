"""How many of the masked tokens does a model guess right? An `evaluate` metric that needs no hub.

Beside it stands what knowing nothing of the text would reach. `evaluate` copies this file to its own cache and imports
it from there, so it imports nothing of hf_mics.
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score

_DESCRIPTION = "Accuracy on masked tokens, beside that of always answering the most frequent of them."
_INPUTS = """
Args:
    predictions: the most likely token at every place.
    references: the right token where one is masked, -100 everywhere else.
Returns:
    masked_accuracy: share of the masked tokens that are predicted right, nan without any.
    most_frequent_token_accuracy: the same for the best answer that never changes.
"""


class MaskedAccuracy(evaluate.Metric):
    """Right guesses / masked tokens."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        is_masked = np.asarray(references) != -100
        found, right = np.asarray(predictions)[is_masked], np.asarray(references)[is_masked]
        if not len(right):
            return {"masked_accuracy": float("nan"), "most_frequent_token_accuracy": float("nan")}
        constant = DummyClassifier(strategy="most_frequent").fit(right, right)
        return {
            "masked_accuracy": float(accuracy_score(right, found)),
            "most_frequent_token_accuracy": float(constant.score(right, right)),
        }
