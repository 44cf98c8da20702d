"""How many rows does a classifier get right? An `evaluate` metric that needs no hub.

Beside it stands what knowing nothing of the rows would reach. `evaluate` copies this file to its own cache and imports
it from there, so it imports nothing of hf_mics.
"""

from __future__ import annotations

import datasets
import evaluate
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score

_DESCRIPTION = "Accuracy of a classifier, beside that of always answering the most frequent class."
_INPUTS = """
Args:
    predictions, references: the predicted and the right class of every row.
Returns:
    accuracy: share of the rows that are predicted right.
    majority_class_accuracy: the same for the best answer that never changes.
"""


class Accuracy(evaluate.Metric):
    """Right answers / rows."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        constant = DummyClassifier(strategy="most_frequent").fit(references, references)
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "majority_class_accuracy": float(constant.score(references, references)),
        }
