"""Are parameters and communication units those of the real transformers models, tensor by tensor?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from hf_mics.errors import ConfigError
from hf_mics.planning.models import find_model, shape_of_config
from hf_mics.planning.workload import ModelShape, Workload
from hf_mics.presets import PRESETS
from hf_mics.wrapping import plan_units

GPT = {"n_embd": 15, "n_layer": 3, "n_head": 3, "n_inner": 37, "vocab_size": 61, "n_positions": 17}
BERT = {"hidden_size": 15, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 37, "vocab_size": 61}
BERT |= {"max_position_embeddings": 17}
LLAMA = BERT | {"num_key_value_heads": 1, "head_dim": 4}
T5 = {"d_model": 15, "d_kv": 4, "d_ff": 37, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 3, "vocab_size": 61}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "gpt2": (AutoModelForCausalLM, "gpt2", GPT),
    "gpt2, ffn by default": (AutoModelForCausalLM, "gpt2", GPT | {"n_inner": None}),
    "gpt2, untied": (AutoModelForCausalLM, "gpt2", GPT | UNTIED),
    "bert": (AutoModelForMaskedLM, "bert", BERT),
    "roberta": (AutoModelForMaskedLM, "roberta", BERT | {"type_vocab_size": 1}),
    "llama, untied": (AutoModelForCausalLM, "llama", LLAMA | UNTIED),
    "llama, tied": (AutoModelForCausalLM, "llama", LLAMA | TIED),
    "llama, head_dim by default": (AutoModelForCausalLM, "llama", BERT | {"hidden_size": 18, "num_key_value_heads": 3}),
    "mistral": (AutoModelForCausalLM, "mistral", LLAMA),
    "qwen2": (AutoModelForCausalLM, "qwen2", LLAMA | TIED),
    "qwen3": (AutoModelForCausalLM, "qwen3", LLAMA | UNTIED),
    "t5": (AutoModelForSeq2SeqLM, "t5", T5),
    "t5, gated": (AutoModelForSeq2SeqLM, "t5", T5 | {"feed_forward_proj": "gated-gelu"} | UNTIED),
}
KINDS = {"layers": "layer", "embeddings": "embedding", "heads": "head"}


@pytest.mark.parametrize("case", CASES)
def test_units_are_those_of_the_real_model_and_hold_the_same_tensors(case: str, tmp_path: Path):
    """Through the config.json that save_pretrained writes."""
    loader, model_type, settings = CASES[case]
    model = loader.from_config(AutoConfig.for_model(model_type, **settings))
    model.config.save_pretrained(tmp_path)
    planned = find_model(str(tmp_path))
    wrap = plan_units(model)
    wrapped = {name: KINDS[kind] for kind in KINDS for name, _ in getattr(wrap, kind)}
    expected: dict[str, list[tuple[int, int]]] = {name: [] for name in wrapped} | {"": []}
    for name, parameter in model.named_parameters():
        unit = next((u for u in wrapped if name.startswith(u + ".")), "")
        expected[unit].append((parameter.shape[0], parameter[0].numel()))
    # RoBERTa's layers are named as BERT's but for the first word.
    real = {name.replace("roberta", "bert"): (wrapped.get(name, "root"), sorted(m)) for name, m in expected.items()}
    assert {unit.name: (unit.kind, sorted(unit.matrices)) for unit in planned.units} == real
    assert planned.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_of_their_configuration(name: str):
    preset = PRESETS[name]
    planned = find_model(name)
    assert planned.num_parameters == preset.num_parameters
    assert planned == shape_of_config(preset.config().to_dict(), name)


@pytest.mark.parametrize(("name", "billions"), [("llama-8b", 8.03), ("llama-70b", 70.55), ("gpt-175b", 174.6)])
def test_published_sizes(name: str, billions: float):
    """Llama 3's model cards say 8.03 and 70.6 billion; GPT-3 175B has 174.6 billion (GPT-3 paper, table 2.1)."""
    assert find_model(name).num_parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_large_presets_build_on_meta_with_as_many_parameters():
    for name in ("gpt-175b", "llama-70b"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(PRESETS[name].config())
        assert sum(p.numel() for p in model.parameters()) == find_model(name).num_parameters


def test_shards_are_padded_row_by_row():
    """61 rows over 4 ranks: 16 each, 64 in all; 15 rows: 16."""
    unit = shape_of_config({"model_type": "llama"} | LLAMA | TIED, "odd").units[0]
    assert unit.matrices == ((61, 15), (15, 1))
    assert unit.padded_numel(4) == 64 * 15 + 16
    assert unit.padded_numel(1) == unit.num_parameters == 61 * 15 + 15


SIZES: dict[str, Any] = {"name": "odd", "family": "gpt", "num_layers": 3, "hidden_size": 15, "ffn_size": 37}
SIZES |= {"num_heads": 3, "vocab_size": 61, "context_length": 17}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 0}, "num_layers must be a positive integer, got 0"),
        ({"num_layers": 10**6}, "plans are made for up to 10000 layers, got 1000000"),
        ({"hidden_size": 10**400}, r"hidden_size must be at most 2\^53, got 1000"),
        ({"num_heads": 4}, r"num_heads must divide hidden_size, got 15 = 3 x 4 \+ 3"),
        ({"num_kv_heads": 2}, "num_kv_heads must divide num_heads"),
        ({"family": "mamba"}, "family must be one of gpt, bert, llama, t5"),
        ({"family": "bert", "tied_embeddings": False}, "tied embeddings only"),
        ({"family": "t5"}, "num_decoder_layers must be a positive integer"),
    ],
)
def test_shapes_that_no_model_has_are_refused(change: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        ModelShape(**(SIZES | change))


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
    with pytest.raises(ConfigError, match=words):
        Workload(**({"model": ModelShape(**SIZES), "seq_length": 17} | change))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mamba"}, "plans are made for models of type gpt2, bert, .* got model_type 'mamba'"),
        ({"model_type": "gpt2"} | GPT | {"n_head": "many"}, "n_head must be a positive integer, got 'many'"),
        ({"model_type": "gpt2", "n_embd": 16}, "holds no n_layer, which a gpt2 model needs"),
        ({"model_type": "llama"} | LLAMA | {"attention_bias": True}, "llama models with attention_bias"),
        ({"model_type": "gpt2"} | GPT | {"add_cross_attention": True}, "gpt2 models with add_cross_attention"),
        ({"model_type": "bert"} | BERT | {"add_cross_attention": True}, "bert models with add_cross_attention"),
        ({"model_type": "gpt2"} | GPT | {"tie_word_embeddings": "false"}, "must be true or false, got 'false'"),
        (
            {"model_type": "llama"} | LLAMA | {"tie_word_embeddings": 0},
            "tie_word_embeddings must be true or false, got 0",
        ),
        ({"hidden_size": 3}, "no transformers model configuration: expected an object with a model_type"),
        ([1, 2], "no transformers model configuration"),
    ],
)
def test_configurations_that_are_none_are_refused(config: Any, words: str, tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words):
        find_model(str(file))


def test_names_that_lead_nowhere_are_refused_with_the_nearest_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        find_model(str(tmp_path / "broken.json"))
    with pytest.raises(ConfigError, match=r"no config.json in the folder"):
        find_model(str(tmp_path))
    with pytest.raises(ConfigError, match=r"no model '~nouser/x': .* home directory"):
        find_model("~nouser/x")
    with pytest.raises(ConfigError, match=r"no model 'aaaaaaaaaaaa\.\.\.aaaaaaaaaaaaa': .* File name too long"):
        find_model(5000 * "a")
    with pytest.raises(ConfigError, match="no such file or folder: './absent.json'"):
        find_model("./absent.json")
    with pytest.raises(ConfigError, match=r"Did you mean 'gpt-175b'.*Without network"):
        find_model("gpt-175")
    with pytest.raises(ConfigError, match="could be had from the Hugging Face hub"):
        find_model("somebody/something")
