"""How good is a classifier when every class counts the same, rare ones too? An `evaluate` metric that needs no hub.

Beside it stands what knowing nothing of the rows would reach. `evaluate` copies this file to its own cache and imports
it from there, so it imports nothing of hf_mics.
"""

from __future__ import annotations

import datasets
import evaluate
from sklearn.dummy import DummyClassifier
from sklearn.metrics import f1_score

_DESCRIPTION = "Macro F1 of a classifier, beside that of always answering the most frequent class."
_INPUTS = """
Args:
    predictions, references: the predicted and the right class of every row.
Returns:
    f1_macro: F1 of each class that occurs, averaged over the classes; 0 for a class that is never predicted right.
    majority_class_f1_macro: the same for the most frequent class as the answer to everything.
"""


class F1(evaluate.Metric):
    """Mean over classes of 2 x precision x recall / (precision + recall)."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        constant = DummyClassifier(strategy="most_frequent").fit(references, references).predict(references)
        return {
            "f1_macro": float(f1_score(references, predictions, average="macro", zero_division=0)),
            "majority_class_f1_macro": float(f1_score(references, constant, average="macro", zero_division=0)),
        }
