"""How does a checkpoint become a Hugging Face folder, without GPUs, in the memory of its largest tensor?"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from hf_mics.checkpoint.check import check_folder
from hf_mics.checkpoint.contents import MODEL_FOLDER, OPTIMIZER_FOLDER, load_whole, model_file, state_format
from hf_mics.checkpoint.folder import discard, staging_folder, start_saving
from hf_mics.checkpoint.mark import MARK_NAME, Mark
from hf_mics.checkpoint.storage import read_description
from hf_mics.errors import CheckpointError, ConfigError

# Smaller files would be many, and save no memory worth it.
SMALLEST_SHARD_BYTES = 32 * 2**20

# Training state, in the names of accelerate and transformers; everything else in a checkpoint describes the model.
_NOT_DESCRIPTIONS = (
    MARK_NAME, ".*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.safetensors", "*.index.json",
    "trainer_state.json", "README.md", MODEL_FOLDER.format("*"), OPTIMIZER_FOLDER.format("*"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote: tensors, their bytes, weight files, and whether there is a configuration beside them."""

    tensors: int
    weight_bytes: int
    files: int
    loads_with: str


def export_checkpoint(
    checkpoint: Path, out: Path, *, model_index: int = 0, max_shard_size: int | str | None = None
) -> Exported:
    """Writes the model of `checkpoint` as safetensors with an index, with its configuration and tokenizer, into `out`.

    Tied weights are stored once, as `save_pretrained` does. `out` appears when it is complete.

    Args:
        checkpoint: a folder of `save_state`, of a Trainer, or of plain accelerate FSDP; sharded or full state.
        model_index: which model, where an Accelerator prepared several.
        max_shard_size: of a weight file, in bytes or as "5GB"; a file is put together in memory. Default: the largest
            tensor, at least 32 MiB. Not of an adapter, which is one file.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one without this model.
        ConfigError: `out` is there already or cannot be written, or `max_shard_size` is no size, or of an adapter.
    """
    if out.is_symlink() or out.is_mount() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(
            f"{out} exists already; expected a new or empty folder, no link and no mount point, which cannot be "
            f"replaced when all is written. Choose another, as {out / 'model'}, or remove it."
        )
    mark = check_folder(checkpoint)
    described, load = _source(checkpoint, model_index)
    note = mark.models[model_index] if mark and model_index < len(mark.models) else None
    described = {name: tensor for name, tensor in described.items() if not note or name not in note.tied}
    scalars = set(note.scalars) if note else set()
    is_adapter = note.adapter is not None if note else (checkpoint / "adapter_config.json").is_file()
    renamed: dict[str, str] = {}
    if is_adapter:
        if max_shard_size is not None:
            raise ConfigError("an adapter is one file, the only one that PEFT opens: leave out --max-shard-size.")
        renamed = _adapter_names(checkpoint, described, note.adapter if note else None)
        described = {name: described[name] for name in renamed}
        max_shard_size = max(1, sum(tensor.nbytes for tensor in described.values()))
    largest = max((tensor.nbytes for tensor in described.values()), default=0)
    size = max(largest, SMALLEST_SHARD_BYTES) if max_shard_size is None else max_shard_size
    pattern = "adapter_model{suffix}.safetensors" if is_adapter else "model{suffix}.safetensors"
    try:
        split = split_torch_state_dict_into_shards(described, filename_pattern=pattern, max_shard_size=size)
    except ValueError as error:
        raise ConfigError(f"--max-shard-size must be bytes or a size as 5GB, got {size!r}: {error}") from None
    try:
        start_saving(out)
        folder = staging_folder(out)
        for file_name, names in split.filename_to_tensors.items():
            tensors = {name: t.reshape(()) if name in scalars else t for name, t in load(names).items()}
            tensors = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
            del tensors
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if model_index == 0:
            _copy_descriptions(checkpoint, folder, mark)
        has_config = (folder / "config.json").is_file()
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {out}: {error}. Choose a folder on a disk with space.") from error
    finally:
        with contextlib.suppress(OSError):
            discard(out)
    loads_with = "PeftModel.from_pretrained" if is_adapter else "from_pretrained" if has_config else "safetensors"
    return Exported(
        tensors=len(described),
        weight_bytes=sum(tensor.nbytes for tensor in described.values()),
        files=len(split.filename_to_tensors),
        loads_with=loads_with,
    )


