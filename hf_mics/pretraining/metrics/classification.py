"""How many rows does a classifier get right, and how good is it when every class counts the same, rare ones too?

An `evaluate` metric that needs no hub: accuracy and macro F1. Beside them stands what knowing nothing of the rows would
reach. `evaluate` copies this file to its own cache and imports it from there, so it imports nothing of hf_mics.
"""

from __future__ import annotations

import datasets
import evaluate
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, f1_score

_DESCRIPTION = "Accuracy and macro F1 of a classifier, beside those of always answering the most frequent class."
_INPUTS = """
Args:
    predictions, references: the predicted and the right class of every row.
Returns:
    accuracy: share of the rows that are predicted right.
    f1_macro: F1, 2 x precision x recall / (precision + recall), of each class that occurs, averaged over the classes; 0
        for a class that is never predicted right.
    majority_class_accuracy, majority_class_f1_macro: the same for the most frequent class as the answer to everything.
"""


class Classification(evaluate.Metric):
    """Right answers / rows, and the mean of F1 over classes."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        constant = DummyClassifier(strategy="most_frequent").fit(references, references).predict(references)
        return {
            f"{prefix}{name}": float(score)
            for prefix, answers in (("", predictions), ("majority_class_", constant))
            for name, score in (
                ("accuracy", accuracy_score(references, answers)),
                ("f1_macro", f1_score(references, answers, average="macro", zero_division=0)),
            )
        }
