"""Which model shapes can be had by name?

Pure values: nothing here imports torch or transformers until a configuration is asked for. GPT-2, BERT base and large
are the published shapes, and so are Llama 3's 8B and 70B. `gpt-20b`, `bert-10b` to `bert-50b` and `roberta-20b` are
those that reproduce the sizes named in the MiCS evaluation; `gpt-100b` and `gpt-175b` are those of its largest runs
(hidden 10240 and 12288, 80 and 96 layers). Learning rates of GPT models are the peak values of the GPT-3 paper (arXiv
2005.14165, table 2.1) for models of that size, those of BERT models that of the BERT paper (arXiv 1810.04805, appendix
A.2), those of Llama models that of the Llama 3 paper (arXiv 2407.21783, table 3). The tiny models are this
repository's own: docs/recipes.md and docs/measurements.md report what the recipes reach with them and their rates.

A family is a subclass of `Preset` that knows its parameter count in closed form and its transformers configuration; a
model is an entry of `PRESETS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from hf_mics.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Task: TypeAlias = Literal["causal", "masked"]


@dataclass(frozen=True, kw_only=True)
class Preset(ABC):
    """The shape of a transformer in the terms that all families share, its embeddings tied unless a family says so.

    Args:
        hidden_size: width of the residual stream (h).
        ffn_size: width of the feed-forward layer, usually 4 h.
        num_layers: transformer blocks (L).
        num_heads: attention heads, dividing `hidden_size`.
        vocab_size: token embeddings (V).
        context_length: the longest sequence (s), in tokens.
        learning_rate: peak learning rate of AdamW that suits this size.
        initializer_range: standard deviation of the initial weights, 0.02 in GPT-2 and BERT. The tiny models have
            0.05, near sqrt(2 / 5h) (SmallInit, arXiv 1910.05895): 0.02 at h = 1000, 0.056 at h = 128.
    """

    task: ClassVar[Task]
    """What the model predicts: the next token, or masked ones."""

    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    context_length: int
    learning_rate: float
    initializer_range: float = 0.02

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Parameters in closed form, tied ones counted once."""

    @abstractmethod
    def config(self) -> PretrainedConfig:
        """Builds the transformers configuration: without dropout, which pretraining for a few epochs does not want."""

    @property
    def _block_parameters(self) -> int:
        """Of a GPT-2 or BERT block: 4h^2 + 2h ffn, with 9h + ffn for biases and two norms."""
        h, ffn = self.hidden_size, self.ffn_size
        return 4 * h * h + 2 * h * ffn + 9 * h + ffn


class GPTPreset(Preset):
    """A GPT-2 style decoder."""

    task = "causal"

    @property
    def num_parameters(self) -> int:
        """Embeddings, positions, blocks, a final norm."""
        embeddings = (self.vocab_size + self.context_length) * self.hidden_size
        return embeddings + self.num_layers * self._block_parameters + 2 * self.hidden_size

    def config(self) -> PretrainedConfig:
        """Builds a `GPT2Config`."""
        from transformers import GPT2Config

        return GPT2Config(
            vocab_size=self.vocab_size,
            n_positions=self.context_length,
            n_embd=self.hidden_size,
            n_layer=self.num_layers,
            n_head=self.num_heads,
            n_inner=self.ffn_size,
            initializer_range=self.initializer_range,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            # The tokenizer's, not GPT-2's: set when there is one.
            bos_token_id=None,
            eos_token_id=None,
        )


class BERTPreset(Preset):
    """A BERT encoder with its head for masked tokens (and no pooler)."""

    task = "masked"
    spare_positions: ClassVar[int] = 0
    token_types: ClassVar[int] = 2

    @property
    def num_parameters(self) -> int:
        """Embeddings (tokens, positions, token types, norm), blocks, and the head: h^2 + 3h and a bias per token."""
        h = self.hidden_size
        rows = self.vocab_size + self.context_length + self.spare_positions + self.token_types + 2
        return rows * h + self.num_layers * self._block_parameters + h * h + 3 * h + self.vocab_size

    def config(self) -> PretrainedConfig:
        """Builds a `BertConfig`."""
        from transformers import BertConfig

        return BertConfig(**self._settings())

    def _settings(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length + self.spare_positions,
            "type_vocab_size": self.token_types,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.ffn_size,
            "initializer_range": self.initializer_range,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }


