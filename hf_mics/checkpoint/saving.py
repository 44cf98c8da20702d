"""How is a checkpoint written, so that it is complete or not there?"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from hf_mics.checkpoint.check import missing_pieces
from hf_mics.checkpoint.contents import loader_batch_sizes, model_note, optimizer_note, tied_names
from hf_mics.checkpoint.folder import commit, discard, find_checkpoints, staging_folder, start_saving
from hf_mics.checkpoint.mark import FORMAT_VERSION, Mark, StateFormat
from hf_mics.checkpoint.storage import our_storage
from hf_mics.checkpoint.together import main_decides, together
from hf_mics.errors import CheckpointError


def save_checkpoint(
    accelerator: Any,
    target: Path,
    write: Callable[[Path], None],
    *,
    models: Sequence[nn.Module],
    optimizers: Sequence[Any],
) -> None:
    """Has every rank write its part of the checkpoint `target` and lets it appear when all have; a collective.

    In this order: makes an empty folder beside `target`, calls `write(folder)` on every rank, brings the files down to
    the disk, writes the completion mark, renames. A rank that fails makes all fail, and what was written is removed.

    Raises:
        CheckpointError: on every rank alike, when some rank could not write; what was complete before is untouched.
    """
    what = f"could not write the checkpoint {target}"
    try:
        main_decides(lambda: start_saving(target))
        together(what, lambda: write(staging_folder(target)))
        main_decides(lambda: commit(target, lambda files: _make_mark(accelerator, target, models, optimizers, files)))
    except CheckpointError as error:
        reason = str(error)
        raise CheckpointError(main_decides(lambda: _after_failure(target, what, reason))) from error


def storage_for(accelerator: Any, model: nn.Module) -> AbstractContextManager[None]:
    """Inside, accelerate's FSDP checkpoint functions write `model` without duplicates and read once per node."""
    return our_storage(tied_names(model), accelerator.topology.node_size, accelerator.device)


def format_of(plugin: Any) -> StateFormat:
    """What accelerate's FSDP plugin is set to write."""
    return "full" if "FULL_STATE_DICT" in str(plugin.state_dict_type) else "sharded"


def _make_mark(
    accelerator: Any, target: Path, models: Sequence[nn.Module], optimizers: Sequence[Any], files: dict[str, int]
) -> Mark:
    missing = missing_pieces(staging_folder(target))
    if missing:
        raise CheckpointError(
            f"rank 0 does not see what other ranks wrote ({missing[0]}): a checkpoint needs a folder that all nodes "
            "share. Put output_dir on one."
        )
    topology = accelerator.topology
    return Mark(
        format_version=FORMAT_VERSION,
        state_format=format_of(accelerator.state.fsdp_plugin),
        world_size=topology.world_size,
        node_size=topology.node_size,
        partition_size=topology.partition_size,
        models=[model_note(model) for model in models],
        optimizers=[optimizer_note(*pair) for pair in zip(models, optimizers, strict=False)],
        batch_sizes=loader_batch_sizes(accelerator),
        files=files,
        versions={name: version(name) for name in ("torch", "accelerate", "transformers")},
        saved_at_s=time.time(),
    )


def _after_failure(target: Path, what: str, reason: str) -> str:
    """Removes what was written; returns the whole story."""
    usage = shutil.disk_usage(next(parent for parent in target.absolute().parents if parent.is_dir()))
    discard(target)
    known = find_checkpoints(target.parent, target.name.rstrip("0123456789")).complete
    return (
        f"{reason if reason.startswith(what) else f'{what}: {reason}'}. Its disk had {usage.free / 1e6:,.1f} MB of "
        f"{usage.total / 1e6:,.1f} MB free then; what had been written is removed. "
        + (f"Intact: {known[-1]}, the newest of {len(known)} complete." if known else "No other checkpoint was there.")
    )


def is_main() -> bool:
    """Whether this is the rank that handles folders."""
    return dist.get_rank() == 0
