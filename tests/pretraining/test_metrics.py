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


def test_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"one of perplexity.*got 'rouge'"):
        load_metric("rouge")
