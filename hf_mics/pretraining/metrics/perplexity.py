"""What is the perplexity of a language model, given its losses? An `evaluate` metric that needs no hub.

Unlike the hub's metric of that name it runs no model: it takes the losses that an evaluation loop has anyway, batch by
batch, and weighs each by the tokens it stands for. `evaluate` copies this file to its own cache and imports it from
there, so it imports nothing of hf_mics.
"""

from __future__ import annotations

import math

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Perplexity and mean loss of a language model from mean losses and the token counts behind them."
_INPUTS = """
Args:
    loss_nats_per_token: mean cross-entropy of a sequence (or batch) over its predicted tokens, natural logarithm.
    num_tokens: how many predicted tokens that mean was taken over.
Returns:
    loss_nats_per_token: mean over all tokens. perplexity: its exponential; infinite where that overflows.
"""


class Perplexity(evaluate.Metric):
    """exp(sum of token losses / number of tokens)."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"loss_nats_per_token": datasets.Value("float64"), "num_tokens": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(features)
        )

    def _compute(self, loss_nats_per_token: list[float], num_tokens: list[int]) -> dict[str, float]:
        loss = float(np.average(np.asarray(loss_nats_per_token), weights=np.asarray(num_tokens)))
        # exp() of more than 709 raises; a diverged model should be reported, not crash the evaluation.
        return {"loss_nats_per_token": loss, "perplexity": math.exp(loss) if loss < 709 else math.inf}
