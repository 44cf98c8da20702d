"""Are the presets the published models, and unknown names refused helpfully?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_mics.errors import ConfigError
from hf_mics.presets import PRESETS, find_preset, load_model_config

AUTO_MODELS = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}
# Of the hub's gpt2, bert-base-uncased and bert-large-uncased checkpoints, language modelling heads included.
PUBLISHED_PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "bert-base": 109_514_298,
    "bert-large": 335_174_458,
}
# The models of the MiCS evaluation: h, ffn, layers, vocabulary, and the size in their names.
GIGANTIC = {
    "gpt-20b": (5120, 20480, 62, 50265, 20e9),
    "bert-10b": (2560, 10240, 127, 32008, 10e9),
    "bert-15b": (2560, 10240, 190, 32008, 15e9),
    "bert-20b": (5120, 20480, 64, 32008, 20e9),
    "bert-50b": (8192, 32768, 62, 32008, 50e9),
    "roberta-20b": (5120, 20480, 62, 50265, 20e9),
}


@pytest.mark.parametrize("name", PRESETS)
def test_closed_form_counts_the_parameters_that_transformers_builds(name: str):
    preset = find_preset(name)
    with torch.device("meta"):
        model = AUTO_MODELS[preset.task].from_config(preset.config())
    assert model.num_parameters() == preset.num_parameters


@pytest.mark.parametrize(("name", "num_parameters"), PUBLISHED_PARAMETERS.items())
def test_sizes_are_the_published_ones(name: str, num_parameters: int):
    assert find_preset(name).num_parameters == num_parameters


@pytest.mark.parametrize("name", GIGANTIC)
def test_gigantic_presets_are_the_models_of_the_mics_evaluation(name: str):
    preset = find_preset(name)
    h, ffn, num_layers, vocab_size, size = GIGANTIC[name]
    published = num_layers * (4 * h**2 + 2 * h * ffn) + vocab_size * h  # without positions, biases, norms and the head
    # Those are at most 1024 h for positions, 13 h a layer, and h^2 for BERT's head: together below 0.2 % of the whole.
    assert preset.num_parameters == pytest.approx(published, rel=2e-3)
    assert preset.num_parameters > published
    assert preset.num_parameters == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_heads_divide_the_width(name: str):
    preset = find_preset(name)
    assert preset.hidden_size % preset.num_heads == 0


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("gpt2-meduim", "gpt2-medium"), ("gpt_20b", "gpt-20b"), ("bert-tinny", "bert-tiny"), ("roberta", "roberta-20b")],
)
def test_unknown_preset_names_the_nearest(wrong: str, near: str):
    with pytest.raises(ConfigError, match=f"got {wrong!r}. Did you mean .*{near!r}"):
        find_preset(wrong)


def test_preset_for_another_task_is_refused():
    with pytest.raises(ConfigError, match=r"expected one of bert-tiny, .*, got 'gpt2'"):
        find_preset("gpt2", "masked")


@pytest.mark.parametrize("name", ["gpt-tiny", "bert-tiny"])
def test_saved_configuration_loads(name: str, tmp_path: Path):
    config = find_preset(name).config()
    config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        assert load_model_config(str(path)).to_diff_dict() == config.to_diff_dict()


def test_missing_configuration_is_refused():
    with pytest.raises(ConfigError, match=r"no model configuration: .*/no/such"):
        load_model_config("/no/such")
