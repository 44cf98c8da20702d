"""Does an adapter that an Accelerate loop saved beside its base model become a folder that PEFT loads?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from hf_mics import MiCSPlugin
from hf_mics.checkpoint import export
from hf_mics.checkpoint.export import export_checkpoint
from hf_mics.checkpoint.mark import MARK_NAME
from hf_mics.errors import CheckpointError, ConfigError
from hf_mics.testing import run_ranks
from tests import tiny
from tests.test_accelerator import fresh_accelerator


def base() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 16, "num_labels": 3}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=0, bos_token_id=0, eos_token_id=1))


def save_adapter(folder: str, adapter: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    accelerator = fresh_accelerator(mics_plugin=MiCSPlugin(partition_size=2))
    # "score" is trained whole, as PEFT does with the head of a classifier.
    config = LoraConfig(r=2, target_modules=["c_attn"], task_type="SEQ_CLS", fan_in_fan_out=True, **options)
    torch.manual_seed(1)
    model = get_peft_model(base(), config, adapter_name=adapter)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    rows = tiny.token_rows(4)[:, :16] % 64
    for _ in range(2):
        accelerator.backward(model(input_ids=rows, labels=torch.tensor([0, 1, 2, 0])).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(folder)
    return {name: param.full_tensor() for name, param in model.named_parameters() if param.requires_grad}


def check(tmp_path: Path, adapter: str, **options: Any) -> None:
    trained: dict[str, Any] = run_ranks(save_adapter, 2, str(tmp_path / "state"), adapter, options)[0]
    exported = export_checkpoint(tmp_path / "state", tmp_path / "out")
    assert exported.files == 1
    assert exported.loads_with == "PeftModel.from_pretrained"
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) == len(trained) == exported.tensors
    loaded = dict(PeftModel.from_pretrained(base(), tmp_path / "out", adapter_name=adapter).named_parameters())
    assert trained
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())


def test_only_the_adapter_is_exported_and_peft_loads_it_bit_equal(tmp_path: Path) -> None:
    # Biases of the base are the adapter's too when they are trained.
    check(tmp_path, "default", bias="lora_only")


def test_an_adapter_of_another_name_larger_than_a_weight_file_is_one_file(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(export, "SMALLEST_SHARD_BYTES", 64)
    check(tmp_path, "model")
    with pytest.raises(ConfigError, match="leave out --max-shard-size"):
        export_checkpoint(tmp_path / "state", tmp_path / "other", max_shard_size="1GB")


def test_an_adapter_that_nothing_tells_apart_from_its_base_is_refused(tmp_path: Path) -> None:
    run_ranks(save_adapter, 2, str(tmp_path / "state"), "default", {})
    (tmp_path / "state" / MARK_NAME).unlink()
    with pytest.raises(CheckpointError, match="holds an adapter beside its base model, and nothing in it tells"):
        export_checkpoint(tmp_path / "state", tmp_path / "out")
    assert not (tmp_path / "out").exists()
