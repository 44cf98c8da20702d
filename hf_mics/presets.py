"""Which model shapes can be had by name?

Pure values: nothing here imports torch or transformers until a configuration is asked for. The GPT-2 shapes are the
published ones; `gpt-20b` is the GPT-2 20B of the MiCS evaluation. Learning rates are the peak values that the GPT-3
paper (arXiv 2005.14165, table 2.1) gives for models of that size; that of `gpt-tiny` was found by trying.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_mics.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class GPTPreset:
    """The shape of a GPT-2 style decoder with tied embeddings.

    Args:
        hidden_size: width of the residual stream (h).
        ffn_size: width of the feed-forward layer, usually 4 h.
        num_layers: transformer blocks (L).
        num_heads: attention heads, dividing `hidden_size`.
        vocab_size: token embeddings (V).
        context_length: position embeddings (s), in tokens.
        learning_rate: peak learning rate of AdamW that suits this size.
        initializer_range: standard deviation of the initial weights. GPT-2's 0.02 is right near its own widths; at 128
            a model that starts so small needs twice the steps (perplexity 227 against 115 after 250, tried).
    """

    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    context_length: int
    learning_rate: float
    initializer_range: float = 0.02

    @property
    def num_parameters(self) -> int:
        """Parameters in closed form: embeddings, positions, L blocks of 4h^2 + 2h ffn + 9h + ffn, a final norm."""
        h, ffn = self.hidden_size, self.ffn_size
        block = 4 * h * h + 2 * h * ffn + 9 * h + ffn
        return (self.vocab_size + self.context_length) * h + self.num_layers * block + 2 * h


def _gpt2(hidden_size: int, num_layers: int, num_heads: int, vocab_size: int, learning_rate: float) -> GPTPreset:
    return GPTPreset(
        hidden_size=hidden_size,
        ffn_size=4 * hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        vocab_size=vocab_size,
        context_length=1024,
        learning_rate=learning_rate,
    )


GPT_PRESETS: dict[str, GPTPreset] = {
    "gpt-tiny": GPTPreset(
        hidden_size=128,
        ffn_size=512,
        num_layers=3,
        num_heads=4,
        vocab_size=2048,
        context_length=128,
        learning_rate=4e-3,
        initializer_range=0.05,
    ),
    "gpt2": _gpt2(768, 12, 12, 50257, 6e-4),
    "gpt2-medium": _gpt2(1024, 24, 16, 50257, 3e-4),
    "gpt2-large": _gpt2(1280, 36, 20, 50257, 2.5e-4),
    "gpt2-xl": _gpt2(1600, 48, 25, 50257, 2e-4),
    "gpt-20b": _gpt2(5120, 62, 40, 50265, 1e-4),
}


def find_gpt_preset(name: str) -> GPTPreset:
    """Returns the preset called `name`.

    Raises:
        ConfigError: there is none; the message holds the nearest names.
    """
    if name in GPT_PRESETS:
        return GPT_PRESETS[name]
    near = difflib.get_close_matches(name, GPT_PRESETS, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ConfigError(
        f"Unknown model preset: expected one of {', '.join(GPT_PRESETS)}, got {name!r}. {hint}"
        "For any other shape pass a transformers configuration with --model_config."
    )


def gpt_config(name: str) -> PretrainedConfig:
    """Builds the transformers configuration of the preset called `name`.

    Returns:
        A `GPT2Config` without dropout, which pretraining on less than a few epochs does not want.

    Raises:
        ConfigError: unknown preset.
    """
    from transformers import GPT2Config

    preset = find_gpt_preset(name)
    return GPT2Config(
        vocab_size=preset.vocab_size,
        n_positions=preset.context_length,
        n_embd=preset.hidden_size,
        n_layer=preset.num_layers,
        n_head=preset.num_heads,
        n_inner=preset.ffn_size,
        initializer_range=preset.initializer_range,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        # The tokenizer's, not GPT-2's: set when there is one.
        bos_token_id=None,
        eos_token_id=None,
    )


def load_model_config(name_or_path: str) -> PretrainedConfig:
    """Loads a transformers configuration: a config.json, a folder that holds one, or a name on the hub.

    Raises:
        ConfigError: it is none of these.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"No model configuration: expected a config.json, a folder with one or a name on the Hugging Face hub, got "
            f"{name_or_path!r}. Correct it, or take a preset: {', '.join(GPT_PRESETS)}. Cause: {error}"
        ) from None
