"""Does `hf-mics export` write what `from_pretrained` loads bit-equal, in bounded memory, or a clear error?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from hf_mics import MiCSPlugin
from hf_mics.cli import main
from hf_mics.testing import run_ranks
from tests import tiny
from tests.assets.own_model import OwnModel
from tests.test_accelerator import fresh_accelerator

# Tied weights of every kind, a persistent buffer (BART), parameters without dimensions (CLIP).
CLASSES = {
    "gpt2": GPT2LMHeadModel,
    "bert": BertForMaskedLM,
    "t5": T5ForConditionalGeneration,
    "bart": BartForConditionalGeneration,
    "clip": CLIPModel,
}


def clip() -> torch.nn.Module:
    sizes = {"hidden_size": 15, "intermediate_size": 29, "num_hidden_layers": 1, "num_attention_heads": 3}
    return CLIPModel(
        CLIPConfig(
            text_config={**sizes, "vocab_size": 61, "max_position_embeddings": 16, "projection_dim": 9},
            vision_config={**sizes, "image_size": 8, "patch_size": 4, "projection_dim": 9},
            projection_dim=9,
        )
    )


CHAT_TEMPLATES = {"default": "{{ messages }}", "tools": "{{ tools }}"}


def save_models(folder: str) -> dict[str, dict[str, torch.Tensor]]:
    weights = {}
    for name in CLASSES:
        for form in ("sharded", "full"):
            plugin = MiCSPlugin(partition_size=2, state_dict_type=f"{form.upper()}_STATE_DICT")
            accelerator = fresh_accelerator(mics_plugin=plugin)
            torch.manual_seed(3)
            model = clip() if name == "clip" else tiny.build(name, seed=3)
            model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            accelerator.save_state(f"{folder}/{name}_{form}")
            weights[name] = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(f"{folder}/clip", is_main_process=accelerator.is_main_process)
    accelerator = fresh_accelerator()
    models = [tiny.build(name, seed=3) for name in ("bert", "gpt2")]
    accelerator.prepare(*models, *(torch.optim.SGD(model.parameters(), lr=0.1) for model in models))
    accelerator.save_state(f"{folder}/two")
    accelerator = fresh_accelerator()
    model = own_model()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})))
    tokenizer.chat_template = CHAT_TEMPLATES
    accelerator.save_with_checkpoints(tokenizer)
    accelerator.save_state(f"{folder}/own")
    accelerator.unwrap_model(model).save_pretrained(f"{folder}/own model", is_main_process=accelerator.is_main_process)
    return weights


def own_model() -> torch.nn.Module:
    torch.manual_seed(3)
    return OwnModel(tiny.gpt2().config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(save_models, 4, str(folder))[0]


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "clip"])
def test_full_state_loads_bit_equal_as_it_is(saved: Any, name: str) -> None:
    folder, weights = saved
    model, said = CLASSES[name].from_pretrained(folder / f"{name}_full", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights[name].items())


@pytest.mark.parametrize("form", ["sharded", "full"])
@pytest.mark.parametrize("name", CLASSES)
def test_exported_folder_loads_bit_equal(saved: Any, tmp_path: Path, name: str, form: str) -> None:
    folder, weights = saved
    assert main(["export", str(folder / f"{name}_{form}"), str(tmp_path / "out")]) == 0
    assert not list((tmp_path / "out").glob("*.bin*"))
    model, said = CLASSES[name].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights[name].items())
    assert state.keys() == weights[name].keys()
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.architectures, config.dtype) == ([CLASSES[name].__name__], torch.float32)
    assert list((tmp_path / "out").glob("*.bin")) == []


def test_save_pretrained_gives_parameters_without_dimensions_their_shape_back(saved: Any) -> None:
    folder, weights = saved
    state = CLIPModel.from_pretrained(folder / "clip").state_dict()
    assert state["logit_scale"].shape == ()
    assert all(torch.equal(state[key], value) for key, value in weights["clip"].items())


def test_a_model_with_code_of_its_own_is_saved_with_that_code_and_not_with_torchs(saved: Any, tmp_path: Path) -> None:
    own_model().save_pretrained(tmp_path / "twin")
    assert main(["export", str(saved[0] / "own"), str(tmp_path / "out")]) == 0
    described = json.loads((tmp_path / "twin" / "config.json").read_text())
    assert described["auto_map"] == {"AutoModelForCausalLM": "own_model.OwnModel"}
    for folder in (tmp_path / "out", saved[0] / "own", saved[0] / "own model"):
        assert json.loads((folder / "config.json").read_text()) == described
        assert [path.name for path in folder.glob("*.py")] == ["own_model.py"]


def test_a_tokenizers_further_chat_templates_are_exported_and_other_folders_are_not(saved: Any, tmp_path: Path) -> None:
    (saved[0] / "own" / "notes").mkdir()
    assert main(["export", str(saved[0] / "own"), str(tmp_path / "out")]) == 0
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "out").chat_template == CHAT_TEMPLATES
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["additional_chat_templates"]


def test_a_second_model_is_exported_without_the_configuration_of_the_first(saved: Any, tmp_path: Path) -> None:
    folder, weights = saved
    assert main(["export", str(folder / "two"), str(tmp_path / "out"), "--model-index", "1"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, weights["gpt2"][key]) for key, value in state.items())


def test_small_files_get_an_index(saved: Any, tmp_path: Path) -> None:
    folder, weights = saved
    assert main(["export", str(folder / "gpt2_sharded"), str(tmp_path / "out"), "--max-shard-size", "10KB"]) == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    state = GPT2LMHeadModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights["gpt2"].items())


_MEASURE = """
import sys, torch
from pathlib import Path
from hf_mics.checkpoint.export import export_checkpoint
def anonymous_bytes(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024
before = anonymous_bytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
print(anonymous_bytes("VmHWM") - before)
"""


def test_memory_grows_by_the_largest_tensor_not_by_the_model(tmp_path: Path) -> None:
    layers = {f"layers.{i}.weight": torch.full((1024, 1024), float(i)) for i in range(64)}
    dcp.save({"model": layers}, storage_writer=dcp.FileSystemWriter(tmp_path / "in/pytorch_model_fsdp_0"), no_dist=True)
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    # The model has 268 MB, a file 32 MiB, a tensor 4 MiB: one file, the piece that is read into it, and the code that
    # is loaded on the way.
    assert int(done.stdout) < 80e6, done.stdout
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 8


def test_what_cannot_be_exported_is_one_message_and_exit_code_2(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    good = saved[0] / "gpt2_sharded"
    for checkpoint, out, expected in [
        (tmp_path / "nowhere", tmp_path / "out", "no checkpoint at"),
        (tmp_path / "empty", tmp_path / "out", "is empty"),
        (good, tmp_path / "taken", "exists already"),
        (good, tmp_path / "link", "no link and no mount point"),
        (good, tmp_path / "taken" / "file" / "below", "cannot write"),
    ]:
        assert main(["export", str(checkpoint), str(out)]) == 2
        said = capsys.readouterr().err
        assert expected in said
        assert said.count("\n") == 1
    for size in ("abc", "0", "5XB"):
        assert main(["export", str(good), str(tmp_path / "out"), "--max-shard-size", size]) == 2
        assert "--max-shard-size must be bytes or a size as 5GB" in capsys.readouterr().err
    assert main(["export", str(good), str(tmp_path / "out"), "--model-index", "1"]) == 2
    assert "no state of model 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
