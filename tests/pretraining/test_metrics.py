"""Do the metric modules load without the hub and compute what numpy does?"""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_mics.errors import ConfigError
from hf_mics.pretraining.metrics import load_metric


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_perplexity_is_the_exponential_of_the_mean_over_tokens_not_batches():
    rng = np.random.default_rng(0)
    batches = [rng.exponential(3.0, size=size) for size in (17, 1, 250, 8)]  # token losses, uneven batches
    metric = load_metric("perplexity")
    for losses in batches:
        metric.add_batch(loss_nats_per_token=[losses.mean()], num_tokens=[len(losses)])
    result = metric.compute()
    expected = np.concatenate(batches).mean()
    # Sums of 276 float64 in another order: relative error below 276 * 2^-53, which is 3e-14.
    assert result["loss_nats_per_token"] == pytest.approx(expected, rel=1e-13)
    assert result["perplexity"] == pytest.approx(np.exp(expected), rel=1e-12)


def test_compute_starts_afresh_so_that_evaluations_do_not_mix():
    metric = load_metric("perplexity")
    metric.add_batch(loss_nats_per_token=[9.0], num_tokens=[5])
    metric.compute()
    metric.add_batch(loss_nats_per_token=[2.0, 4.0], num_tokens=[3, 3])
    assert metric.compute()["loss_nats_per_token"] == 3.0


def test_uniform_guessing_has_the_vocabulary_as_perplexity():
    metric = load_metric("perplexity")
    metric.add_batch(loss_nats_per_token=[math.log(2048)], num_tokens=[127])
    assert metric.compute()["perplexity"] == pytest.approx(2048, rel=1e-12)


def test_diverged_model_gives_infinity_and_not_an_exception():
    metric = load_metric("perplexity")
    metric.add_batch(loss_nats_per_token=[1e4], num_tokens=[1])
    assert metric.compute()["perplexity"] == math.inf


def test_masked_accuracy_counts_masked_places_only():
    metric = load_metric("masked_accuracy")
    result = metric.compute(predictions=[5, 7, 9, 9, 1], references=[5, -100, 9, 5, 5])
    assert result == {"masked_accuracy": 0.5, "most_frequent_token_accuracy": 0.75}


def test_masked_accuracy_of_nothing_masked_is_not_a_number():
    result = load_metric("masked_accuracy").compute(predictions=[5, 7], references=[-100, -100])
    assert all(math.isnan(value) for value in result.values())


def test_accuracy_and_f1_beside_the_majority_class():
    predictions, references = [0, 0, 1, 1, 2, 0], [0, 0, 1, 0, 1, 2]
    result = load_metric("classification").compute(predictions=predictions, references=references)
    assert (result["accuracy"], result["majority_class_accuracy"]) == (0.5, 0.5)
    # By hand, precision and recall: class 0 has 2/3 and 2/3, class 1 has 1/2 and 1/2, class 2 none.
    assert result["f1_macro"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3, rel=1e-12)
    # Always class 0: precision 1/2, recall 1.
    assert result["majority_class_f1_macro"] == pytest.approx((2 / 3) / 3, rel=1e-12)


def test_a_class_that_is_never_right_pulls_f1_down_but_hardly_accuracy():
    predictions, references = [0] * 99 + [0], [0] * 99 + [1]
    result = load_metric("classification").compute(predictions=predictions, references=references)
    assert result["accuracy"] == 0.99
    assert result["f1_macro"] < 0.5


def test_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"one of classification, masked_accuracy, perplexity, got 'rouge'"):
        load_metric("rouge")
