"""Are the presets the published models, and unknown names refused helpfully?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_mics.errors import ConfigError
from hf_mics.presets import GPT_PRESETS, find_gpt_preset, gpt_config, load_model_config

# Of the hub's gpt2 checkpoints, and the headline sizes of the GPT-2 and MiCS papers.
PUBLISHED_PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", GPT_PRESETS)
def test_closed_form_counts_the_parameters_that_transformers_builds(name: str):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(gpt_config(name))
    assert model.num_parameters() == find_gpt_preset(name).num_parameters


@pytest.mark.parametrize(("name", "num_parameters"), PUBLISHED_PARAMETERS.items())
def test_gpt2_sizes_are_the_published_ones(name: str, num_parameters: int):
    assert find_gpt_preset(name).num_parameters == num_parameters


def test_gpt_20b_is_the_model_of_the_mics_evaluation():
    preset = find_gpt_preset("gpt-20b")
    h, ffn, num_layers, vocab_size = 5120, 20480, 62, 50265
    published = num_layers * (4 * h**2 + 2 * h * ffn) + vocab_size * h  # without positions, biases and norms
    # Those make 5.2 million position parameters and 13 h (= 66,560) per layer: 0.05 % of the whole.
    assert preset.num_parameters == pytest.approx(published, rel=1e-3)
    assert preset.num_parameters > published


@pytest.mark.parametrize("name", GPT_PRESETS)
def test_heads_divide_the_width(name: str):
    preset = find_gpt_preset(name)
    assert preset.hidden_size % preset.num_heads == 0


@pytest.mark.parametrize(
    ("wrong", "near"), [("gpt2-meduim", "gpt2-medium"), ("gpt_20b", "gpt-20b"), ("tiny", "gpt-tiny")]
)
def test_unknown_preset_names_the_nearest(wrong: str, near: str):
    with pytest.raises(ConfigError, match=f"got {wrong!r}. Did you mean .*{near!r}"):
        gpt_config(wrong)


def test_saved_configuration_loads_and_a_missing_one_is_refused(tmp_path: Path):
    gpt_config("gpt-tiny").save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        assert load_model_config(str(path)).to_diff_dict() == gpt_config("gpt-tiny").to_diff_dict()
    with pytest.raises(ConfigError, match=r"No model configuration: .*/no/such"):
        load_model_config("/no/such")
