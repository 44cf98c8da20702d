"""Are model FLOPS counted as published?"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_mics.throughput import flops_per_token, peak_flops_per_s, throughput_metrics
from hf_mics.training_meter import _model_shape


def test_utilization_reproduces_a_published_figure():
    """Amazon's 175B model: 169 TFLOPS per A100 is reported as 54.2 % of the peak of 312."""
    flops = flops_per_token(175_000_000_000, 96, 12288, 2048)
    tokens_per_s = 128 * 169e12 / flops
    metrics = throughput_metrics(tokens_per_s * 10, 10.0, flops, 128, peak_flops_per_s("NVIDIA A100-SXM4-80GB"))
    assert metrics["tokens_per_s"] == pytest.approx(tokens_per_s)
    assert metrics["tokens_per_s_per_device"] == pytest.approx(tokens_per_s / 128)
    assert metrics["model_flops_utilization_percent"] == pytest.approx(54.2, abs=0.05)  # as rounded there


def test_flops_per_token_is_six_per_parameter_and_the_attention():
    assert flops_per_token(10, 2, 3, 5) == 6 * 10 + 12 * 2 * 3 * 5


def test_a_frozen_weight_counts_two_thirds_because_it_has_no_gradient_of_its_own():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 5, bias=False))
    model[0].requires_grad_(False)
    for config in ({}, {"num_hidden_layers": 2}, {"num_hidden_layers": 2, "hidden_size": [4, 8]}, {"hidden_size": 4}):
        model.config = SimpleNamespace(**config)
        assert _model_shape(model) is None
    model.config = SimpleNamespace(num_hidden_layers=2, hidden_size=4)
    assert _model_shape(model) == (20 + 12 * 2 / 3, 2, 4)


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_peaks_are_those_of_the_data_sheets(device: str, tflops: int):
    assert peak_flops_per_s(device) == tflops * 1e12


def test_unknown_device_has_no_peak_and_so_no_utilization():
    assert peak_flops_per_s("AMD EPYC 7R13") is None
    assert set(throughput_metrics(100, 2.0, 6.0, 4, peak_flops_per_s=None)) >= {"tokens_per_s"}
