"""How do `Accelerator.save_state` and `load_state` write and read complete checkpoints?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_mics._hf_compat import prepared
from hf_mics.checkpoint.contents import loader_batch_sizes, write_descriptions, write_index
from hf_mics.checkpoint.folder import rotate
from hf_mics.checkpoint.mark import Mark
from hf_mics.checkpoint.resuming import check_checkpoint, continue_random_state, newest_for_all
from hf_mics.checkpoint.saving import is_main, save_checkpoint
from hf_mics.checkpoint.together import main_decides
from hf_mics.errors import ConfigError

# As accelerate calls them under `ProjectConfiguration(automatic_checkpoint_naming=True)`.
PREFIX = "checkpoint_"


def save_state(
    accelerator: Any, stock_save: Callable[[str], Any], output_dir: str | None, companions: list[Any]
) -> Path:
    """Saves with `stock_save(folder)`, accelerate's own, into a folder that appears when it is complete.

    Under automatic naming the oldest checkpoints beyond `total_limit` are deleted after that, not before.

    Args:
        companions: objects with `save_pretrained`, which go into the folder beside the first model's configuration.
    """
    project = accelerator.project_configuration
    automatic = project.automatic_checkpoint_naming
    if automatic:
        target = Path(accelerator.project_dir, "checkpoints", f"{PREFIX}{accelerator.save_iteration}")
        if main_decides(target.exists):
            raise ConfigError(
                f"the checkpoint {target} exists already. load_state() goes on counting after the checkpoint that it "
                "loads; a new run needs another project_dir, or ProjectConfiguration(iteration=...)."
            )
    elif output_dir is None:
        raise ConfigError("save_state needs output_dir, or ProjectConfiguration(automatic_checkpoint_naming=True).")
    else:
        target = Path(output_dir).expanduser()

    models, optimizers, *_ = prepared(accelerator)

    def write(folder: Path) -> None:
        project.automatic_checkpoint_naming = False
        try:
            stock_save(str(folder))
        finally:
            project.automatic_checkpoint_naming = automatic
        if is_main() and models:
            write_descriptions(folder, models[0], companions)
            write_index(folder, models[0])

    save_checkpoint(accelerator, target, write, models=models, optimizers=optimizers)
    if automatic and is_main():
        rotate(target.parent, PREFIX, project.total_limit)
    return target


def load_state(accelerator: Any, stock_load: Callable[[str], None], input_dir: str | None) -> Path:
    """Loads with `stock_load(folder)` what this run can resume, also from another number of ranks.

    The next accumulation window is a whole one; a rank whose random state was not saved starts a stream of its own; and
    learning rate schedules that accelerate steps once per process are converted to the new number of rows per step.

    Returns:
        The folder it was.
    """
    if input_dir is not None:
        folder = Path(input_dir).expanduser()
    elif accelerator.project_configuration.automatic_checkpoint_naming:
        folder = newest_for_all(Path(accelerator.project_dir, "checkpoints"), PREFIX)
    else:
        raise ConfigError("load_state needs input_dir, or ProjectConfiguration(automatic_checkpoint_naming=True).")
    models, optimizers, *_ = prepared(accelerator)
    mark = check_checkpoint(accelerator, folder, models, optimizers)
    stock_load(str(folder))
    # Gradients of an unfinished window are not in a checkpoint; and a rank that has no file would count from elsewhere,
    # so that ranks would end their windows, and enter hop 2, at different micro-steps.
    accelerator.step = 0
    rank = accelerator.process_index
    continue_random_state(folder / f"random_states_{rank}.pkl", folder / "random_states_0.pkl", rank)
    if mark:
        convert_schedules(accelerator, mark)
    if input_dir is None:
        accelerator.project_configuration.iteration = int(folder.name.removeprefix(PREFIX)) + 1
    return folder


def convert_schedules(accelerator: Any, mark: Mark) -> None:
    """Brings prepared schedules to where they stand in the data when a process takes other batches than before.

    Accelerate steps a prepared schedule once per process and optimizer step, so that its position counts batches of one
    process: the same rows are fewer batches if batches grow.
    """
    before = next((size for size in mark.batch_sizes if size), None)
    now = next((size for size in loader_batch_sizes(accelerator) if size), None)
    if mark.world_size == accelerator.num_processes or not before or not now or before == now:
        return
    for wrapped in prepared(accelerator).schedulers:
        scheduler = getattr(wrapped, "scheduler", wrapped)
        if not getattr(wrapped, "step_with_optimizer", False) or getattr(wrapped, "split_batches", False):
            continue
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler.last_epoch = round(scheduler.last_epoch * before / now)