class RobertaPreset(BERTPreset):
    """The same with RoBERTa's embeddings: one token type, and positions that start after that of padding (1)."""

    spare_positions = 2
    token_types = 1

    def config(self) -> PretrainedConfig:
        """Builds a `RobertaConfig`."""
        from transformers import RobertaConfig

        return RobertaConfig(**self._settings())


@dataclass(frozen=True, kw_only=True)
class LlamaPreset(Preset):
    """A Llama style decoder, its embeddings and head untied, its queries sharing keys and values in groups.

    Args:
        num_kv_heads: key and value heads, dividing `num_heads`.
    """

    task = "causal"
    num_kv_heads: int

    @property
    def num_parameters(self) -> int:
        """Embeddings and head, blocks of 2h^2 + 2h h_kv + 3h ffn + 2h, a final norm."""
        h = self.hidden_size
        kv = h // self.num_heads * self.num_kv_heads
        block = 2 * h * h + 2 * h * kv + 3 * h * self.ffn_size + 2 * h
        return 2 * self.vocab_size * h + self.num_layers * block + h

    def config(self) -> PretrainedConfig:
        """Builds a `LlamaConfig`."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab_size,
            max_position_embeddings=self.context_length,
            hidden_size=self.hidden_size,
            intermediate_size=self.ffn_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            initializer_range=self.initializer_range,
            tie_word_embeddings=False,
            # The tokenizer's: set when there is one.
            bos_token_id=None,
            eos_token_id=None,
        )


def _gpt2(
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    vocab_size: int,
    learning_rate: float,
    context_length: int = 1024,
) -> GPTPreset:
    return GPTPreset(
        hidden_size=hidden_size,
        ffn_size=4 * hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        vocab_size=vocab_size,
        context_length=context_length,
        learning_rate=learning_rate,
    )


def _bert(
    hidden_size: int, num_layers: int, num_heads: int, vocab_size: int, family: type[BERTPreset] = BERTPreset
) -> BERTPreset:
    return family(
        hidden_size=hidden_size,
        ffn_size=4 * hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        vocab_size=vocab_size,
        context_length=512,
        learning_rate=1e-4,
    )


def _llama(hidden_size: int, ffn_size: int, num_layers: int, num_heads: int, learning_rate: float) -> LlamaPreset:
    return LlamaPreset(
        hidden_size=hidden_size,
        ffn_size=ffn_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        vocab_size=128256,
        context_length=8192,
        learning_rate=learning_rate,
    )


PRESETS: dict[str, Preset] = {
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
    "gpt-100b": _gpt2(10240, 80, 80, 50265, 6e-5, 2048),
    "gpt-175b": _gpt2(12288, 96, 96, 50265, 6e-5, 2048),
    "bert-tiny": BERTPreset(
        hidden_size=128,
        ffn_size=512,
        num_layers=3,
        num_heads=4,
        vocab_size=1024,
        context_length=128,
        learning_rate=2e-3,
        initializer_range=0.05,
    ),
    "bert-base": _bert(768, 12, 12, 30522),
    "bert-large": _bert(1024, 24, 16, 30522),
    "bert-10b": _bert(2560, 127, 40, 32008),
    "bert-15b": _bert(2560, 190, 40, 32008),
    "bert-20b": _bert(5120, 64, 40, 32008),
    "bert-50b": _bert(8192, 62, 64, 32008),
    "roberta-20b": _bert(5120, 62, 40, 50265, RobertaPreset),
    "llama-8b": _llama(4096, 14336, 32, 32, 3e-4),
    "llama-70b": _llama(8192, 28672, 80, 64, 1.5e-4),
}


def find_preset(name: str, task: Task | None = None) -> Preset:
    """Returns the preset called `name`; of those for one task only, if `task` is given.

    Raises:
        ConfigError: there is none; the message holds the nearest names.
    """
    names = [known for known, preset in PRESETS.items() if task in (None, preset.task)]
    if name in names:
        return PRESETS[name]
    raise ConfigError(
        f"unknown model preset: expected one of {', '.join(names)}, got {name!r}.{did_you_mean(name, names)} "
        "For any other shape pass a transformers configuration with --model_config."
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
            f"no model configuration: expected a config.json, a folder with one or a name on the Hugging Face hub, got "
            f"{name_or_path!r}. Correct it, or take a preset: {', '.join(PRESETS)}. Cause: {error}"
        ) from None
