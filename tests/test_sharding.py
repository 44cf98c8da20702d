"""What happens to a model before it is sharded, seen without a process group."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_mics.plugin import MiCSPlugin
from hf_mics.sharding import _widen_scalars, checkpoint_activations, restore_scalars

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from _architectures import build, micro_batch


class Scaled(nn.Module):
    """Two modules that share a scalar, and a scalar of the root's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.inner = nn.Linear(2, 2)
        self.inner.scale = self.scale
        self.inner.offset = nn.Parameter(torch.tensor(1.0), requires_grad=False)


def test_scalars_get_one_dimension_and_stay_the_same_tied_objects():
    model = Scaled()
    scale, offset = model.scale, model.inner.offset
    _widen_scalars(model, ignored=set())
    assert scale.shape == offset.shape == (1,)
    assert model.scale is model.inner.scale is scale
    assert model.inner.offset is offset


def test_ignored_scalars_keep_their_shape():
    model = Scaled()
    _widen_scalars(model, ignored={model.inner.offset})
    assert model.inner.offset.shape == ()


def test_restored_state_loads_into_a_fresh_model():
    model = Scaled()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _widen_scalars(model, ignored=set())
    state = restore_scalars(model, model.state_dict())
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in before.items()}
    assert all(torch.equal(state[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["t5", "bloom", "gemma2", "whisper"])
def test_checkpointed_layers_recompute_without_the_key_value_cache(name):
    model = build(name)
    inputs = micro_batch(name, model, seed=0)
    model(**inputs).loss.backward()
    expected = [param.grad for param in model.parameters()]
    model.zero_grad()
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=MiCSPlugin(activation_checkpointing=True)))
    checkpoint_activations(accelerator, model)
    model(**inputs).loss.backward()
    for param, grad in zip(model.parameters(), expected, strict=True):
        assert (grad is None) == (param.grad is None)
        assert grad is None or torch.equal(param.grad, grad)
