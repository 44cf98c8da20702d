"""What happens to a model before it is sharded, seen without a process group."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    ActivationWrapper,
    CheckpointWrapper,
    OffloadWrapper,
)

from hf_mics import _torch_compat, _torch_names
from hf_mics.errors import MiCSError
from hf_mics.plugin import MiCSPlugin
from hf_mics.sharding import _ignored_parameters, _widen_scalars, checkpoint_activations, restore_scalars

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


def test_activations_of_checkpointed_layers_are_offloaded_where_that_is_asked_for():
    """Here the wrappers are all there is to see: torch keeps what it offloads in pinned memory."""
    for offload in (False, True):
        plugin = MiCSPlugin(activation_checkpointing=True, activation_checkpointing_offload=offload)
        model = build("gpt2")
        checkpoint_activations(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model)
        wrapped = [type(module) for module in model.modules() if isinstance(module, ActivationWrapper)]
        assert wrapped.count(CheckpointWrapper) == 3
        assert wrapped.count(OffloadWrapper) == 3 * offload


def test_quantized_parameters_stay_whole():
    model = nn.Linear(2, 2)
    model.packed = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    assert _ignored_parameters(MiCSPlugin(), model, torch.device("cpu")) == {model.packed}


def test_a_torch_without_a_name_that_is_read_is_refused_with_its_version():
    def present(names: tuple[str, ...]) -> SimpleNamespace:
        return SimpleNamespace(**dict.fromkeys(names))

    class Context:
        def lazy_init(self) -> None:
            self.reduce_scatter_states, self.reduce_scatter_stream = [], None

    class Group(SimpleNamespace):
        def _init_mp_dtypes(self) -> None:
            self._orig_dtype = self._reduce_dtype = None

    def group(*without: str) -> Group:
        made = Group(**dict.fromkeys(set(_torch_names._GROUP_ATTRIBUTES) - {"_init_mp_dtypes", *without}))
        made.mesh_info, made.comm_ctx = present(_torch_names._MESH_ATTRIBUTES), Context()
        made.fsdp_params = [present(_torch_names._PARAM_ATTRIBUTES)]
        return made

    _torch_names.check_group(group())
    with pytest.raises(MiCSError, match=rf"torch {re.escape(torch.__version__)} has no FSDPParamGroup.device_handle"):
        _torch_names.check_group(group("device_handle"))
    bad = group()
    del bad.fsdp_params[0]._orig_size
    with pytest.raises(MiCSError, match=r"FSDPParam\._orig_size"):
        _torch_names.check_group(bad)
    Context.lazy_init = lambda self: None
    with pytest.raises(MiCSError, match=r"FSDPCommContext\.reduce_scatter_states"):
        _torch_names.check_group(group())
    state = present(_torch_names._STATE_ATTRIBUTES)
    with pytest.raises(MiCSError, match=r"FSDPStateContext\.post_backward_final_callback_queued"):
        _torch_names.check_state(state)


@pytest.mark.parametrize("held", [None, "group"])
def test_names_of_torch_2_11_will_do(monkeypatch: pytest.MonkeyPatch, held: str | None):
    """It holds one parameter group or none, and one reduce-scatter or none, where later ones have lists."""

    class Training:
        IDLE = "idle"

    class Context:
        reduce_scatter_state = held and SimpleNamespace(event="event")

        def lazy_init(self) -> None:
            self.reduce_scatter_state = self.reduce_scatter_stream = None

    group, waited = MagicMock(comm_ctx=Context(), fsdp_params=[], _training_state=Training()), []
    group.device_handle.current_stream.return_value.wait_event = waited.append
    _torch_names._require_set_by(group.comm_ctx, "FSDPCommContext", "lazy_init")
    monkeypatch.setattr(_torch_compat, "check_group", lambda group: None)
    _torch_compat.Unit(nn.Linear(1, 1), group, "").finish_late_reduction()
    assert (waited, group.comm_ctx.reduce_scatter_state) == (["event"] if held else [], None)

    names = {*_torch_names._STATE_ATTRIBUTES, "_fsdp_param_group"} - {"_fsdp_param_groups"}
    state = SimpleNamespace(**dict.fromkeys(names))
    state._state_ctx = SimpleNamespace(**dict.fromkeys(_torch_names._CONTEXT_ATTRIBUTES))
    state._fsdp_param_group = held
    _torch_names.check_state(state)
    assert _torch_compat._groups_of(state) == ([held] if held else [])
    del state._fsdp_param_group
    with pytest.raises(MiCSError, match=r"no FSDPState\._fsdp_param_groups.*torch 2\.11 to 2\.14"):
        _torch_names.check_state(state)
