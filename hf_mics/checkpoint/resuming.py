"""How does a run take up a checkpoint, also one that other ranks saved?"""

from __future__ import annotations

import contextlib
import functools
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import nn

from hf_mics._hf_compat import changed_full_state, loading_each_module_once, loading_no_empty_groups
from hf_mics.checkpoint.check import check_folder, check_model, check_optimizer, newest
from hf_mics.checkpoint.contents import optimizer_class, present_shapes, share_tied, state_format, trained_parameters
from hf_mics.checkpoint.mark import Mark, read_mark
from hf_mics.checkpoint.prompts import learns_a_prompt
from hf_mics.checkpoint.saving import format_of, is_main, storage_for
from hf_mics.checkpoint.together import main_decides, together
from hf_mics.wrapping import class_name


def newest_for_all(parent: Path, prefix: str) -> Path:
    """The newest complete checkpoint `PREFIX<number>` in `parent`, on every rank; rank 0 says what it skipped.

    Raises:
        CheckpointError: there is none; on every rank alike.
    """
    path, skipped = main_decides(lambda: newest(parent, prefix))
    if skipped and is_main():
        print(f"MiCS: {path} is the newest complete checkpoint\n{skipped}", file=sys.stderr, flush=True)
    return path


def check_checkpoint(
    accelerator: Any, folder: Path, models: Sequence[nn.Module], optimizers: Sequence[Any], adapter_only: bool = False
) -> Mark | None:
    """Makes sure that every model and optimizer finds its own state in `folder`, before any is loaded; a collective.

    Returns:
        The checkpoint's mark; None for one of plain accelerate.

    Raises:
        CheckpointError: on every rank alike.
    """
    shapes = [present_shapes(model, adapter_only, state_format(folder, i)) for i, model in enumerate(models)]

    def check() -> Mark | None:
        mark = check_folder(folder)
        for index, model in enumerate(models):
            check_model(folder, mark, index, shapes[index], class_name(model))
        for index, optimizer in enumerate(optimizers):
            names = set(trained_parameters(models[index], optimizer))
            check_optimizer(folder, mark, index, names, optimizer_class(optimizer))
        return mark

    mark = main_decides(check)
    if is_main():
        here, note = f"{accelerator.topology.replication_size}x{accelerator.topology.partition_size}", ""
        if mark is None:
            note = " (without a completion mark, as plain accelerate saves it)"
        elif mark.layout != here:
            note = f" (saved on {mark.layout} ranks, going on with {here})"
        print(f"MiCS: resuming from {folder}{note}", file=sys.stderr, flush=True)
    return mark


@contextlib.contextmanager
def in_format(plugin: Any, wanted: str) -> Iterator[None]:
    """Inside, accelerate's FSDP plugin is set to write and read "sharded" or "full" state."""
    names = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
    former = {name: getattr(plugin, name) for name in names}
    if wanted != format_of(plugin):
        plugin.state_dict_config = plugin.optim_state_dict_config = None
        plugin.set_state_dict_type(f"{wanted}_STATE_DICT")
    try:
        yield
    finally:
        for name, value in former.items():
            setattr(plugin, name, value)


def around_checkpoint_function(
    original: Callable[..., Any], plugin: Any, accelerator: Any, *rest: Any, **options: Any
) -> Any:
    """Runs one of accelerate's FSDP checkpoint functions on our storage; if it fails on a rank, it fails on all.

    Loading takes the format that it finds, whatever the plugin is set to write.
    """
    is_model, is_load = original.__name__.endswith("model"), original.__name__.startswith("load")
    model = rest[0] if is_model else rest[1]
    folder = Path(options["input_dir"] if "input_dir" in options else rest[1 if is_model else 2]) if is_load else None
    if is_model and learns_a_prompt(model):
        # PEFT would store the prompt without the encoder that is trained.
        options["adapter_only"] = False
    what = f"could not {'load' if is_load else 'save'} {'model' if is_model else 'optimizer'} state"
    with contextlib.ExitStack() as settings:
        settings.enter_context(storage_for(accelerator, model))
        settings.enter_context(loading_each_module_once())
        settings.enter_context(changed_full_state(functools.partial(share_tied, model)))
        if folder:
            settings.enter_context(in_format(plugin, state_format(folder) or format_of(plugin)))
        if folder and not is_model:
            index = options.get("optimizer_index", rest[3] if len(rest) > 3 else 0)
            settings.enter_context(_without_stateless(main_decides(lambda: _stateless(folder, index)), model, rest[0]))
            settings.enter_context(loading_no_empty_groups())
        return together(what, lambda: original(plugin, accelerator, *rest, **options))


def _stateless(folder: Path, index: int) -> list[str]:
    mark = read_mark(folder)
    return mark.optimizers[index].without_state if mark and index < len(mark.optimizers) else []


@contextlib.contextmanager
def _without_stateless(names: list[str], model: nn.Module, optimizer: Any) -> Iterator[None]:
    """Inside, the parameters of which `optimizer` had no state when it was saved count as frozen; they end without any.

    Before it loads, torch gives an optimizer without any state some for every trained parameter, and would not find
    theirs; nor must made state stay, which would count steps that there have not been. An optimizer with state for some
    it takes as it is, and would not find a place for the others' state: such a one starts from none.

    Args:
        names: of those parameters.
    """
    trained = trained_parameters(model, optimizer)
    frozen = [param for name, param in trained.items() if name in names]
    if any(not optimizer.state.get(param) for name, param in trained.items() if name not in names):
        optimizer.zero_grad()
        optimizer.state.clear()
    for param in frozen:
        optimizer.state.pop(param, None)
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in frozen:
            param.requires_grad_(True)


def continue_random_state(own: Path, of_rank_0: Path, rank: int) -> bool:
    """Starts a random stream for a rank whose own was not saved, because the checkpoint comes from fewer ranks.

    It follows from the checkpoint and the rank: another resume finds the same, and no two ranks share one.

    Returns:
        Whether there was need to; else the rank's own state is in `own`.
    """
    if own.is_file() or not of_rank_0.is_file():
        return False
    set_seed((zlib.crc32(of_rank_0.read_bytes()) + rank) % 2**32)
    return True