def _adapter_names(checkpoint: Path, names: Iterable[str], stored: dict[str, str] | None) -> dict[str, str]:
    """The adapter's tensors in a checkpoint, to the names under which PEFT stores them.

    A Trainer saves those so named, and beside them a head of the base's that the adapter targets; an Accelerate loop
    saves the whole model, the base's weights too.

    Args:
        stored: what the mark says of them.

    Raises:
        CheckpointError: base and adapter are there, and the mark does not tell them apart.
    """
    names = list(names)
    if stored and not set(stored.values()) <= set(names):
        return stored
    if not stored and any(".base_layer." in name or name.startswith("prompt_encoder.") for name in names):
        raise CheckpointError(
            f"{checkpoint} holds an adapter beside its base model, and nothing in it tells them apart: resume from it "
            "in the Trainer that saved it, and call save_model() there; or load it in the loop that saved it, and call "
            "the PEFT model's save_pretrained(folder, is_main_process=accelerator.is_main_process)."
        )
    return {name: name for name in names}


Load = Callable[[Iterable[str]], dict[str, torch.Tensor]]


def _source(checkpoint: Path, model_index: int) -> tuple[dict[str, torch.Tensor], Load]:
    """The model's tensors on the meta device, and what loads some of them."""
    kind = state_format(checkpoint, model_index)
    if kind is None:
        has_model = any(checkpoint.glob("*.safetensors"))
        hint = " It holds safetensors, which from_pretrained loads as they are." if has_model else ""
        raise CheckpointError(f"{checkpoint} holds no state of model {model_index}, which training would resume.{hint}")
    if kind == "sharded":
        return _sharded(checkpoint / MODEL_FOLDER.format(model_index))
    return _whole(model_file(checkpoint, model_index))


def _sharded(folder: Path) -> tuple[dict[str, torch.Tensor], Load]:
    prefix = "model."
    described = {
        name.removeprefix(prefix): torch.empty(item.size, dtype=item.properties.dtype, device="meta")
        for name, item in read_description(folder).state_dict_metadata.items()
        if hasattr(item, "size")
    }

    def load(names: Iterable[str]) -> dict[str, torch.Tensor]:
        tensors = {name: torch.empty_like(described[name], device="cpu") for name in names}
        with warnings.catch_warnings():
            # It says that there is a single process, which `no_dist` has just told it.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load({prefix[:-1]: tensors}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        return tensors

    return described, load


def _whole(path: Path) -> tuple[dict[str, torch.Tensor], Load]:
    described = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in load_whole(path).items()
        if isinstance(tensor, torch.Tensor)
    }

    def load(names: Iterable[str]) -> dict[str, torch.Tensor]:
        # Mapped anew for every file, so that pages of those before are given back.
        state = load_whole(path)
        return {name: state[name].clone(memory_format=torch.contiguous_format) for name in names}

    return described, load


def _copy_descriptions(checkpoint: Path, folder: Path, mark: Mark | None) -> None:
    """Copies files, and folders of the checkpoint's own: a tokenizer's further chat templates, a processor's parts."""
    own = {Path(name).parts[0] for name in mark.files} if mark else set()
    left_out = shutil.ignore_patterns(*_NOT_DESCRIPTIONS)
    for path in checkpoint.iterdir():
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in _NOT_DESCRIPTIONS):
            continue
        if path.is_file():
            shutil.copy2(path, folder / path.name)
        elif path.name in own:
            shutil.copytree(path, folder / path.name, ignore=left_out)
