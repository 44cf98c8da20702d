"""What of a model goes into a checkpoint beside its tensors, and what must be the same to resume it?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import WEIGHTS_INDEX_NAME

from hf_mics._hf_compat import prepared
from hf_mics.checkpoint.mark import ModelNote, OptimizerNote
from hf_mics.checkpoint.storage import read_description
from hf_mics.errors import CheckpointError
from hf_mics.sharding import scalar_names
from hf_mics.wrapping import class_name, plain

Shapes = dict[str, tuple[int, ...]]

MODEL_FOLDER, MODEL_FILE = "pytorch_model_fsdp_{}", "pytorch_model_fsdp{}.bin"
OPTIMIZER_FOLDER, OPTIMIZER_FILE = "optimizer_{}", "optimizer{}.bin"


def tied_names(model: nn.Module) -> dict[str, str]:
    """State-dict names that share another name's tensor, to that first name."""
    first: dict[int, str] = {}
    tied = {}
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        kept = first.setdefault(id(tensor), name)
        if kept != name:
            tied[_canonical(name)] = _canonical(kept)
    return tied


def share_tied(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The full `state` of a sharded `model` with one tensor under all names of a tied weight, as before sharding.

    Each name was gathered by itself. Who writes the state tells by the tensor that its bytes are the same.
    """
    tied = tied_names(model)
    # The state of a compiled model has its names with a prefix.
    held = {_canonical(name): value for name, value in state.items()}
    return {name: held.get(tied.get(_canonical(name), ""), value) for name, value in state.items()}


def _canonical(name: str) -> str:
    """As the state dict calls it, without the wrappers of compilation and activation checkpointing."""
    return next(iter(fsdp2_canonicalize_names({name: None})))


def model_note(model: nn.Module) -> ModelNote:
    """What the mark says about `model`."""
    return ModelNote(
        class_name=class_name(model),
        tied=tied_names(model),
        scalars=sorted(scalar_names(model)),
        adapter=_adapter_names(model) if is_peft_model(plain(model)) else None,
    )


def _adapter_names(model: nn.Module) -> dict[str, str]:
    """Names of the active adapter's tensors in the state dict, to those under which PEFT stores them.

    PEFT alone knows which they are, by the adapter's kind and settings: it is given names for tensors.
    """
    from peft import get_peft_model_state_dict

    inner: Any = plain(model)
    if inner.active_peft_config.is_prompt_learning:
        return {}  # PEFT would compute what it stores, from parameters that are sharded
    # VeRA stores one layer's name of buffers that all layers share, and not the first one's.
    named = chain(model.named_parameters(), model.named_buffers(remove_duplicate=False))
    names = [_canonical(name) for name, _ in named]
    try:
        stored = get_peft_model_state_dict(
            inner,
            state_dict={name: name for name in names},
            adapter_name=str(inner.active_adapter),
            save_embedding_layers=False,
        )
    except (AttributeError, TypeError, ValueError, KeyError):
        # A kind that reshapes its tensors, as AdaLoRA with ranks of its own, or refuses: the note alone is lost.
        return {}
    tied = tied_names(model)
    return {tied.get(name, name): new for new, name in stored.items()}


def optimizer_class(optimizer: Any) -> str:
    """The class of the optimizer that accelerate has wrapped."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def optimizer_note(model: nn.Module, optimizer: Any) -> OptimizerNote:
    """What the mark says about `optimizer`, which trains `model`."""
    trained = trained_parameters(model, optimizer)
    stateless = [name for name, param in trained.items() if not optimizer.state.get(param)]
    # Plain SGD has no state of any.
    return OptimizerNote(
        class_name=optimizer_class(optimizer), without_state=stateless if len(stateless) < len(trained) else []
    )


def write_descriptions(folder: Path, model: nn.Module, others: Iterable[Any] = ()) -> None:
    """Writes what `from_pretrained` needs beside the weights: configuration, generation defaults, code, tokenizer.

    Args:
        others: objects with `save_pretrained`, as tokenizers and processors.
    """
    described: Any = plain(model)
    if is_peft_model(described):
        for adapter in described.active_adapters:
            described.peft_config[adapter].save_pretrained(folder)
    elif hasattr(getattr(described, "config", None), "save_pretrained"):
        # As PreTrainedModel.save_pretrained sets them; it cannot be asked for the configuration alone.
        described.config.architectures = [class_name(described)]
        if isinstance(getattr(described, "dtype", None), torch.dtype):
            described.config.dtype = str(described.dtype).removeprefix("torch.")
        if is_pretrained(described) and described.is_remote_code():
            custom_object_save(described, folder, config=described.config)
        described.config.save_pretrained(folder)
        if hasattr(described, "can_generate") and described.can_generate():
            described.generation_config.save_pretrained(folder)
    for other in others:
        other.save_pretrained(folder)


def loads_from_full_state(model: nn.Module) -> bool:
    """Whether `from_pretrained` could load the full state of `model` as accelerate stores it.

    Not an adapter, which PEFT stores under other names, nor parameters without dimensions, which sharding gives one.
    """
    return is_pretrained(model) and not scalar_names(model)


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is one of transformers', whose `save_pretrained` knows tied weights."""
    # Who has built one has loaded this module; others need not wait for it.
    loaded = sys.modules.get("transformers.modeling_utils")
    return loaded is not None and isinstance(plain(model), loaded.PreTrainedModel)


def write_index(folder: Path, model: nn.Module) -> None:
    """Lets `from_pretrained` find the full state in `folder`: an index of weights in parts, of which there is one.

    So a checkpoint holds the weights once and no second time under the name that transformers gives them.
    """
    path = model_file(folder, 0)
    if not path.is_file() or not loads_from_full_state(model):
        return
    state = load_whole(path)
    names = {name: path.name for name, value in state.items() if isinstance(value, torch.Tensor)}
    total = sum(state[name].nbytes for name in names.keys() - tied_names(model).keys())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def state_format(folder: Path, index: int = 0) -> str | None:
    """How model `index` is stored in `folder`: "sharded", "full", or None if it is not."""
    if (folder / MODEL_FOLDER.format(index) / ".metadata").is_file():
        return "sharded"
    return "full" if model_file(folder, index).is_file() else None


def model_file(folder: Path, index: int) -> Path:
    """Where full state of model `index` is."""
    return folder / MODEL_FILE.format(f"_{index}" if index else "")


def optimizer_file(folder: Path, index: int) -> Path:
    """Where full state of optimizer `index` is."""
    return folder / OPTIMIZER_FILE.format(f"_{index}" if index else "")


def saved_shapes(folder: Path, index: int) -> Shapes:
    """Names and shapes of model `index` in a checkpoint, without its data."""
    if state_format(folder, index) == "sharded":
        described = read_description(folder / MODEL_FOLDER.format(index)).state_dict_metadata
        return {name.removeprefix("model."): tuple(getattr(d, "size", ())) for name, d in described.items()}
    state = load_whole(model_file(folder, index))
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def load_whole(path: Path) -> dict[str, Any]:
    """The state dict in `path`, its tensors still on disk until they are used.

    Raises:
        CheckpointError: the file is cut short or not one of torch's.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged: {str(error).splitlines()[0]}. Resume from another checkpoint."
        ) from error


def present_shapes(model: nn.Module, adapter_only: bool, form: str | None = None) -> Shapes:
    """Names and shapes of the state dict that accelerate would load into `model`.

    Args:
        adapter_only: where `model` has an adapter, of that alone.
        form: "full" if it comes from full state, for which accelerate tells an adapter by what is trained, not by PEFT.
    """
    alone = adapter_only and is_peft_model(model)
    if alone and form != "full":
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, adapter_name=str(model.active_adapter))
    else:
        state = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=alone))
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}


def saved_optimizer_names(folder: Path, index: int) -> set[str]:
    """Names of the parameters for which optimizer `index` of a checkpoint has state; none under plain SGD."""
    if (folder / OPTIMIZER_FOLDER.format(index) / ".metadata").is_file():
        start = "optimizer.state."
        described = read_description(folder / OPTIMIZER_FOLDER.format(index)).state_dict_metadata
        return {name[len(start) :].rpartition(".")[0] for name in described if name.startswith(start)}
    return set(load_whole(optimizer_file(folder, index))["state"])


def trained_parameters(model: nn.Module, optimizer: Any) -> dict[str, nn.Parameter]:
    """The parameters of `model` that `optimizer` trains now, by name."""
    trained = {id(param) for group in optimizer.param_groups for param in group["params"] if param.requires_grad}
    return {_canonical(name): param for name, param in model.named_parameters() if id(param) in trained}


def loader_batch_sizes(accelerator: Any) -> list[int | None]:
    """Rows per process and micro-step of the prepared loaders, None for one that has no such number."""
    samplers = (getattr(loader, "batch_sampler", None) for loader in prepared(accelerator).loaders)
    return [getattr(sampler, "batch_size", None) for sampler in samplers]
