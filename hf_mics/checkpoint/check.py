"""Can this run resume that checkpoint? Asked on the main process, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from hf_mics.checkpoint.contents import (
    MODEL_FOLDER,
    OPTIMIZER_FOLDER,
    Shapes,
    saved_optimizer_names,
    saved_shapes,
    state_format,
)
from hf_mics.checkpoint.folder import find_checkpoints, restore_interrupted
from hf_mics.checkpoint.mark import MARK_NAME, Mark, missing_files, read_mark
from hf_mics.checkpoint.storage import read_description
from hf_mics.errors import CheckpointError


def check_folder(folder: Path) -> Mark | None:
    """Returns the mark of the checkpoint in `folder`; None for one of plain accelerate, which has none.

    Raises:
        CheckpointError: there is no checkpoint, or a part of it is missing or cut short.
    """
    restore_interrupted(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}: expected a folder with {MARK_NAME}, and there is none.")
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder} is empty: expected a checkpoint. Resume from another one.")
    mark = read_mark(folder)
    if mark is None and state_format(folder) is None:
        raise CheckpointError(
            f"{folder} holds no checkpoint of this kind: expected {MARK_NAME}, which hf_mics writes last, or plain "
            f"accelerate's FSDP files, got {_listing(folder)}. Resume from another folder."
        )
    wrong = missing_files(folder, mark) if mark else missing_pieces(folder)
    if wrong:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: {'; '.join(wrong[:5])}{' ...' if wrong[5:] else ''}. Nothing was "
            f"loaded. Resume from another one{_others(folder)}."
        )
    return mark


def missing_pieces(folder: Path) -> list[str]:
    """Files that torch.distributed.checkpoint's own metadata in `folder` name and that are not there in full."""
    wrong = []
    for description in sorted(folder.glob("*/.metadata")):
        ends: dict[str, int] = {}
        for info in read_description(description.parent).storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            path = description.parent / name
            size = path.stat().st_size if path.is_file() else 0
            if size < end:
                wrong.append(
                    f"{path.relative_to(folder)} " + (f"ends at {size} of {end} bytes" if size else "is missing")
                )
    return wrong


def check_model(folder: Path, mark: Mark | None, index: int, present: Shapes, class_name: str) -> None:
    """Compares model `index` of the checkpoint with the one to be loaded, of class `class_name`.

    Raises:
        CheckpointError: it is not there, or has other parameters.
    """
    if state_format(folder, index) is None:
        raise CheckpointError(
            f"{folder} holds no training state of a model (no {MODEL_FOLDER.format(index)}), only {_listing(folder)}. "
            "A checkpoint saved with save_only_model, or a model folder, can be loaded with from_pretrained."
        )
    saved = saved_shapes(folder, index)
    note = mark.models[index] if mark and index < len(mark.models) else None
    # Names that point to another name's data may come and go with how the model ties its weights.
    tied = set(note.tied) if note else set()
    gone = sorted(saved.keys() - present.keys() - tied)
    new = sorted(present.keys() - saved.keys())
    changed = [name for name in saved if name in present and saved[name] != present[name]]
    other = [f"{name}: {list(saved[name])} there, {list(present[name])} here" for name in changed]
    if gone or new or other:
        parts = [_some("here only", new), _some("there only", gone), _some("of another shape", other)]
        raise CheckpointError(
            f"the checkpoint {folder} is of another model: a {note.class_name if note else 'model'} was saved, this "
            f"run has a {class_name}. Parameters {'; '.join(part for part in parts if part)}. Build the model that was "
            "saved, or start from weights with from_pretrained (`hf-mics export` makes a folder of them)."
        )


def check_optimizer(folder: Path, mark: Mark | None, index: int, present: set[str], name: str) -> None:
    """Compares optimizer `index` of the checkpoint with the one to be loaded, of class `name`.

    Raises:
        CheckpointError: it is of another class or trains other parameters.
    """
    note = mark.optimizers[index] if mark and index < len(mark.optimizers) else None
    if note and note.class_name != name:
        raise CheckpointError(
            f"the checkpoint {folder} is of another optimizer: expected {name}, as this run uses, got "
            f"{note.class_name}. Resume with {note.class_name}, or start anew from the weights (`hf-mics export`)."
        )
    saved = saved_optimizer_names(folder, index)
    if saved and note:
        saved |= set(note.without_state)
    if saved and saved != present:
        parts = [_some("here only", sorted(present - saved)), _some("there only", sorted(saved - present))]
        raise CheckpointError(
            f"the optimizer in {folder} trains other parameters: {'; '.join(part for part in parts if part)}. Freeze "
            f"the same parameters as the run that saved it ({OPTIMIZER_FOLDER.format(index)})."
        )


def newest(parent: Path, prefix: str) -> tuple[Path, str]:
    """The newest complete checkpoint `PREFIX<number>` in `parent`, and what was skipped, one line each.

    Raises:
        CheckpointError: there is none; the message says why others do not count.
    """
    found = find_checkpoints(parent, prefix)
    if not found.complete:
        skipped = ""
        if found.skipped:
            skipped = (
                f" What is there:\n{found.describe_skipped()}\nOne without a mark, as plain accelerate saves it, can "
                "be resumed by its path."
            )
        raise CheckpointError(f"no complete checkpoint {prefix}* in {parent}.{skipped}")
    return found.complete[-1], found.describe_skipped()


def _some(what: str, names: list[str]) -> str:
    return f"{what}: {len(names)} ({', '.join(names[:3])}{', ...' if names[3:] else ''})" if names else ""


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:6]) + (", ..." if names[6:] else "")


def _others(folder: Path) -> str:
    prefix = folder.name.rstrip("0123456789")
    others = [path for path in find_checkpoints(folder.parent, prefix).complete if path != folder]
    return f": {others[-1]} is complete" if others else ""
