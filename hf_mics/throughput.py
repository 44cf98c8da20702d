"""How fast is a training step, in tokens and in model FLOPS?

Values and arithmetic. "Model FLOPS" are those that the mathematics needs (forward and backward), whatever the program
really does: recomputed activations and padding do not count, so the utilization never flatters.
"""

from __future__ import annotations

# Dense peaks of the matrix units in 16-bit floats, in FLOP per second, from the vendors' data sheets (no sparsity).
# The order matters: the first name found in the device's own name wins.
PEAK_FLOPS_PER_S: dict[str, float] = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIE": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "V100": 125e12,
}


def peak_flops_per_s(device_name: str) -> float | None:
    """Returns the dense 16-bit peak of a device in FLOP/s, or None where it is not known (every CPU, for one)."""
    return next((peak for name, peak in PEAK_FLOPS_PER_S.items() if name in device_name.upper()), None)


def local_peak_flops_per_s() -> float | None:
    """Returns the dense 16-bit peak of this process's own accelerator in FLOP/s, or None where it is not known."""
    import torch

    return peak_flops_per_s(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def flops_per_token(num_parameters: float, num_layers: int, hidden_size: int, sequence_length: float) -> float:
    """Returns the model FLOP that training spends on one token: 6 N + 12 L h s (PaLM, arXiv 2204.02311, appendix B).

    Not modelled: norms, activations, softmax, the optimizer, the causal mask (attention counts as if it were full),
    and that looking up an embedding costs nothing (right with tied embeddings, which are used once as a matrix).

    Args:
        num_parameters: N, of the whole model, tied ones counted once.
        num_layers: L. `hidden_size`: h, heads times head width. `sequence_length`: s, in tokens.
    """
    return 6.0 * num_parameters + 12.0 * num_layers * hidden_size * sequence_length


def throughput_metrics(
    num_tokens: float, seconds: float, flops_per_token: float, num_devices: int, peak_flops_per_s: float | None = None
) -> dict[str, float]:
    """Returns what a log wants to show of `num_tokens` trained on by `num_devices` together in `seconds`.

    Args:
        peak_flops_per_s: of one device; by default that of this process's own.

    Returns:
        tokens_per_s (all devices), tokens_per_s_per_device and, where the peak is known,
        model_flops_utilization_percent.
    """
    tokens_per_s = num_tokens / seconds
    metrics = {"tokens_per_s": tokens_per_s, "tokens_per_s_per_device": tokens_per_s / num_devices}
    peak = peak_flops_per_s or local_peak_flops_per_s()
    if peak:
        metrics["model_flops_utilization_percent"] = 100.0 * tokens_per_s * flops_per_token / (num_devices * peak)
    return metrics
