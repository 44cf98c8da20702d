"""What is to be trained: the model's parameters, unit by unit, and the sizes of a training step?

Values and exact counts; nothing here knows about GPUs. A *unit* is what is gathered and reduced together: the same
ones that `hf_mics.wrapping` chooses for the transformers models of the four families.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

from hf_mics.errors import ConfigError

Family = Literal["gpt", "bert", "llama", "t5"]
Precision = Literal["bf16", "fp16", "fp32"]
OptimizerName = Literal["adamw", "sgd-momentum", "sgd"]
UnitKind = Literal["root", "embedding", "layer", "head"]

# Beyond these no plan means anything: a plan walks every layer, and computes in floats, which are exact up to 2^53.
_MOST_LAYERS = 10_000
_LARGEST = 2**53

Matrix = tuple[int, int]
"""A parameter as (first dimension, elements per row); FSDP2 cuts the first dimension. Vectors have rows of 1."""


@dataclass(frozen=True)
class Unit:
    """One communication unit.

    Args:
        name: the module's name in the transformers model; "" is the root.
        kind: what it is; decides when it is freed.
        matrices: every parameter once, tied ones too.
    """

    name: str
    kind: UnitKind
    matrices: tuple[Matrix, ...]

    @cached_property
    def num_parameters(self) -> int:
        """Parameters, unpadded."""
        return sum(rows * columns for rows, columns in self.matrices)

    def padded_numel(self, partition_size: int) -> int:
        """Elements of all shards together, each parameter's first dimension padded to a multiple of the group."""
        p = partition_size
        return sum(-(-rows // p) * p * columns for rows, columns in self.matrices)

    @property
    def frees_after_forward(self) -> bool:
        """Whether parameters are gathered a second time for backward; root and head stay gathered in between."""
        return self.kind in ("layer", "embedding")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The shape of a transformer as transformers 5 builds it, with a head over the vocabulary.

    Args:
        name: as the user wrote it.
        family: "gpt" (GPT-2's layout), "bert" (RoBERTa too; with the masked-language head), "llama" (Llama, Mistral,
            Qwen) or "t5".
        num_layers: transformer layers (L); of T5, those of the encoder.
        spare_positions: learned positions beyond the context (RoBERTa has 2).
        num_decoder_layers: T5's decoder; 0 otherwise.
        hidden_size: width of the residual stream (h).
        ffn_size: width of the feed-forward layer.
        num_heads: attention heads. `num_kv_heads`: key and value heads, default as many. `head_dim`: default
            hidden_size / num_heads.
        vocab_size: token embeddings (V).
        context_length: tokens that the model can read; learned positions in gpt and bert.
        tied_embeddings: whether the head reads the embedding's weight.
        gated_ffn: a third feed-forward matrix in T5 (since 1.1); Llama always has it.
        qkv_bias: biases of the query, key and value projections in llama-like models (Qwen 2).
        qk_norm: norms of queries and keys (Qwen 3).
        type_vocab_size: BERT's segment embeddings. `relative_buckets`: T5's position buckets.

    Raises:
        ConfigError: a size that is not a positive integer, or heads that do not fit.
    """

    name: str
    family: Family
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    vocab_size: int
    context_length: int
    spare_positions: int = 0
    num_decoder_layers: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    tied_embeddings: bool = True
    gated_ffn: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    type_vocab_size: int = 2
    relative_buckets: int = 32

    def __post_init__(self) -> None:
        if self.family not in get_args(Family):
            raise ConfigError(f"family must be one of {', '.join(get_args(Family))}, got {self.family!r}.")
        sizes = ["num_layers", "hidden_size", "ffn_size", "num_heads", "vocab_size", "context_length"]
        sizes += ["num_decoder_layers"] if self.family == "t5" else []
        for field in sizes:
            require_count(f"{self.name}: {field}", getattr(self, field))
        if self.total_layers > _MOST_LAYERS:
            raise ConfigError(f"{self.name}: plans are made for up to {_MOST_LAYERS} layers, got {self.total_layers}.")
        if self.family in ("bert", "t5") and not self.tied_embeddings:
            # transformers 5 ties T5's head whatever its config says.
            raise ConfigError(f"{self.name}: a {self.family} model is planned with tied embeddings only.")
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise ConfigError(
                    f"{self.name}: num_heads must divide hidden_size, got {self.hidden_size} = "
                    f"{self.hidden_size // self.num_heads} x {self.num_heads} + {self.hidden_size % self.num_heads}."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        require_count(f"{self.name}: head_dim", self.head_dim)
        require_count(f"{self.name}: num_kv_heads", self.num_kv_heads)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.name}: num_kv_heads must divide num_heads, got {self.num_heads} and {self.num_kv_heads}."
            )

    @property
    def total_layers(self) -> int:
        """Transformer layers, encoder and decoder together."""
        return self.num_layers + self.num_decoder_layers

    @property
    def attention_width(self) -> int:
        """Elements of all query heads of one token."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of all key heads of one token."""
        return self.num_kv_heads * self.head_dim

    @cached_property
    def num_parameters(self) -> int:
        """Exact count, tied parameters once."""
        return sum(unit.num_parameters for unit in self.units)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The communication units in the order in which forward gathers them."""
        return {"gpt": _gpt, "bert": _bert, "llama": _llama, "t5": _t5}[self.family](self)

    def with_layers(self, num_layers: int) -> ModelShape:
        """The same model with another depth; of T5, encoder and decoder are both set."""
        return replace(self, num_layers=num_layers, num_decoder_layers=num_layers if self.num_decoder_layers else 0)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training run: a model and the sizes of its optimizer step on each GPU.

    Args:
        model: what is trained.
        seq_length: tokens of one sequence; T5 reads and writes as many.
        micro_batch: sequences that one GPU computes at a time.
        accumulation: micro-steps in an optimizer step (s).
        precision: accelerate's mixed precision; "fp32" is none. Parameters and optimizer state are fp32 in any case.
        optimizer: "adamw" keeps two fp32 values per parameter, "sgd-momentum" one, "sgd" none.
        activation_checkpointing: whether layers are recomputed in backward.
        cpu_offload: parameters, gradients and optimizer state live in host memory (accelerate's fsdp_offload_params).

    Raises:
        ConfigError: a size that is not a positive integer, a sequence that the model cannot read, an unknown word.
    """

    model: ModelShape
    seq_length: int
    micro_batch: int = 1
    accumulation: int = 1
    precision: Precision = "bf16"
    optimizer: OptimizerName = "adamw"
    activation_checkpointing: bool = True
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        for field in ("seq_length", "micro_batch", "accumulation"):
            require_count(field, getattr(self, field))
        for field, words in (("precision", get_args(Precision)), ("optimizer", get_args(OptimizerName))):
            if getattr(self, field) not in words:
                raise ConfigError(f"{field} must be one of {', '.join(words)}, got {getattr(self, field)!r}.")
        # T5's positions are relative: it reads sequences of any length.
        if self.model.family != "t5" and self.seq_length > self.model.context_length:
            raise ConfigError(
                f"seq_length must not exceed what the model reads: {self.model.name} has a context of "
                f"{self.model.context_length} tokens, got {self.seq_length}."
            )

    @property
    def tokens_per_micro_step(self) -> int:
        """Tokens that one GPU computes in one micro-step."""
        return self.micro_batch * self.seq_length

    @property
    def compute_bytes(self) -> int:
        """Bytes of one element in computation, in a gather and in a reduce-scatter."""
        return 4 if self.precision == "fp32" else 2


def require_count(name: str, value: object) -> None:
    """Raises ConfigError unless `value` is a positive integer that a float holds exactly."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
    if value > _LARGEST:
        raise ConfigError(f"{name} must be at most 2^53, got {reprlib.repr(value)}.")


def _vectors(*sizes: int) -> tuple[Matrix, ...]:
    return tuple((size, 1) for size in sizes)


def _gpt(m: ModelShape) -> tuple[Unit, ...]:
    h, f, a = m.hidden_size, m.ffn_size, m.attention_width
    # GPT-2's Conv1D holds its weights as (inputs, outputs).
    layer = ((h, 3 * a), (a, h), (h, f), (f, h), *_vectors(3 * a, h, f, h, h, h, h, h))
    layers = [Unit(f"transformer.h.{i}", "layer", layer) for i in range(m.num_layers)]
    table, rest = (m.vocab_size, h), ((m.context_length, h), *_vectors(h, h))
    if m.tied_embeddings:
        return (Unit("", "root", (table, *rest)), *layers)
    return (Unit("", "root", rest), Unit("transformer.wte", "embedding", (table,)), *layers, _head(m))


def _bert(m: ModelShape) -> tuple[Unit, ...]:
    h, f, a = m.hidden_size, m.ffn_size, m.attention_width
    layer = (*[(a, h)] * 3, (h, a), (f, h), (h, f), *_vectors(a, a, a, h, f, h, h, h, h, h))
    layers = [Unit(f"bert.encoder.layer.{i}", "layer", layer) for i in range(m.num_layers)]
    head = ((h, h), *_vectors(h, h, h, m.vocab_size))
    embeddings = ((m.vocab_size, h), (m.context_length + m.spare_positions, h), (m.type_vocab_size, h), *_vectors(h, h))
    return (Unit("", "root", embeddings + head), *layers)


def _llama(m: ModelShape) -> tuple[Unit, ...]:
    h, f, a, kv = m.hidden_size, m.ffn_size, m.attention_width, m.kv_width
    layer = ((a, h), (kv, h), (kv, h), (h, a), (f, h), (f, h), (h, f), *_vectors(h, h))
    layer += _vectors(a, kv, kv) if m.qkv_bias else ()
    layer += _vectors(m.head_dim, m.head_dim) if m.qk_norm else ()
    layers = [Unit(f"model.layers.{i}", "layer", layer) for i in range(m.num_layers)]
    table = (m.vocab_size, h)
    if m.tied_embeddings:
        return (Unit("", "root", (table, *_vectors(h))), *layers)
    embedding = Unit("model.embed_tokens", "embedding", (table,))
    return (Unit("", "root", _vectors(h)), embedding, *layers, _head(m))


def _t5(m: ModelShape) -> tuple[Unit, ...]:
    h, f, a = m.hidden_size, m.ffn_size, m.attention_width
    attention = (*[(a, h)] * 3, (h, a), *_vectors(h))
    ffn = (*[(f, h)] * (2 if m.gated_ffn else 1), (h, f), *_vectors(h))

    def stack(name: str, depth: int, parts: tuple[Matrix, ...]) -> list[Unit]:
        # The first block of each stack holds the position buckets for all of them.
        first = (*parts, (m.relative_buckets, m.num_heads))
        return [Unit(f"{name}.block.{i}", "layer", parts if i else first) for i in range(depth)]

    encoder = stack("encoder", m.num_layers, attention + ffn)
    decoder = stack("decoder", m.num_decoder_layers, attention + attention + ffn)
    return (Unit("", "root", ((m.vocab_size, h), *_vectors(h, h))), *encoder, *decoder)


def _head(m: ModelShape) -> Unit:
    return Unit("lm_head", "head", ((m.vocab_size, m.hidden_size),))
