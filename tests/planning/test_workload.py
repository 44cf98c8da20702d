"""Are parameters and communication units those of the real transformers models, tensor by tensor?"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from hf_mics.errors import ConfigError
from hf_mics.planning.workload import ModelShape, Workload
from hf_mics.wrapping import plan_units

SIZES: dict[str, Any] = {
    "name": "odd",
    "num_layers": 3,
    "hidden_size": 15,
    "ffn_size": 37,
    "num_heads": 3,
    "vocab_size": 61,
}
GPT = {"n_embd": 15, "n_layer": 3, "n_head": 3, "n_inner": 37, "vocab_size": 61, "n_positions": 17}
BERT = {
    "hidden_size": 15, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 37, "vocab_size": 61,
    "max_position_embeddings": 17,
}  # fmt: skip
LLAMA = BERT | {"num_key_value_heads": 1, "head_dim": 4, "num_attention_heads": 3}
T5 = {"d_model": 15, "d_kv": 4, "d_ff": 37, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 3, "vocab_size": 61}
GROUPED = {"family": "llama", "context_length": 17, "num_kv_heads": 1, "head_dim": 4}

CASES: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {
    "gpt2": (AutoModelForCausalLM, "gpt2", GPT, {"family": "gpt", "context_length": 17}),
    "gpt2 untied": (
        AutoModelForCausalLM,
        "gpt2",
        GPT | {"tie_word_embeddings": False},
        {"family": "gpt", "context_length": 17, "tied_embeddings": False},
    ),
    "bert": (AutoModelForMaskedLM, "bert", BERT, {"family": "bert", "context_length": 17}),
    "llama": (
        AutoModelForCausalLM,
        "llama",
        LLAMA | {"tie_word_embeddings": False},
        GROUPED | {"tied_embeddings": False},
    ),
    "llama tied": (AutoModelForCausalLM, "llama", LLAMA | {"tie_word_embeddings": True}, GROUPED),
    "mistral": (
        AutoModelForCausalLM,
        "mistral",
        LLAMA | {"tie_word_embeddings": False},
        GROUPED | {"tied_embeddings": False},
    ),
    "qwen2": (AutoModelForCausalLM, "qwen2", LLAMA | {"tie_word_embeddings": True}, GROUPED | {"qkv_bias": True}),
    "qwen3": (
        AutoModelForCausalLM,
        "qwen3",
        LLAMA | {"tie_word_embeddings": False},
        GROUPED | {"qk_norm": True, "tied_embeddings": False},
    ),
    "t5": (
        AutoModelForSeq2SeqLM,
        "t5",
        T5,
        {"family": "t5", "context_length": 512, "num_decoder_layers": 2, "head_dim": 4},
    ),
    "t5 gated": (
        AutoModelForSeq2SeqLM,
        "t5",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {
            "family": "t5",
            "context_length": 512,
            "num_decoder_layers": 2,
            "head_dim": 4,
            "gated_ffn": True,
            "tied_embeddings": False,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_units_are_those_of_the_real_model_and_hold_the_same_tensors(case: str):
    loader, model_type, settings, shape = CASES[case]
    model = loader.from_config(AutoConfig.for_model(model_type, **settings))
    plan = plan_units(model)
    wrapped = {name: kind for kind in ("layers", "embeddings", "heads") for name, _ in getattr(plan, kind)}
    expected: dict[str, list[tuple[int, int]]] = {name: [] for name in wrapped} | {"": []}
    for name, parameter in model.named_parameters():
        unit = next((u for u in wrapped if name.startswith(u + ".")), "")
        expected[unit].append((parameter.shape[0], parameter[0].numel()))
    planned = ModelShape(**(SIZES | shape))
    assert {u.name: sorted(u.matrices) for u in planned.units} == {n: sorted(m) for n, m in expected.items()}
    assert planned.num_parameters == sum(p.numel() for p in model.parameters())
    kinds = {"layers": "layer", "embeddings": "embedding", "heads": "head"}
    assert {u.name: u.kind for u in planned.units if u.name} == {name: kinds[kind] for name, kind in wrapped.items()}


def test_shards_are_padded_row_by_row():
    """61 rows over 4 ranks: 16 each, 64 in all; 15 rows: 16."""
    unit = ModelShape(**(SIZES | {"family": "llama", "context_length": 8})).units[0]
    assert unit.matrices == ((61, 15), (15, 1))
    assert unit.padded_numel(4) == 64 * 15 + 16
    assert unit.padded_numel(1) == unit.num_parameters == 61 * 15 + 15


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 0}, "num_layers must be a positive integer, got 0"),
        ({"num_heads": 4}, r"num_heads must divide hidden_size, got 15 = 3 x 4 \+ 3"),
        ({"num_kv_heads": 2}, "num_kv_heads must divide num_heads"),
        ({"family": "mamba"}, "family must be one of gpt, bert, llama, t5"),
        ({"family": "bert", "tied_embeddings": False}, "tied embeddings only"),
        ({"family": "t5"}, "num_decoder_layers must be a positive integer"),
    ],
)
def test_shapes_that_no_model_has_are_refused(change: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        ModelShape(**(SIZES | {"family": "gpt", "context_length": 17} | change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seq_length": 18}, "context of 17 tokens, got 18"),
        ({"micro_batch": -1}, "micro_batch must be a positive integer, got -1"),
        ({"accumulation": 1.5}, "accumulation must be a positive integer, got 1.5"),
        ({"precision": "int8"}, "precision must be one of bf16, fp16, fp32, got 'int8'"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
    ],
)
def test_steps_that_cannot_run_are_refused(change: dict[str, Any], words: str):
    model = ModelShape(**(SIZES | {"family": "gpt", "context_length": 17}))
    with pytest.raises(ConfigError, match=words):
        Workload(**({"model": model, "seq_length": 17} | change))
