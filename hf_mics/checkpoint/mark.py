"""What does a complete checkpoint say about itself?

`mics_checkpoint.json` is written last, so that a folder without it is not a complete checkpoint of ours. It names every
file with its size, and what a run must have in common with the one that saved. The tensors are described by the
formats that hold them, torch.distributed.checkpoint's and torch.save's.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hf_mics.errors import CheckpointError

MARK_NAME = "mics_checkpoint.json"
FORMAT_VERSION = 2

StateFormat = Literal["sharded", "full"]


@dataclass(frozen=True, kw_only=True)
class ModelNote:
    """A model in a checkpoint.

    Args:
        class_name: of the model before sharding.
        tied: names whose data is stored under another name, to that name.
        scalars: parameters that had no dimension before sharding gave them one.
        adapter: names of the active PEFT adapter's tensors, to the names under which PEFT stores them; empty where PEFT
            cannot say, None without PEFT.
    """

    class_name: str
    tied: dict[str, str]
    scalars: list[str]
    adapter: dict[str, str] | None


@dataclass(frozen=True, kw_only=True)
class OptimizerNote:
    """An optimizer in a checkpoint.

    Args:
        class_name: of the optimizer that accelerate has wrapped.
        without_state: parameters that it trains and has no state of, because none ever had a gradient.
    """

    class_name: str
    without_state: list[str]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The completion mark of a checkpoint.

    Args:
        format_version: of this file.
        state_format: "sharded", or "full" for whole tensors written by one rank.
        world_size, node_size, partition_size: the layout that saved it.
        models: in the order of the Accelerator's `prepare`; `optimizers` likewise.
        batch_sizes: rows per process and micro-step of each prepared loader, None where it has no such number.
        files: bytes of every other file, by path below the folder.
        versions: of the libraries that wrote it.
        saved_at_s: seconds since the epoch.
    """

    format_version: int
    state_format: StateFormat
    world_size: int
    node_size: int
    partition_size: int
    models: list[ModelNote]
    optimizers: list[OptimizerNote]
    batch_sizes: list[int | None]
    files: dict[str, int]
    versions: dict[str, str]
    saved_at_s: float

    @property
    def layout(self) -> str:
        """Partition groups x partition size, as in 2x2."""
        return f"{self.world_size // self.partition_size}x{self.partition_size}"


def write_mark(folder: Path, mark: Mark) -> None:
    """Writes the mark into `folder`, all at once and down to the disk."""
    draft = folder / f".{MARK_NAME}"
    with draft.open("w") as file:
        json.dump(asdict(mark), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(folder / MARK_NAME)


def read_mark(folder: Path) -> Mark | None:
    """Returns the mark of `folder`, None if it has none.

    Raises:
        CheckpointError: the mark cannot be read, or is of another version than this hf_mics knows.
    """
    path = folder / MARK_NAME
    try:
        said: dict[str, Any] = json.loads(path.read_text())
        version = said["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} is a checkpoint of format {version}; this hf_mics reads {FORMAT_VERSION}. Take the hf_mics "
                f"that wrote it ({said.get('versions')})."
            )
        models = [ModelNote(**model) for model in said.pop("models")]
        optimizers = [OptimizerNote(**optimizer) for optimizer in said.pop("optimizers")]
        return Mark(models=models, optimizers=optimizers, **said)
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error!r}): expected the completion mark of a checkpoint. Resume from another one."
        ) from error


def list_files(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder` except the mark, by path in it."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MARK_NAME, f".{MARK_NAME}")
    }


def missing_files(folder: Path, mark: Mark) -> list[str]:
    """What is wrong with the files that `mark` names, one line each; empty if all are there in full."""
    wrong = []
    for name, expected_bytes in mark.files.items():
        try:
            found_bytes = (folder / name).stat().st_size
        except OSError:
            wrong.append(f"{name} is missing")
            continue
        if found_bytes != expected_bytes:
            wrong.append(f"{name} has {found_bytes} of {expected_bytes} bytes")
    return wrong
