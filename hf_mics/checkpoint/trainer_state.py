"""How do a stock Trainer's checkpoints become complete or absent, and stop when they are told to?

The one file that reaches into how transformers' Trainer saves and resumes, checked on transformers 5.23.0. A few of its
methods are wrapped, once per process; around Trainers whose accelerator is not under MiCS, the wrappers do nothing.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as trainer_module
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from hf_mics._hf_compat import CHECKPOINT_FUNCTIONS, run_checkpoint_functions_inside, wrap_once
from hf_mics.checkpoint.check import check_folder
from hf_mics.checkpoint.contents import loads_from_full_state, write_descriptions, write_index
from hf_mics.checkpoint.folder import rotate
from hf_mics.checkpoint.prompts import computed_prompts, learns_a_prompt
from hf_mics.checkpoint.resuming import (
    around_checkpoint_function,
    check_checkpoint,
    continue_random_state,
    in_format,
    newest_for_all,
)
from hf_mics.checkpoint.saving import format_of, is_main, save_checkpoint
from hf_mics.checkpoint.stop import StopRequest
from hf_mics.checkpoint.together import main_decides, together
from hf_mics.early_evaluation import evaluation_loop
from hf_mics.errors import CheckpointError, MiCSError

PREFIX = f"{PREFIX_CHECKPOINT_DIR}-"

Method = Callable[..., Any]


def make_trainers_safe() -> None:
    """From now on every Trainer whose accelerator is under MiCS saves and resumes as this file says.

    It can then also evaluate before it trains (`early_evaluation.py`).

    Raises:
        MiCSError: this transformers has no such methods.
    """
    around: dict[str, Method] = {
        "train": _train,
        "save_model": _save_model,
        "_save_checkpoint": _save_checkpoint,
        "_load_from_checkpoint": _load_from_checkpoint,
        "_load_rng_state": _load_rng_state,
        "evaluation_loop": evaluation_loop,
    }
    missing = [name for name in (*around, "_get_output_dir", "_push_from_checkpoint") if not hasattr(Trainer, name)]
    missing += [name for name in CHECKPOINT_FUNCTIONS if not hasattr(trainer_module, name)]
    if missing:
        raise MiCSError(
            f"transformers {transformers.__version__} has no Trainer.{missing[0]}, around which hf_mics makes "
            "checkpoints safe. hf_mics was checked on transformers 5.23.0; install that."
        )
    for name, function in around.items():
        wrap_once(Trainer, name, functools.partial(_around, function))
    run_checkpoint_functions_inside(around_checkpoint_function, trainer_module)


def _around(around: Method, original: Method) -> Method:
    def method(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        stock = functools.partial(original, self)
        if not (getattr(self.accelerator, "knows_mics", False) and self.is_fsdp_enabled):
            return stock(*args, **kwargs)
        return around(stock, self, *args, **kwargs)

    return method


def _train(
    stock: Method, trainer: Any, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
) -> Any:
    if resume_from_checkpoint is True:
        resume_from_checkpoint = str(newest_for_all(Path(trainer.args.output_dir), PREFIX))
    elif resume_from_checkpoint:
        folder = Path(resume_from_checkpoint)
        main_decides(lambda: _check_is_a_trainers(folder))
    trainer.accelerator.micro_steps = trainer.args.gradient_accumulation_steps
    with _stopping_at_sigterm(trainer):
        return stock(resume_from_checkpoint, *args, **kwargs)


def _check_is_a_trainers(folder: Path) -> None:
    check_folder(folder)
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise CheckpointError(
            f"{folder} is not a Trainer's checkpoint: expected {TRAINER_STATE_NAME} in it, which says at which step to "
            "go on. What Accelerator.save_state wrote is resumed with load_state, by the loop that saved it."
        )


def _save_checkpoint(stock: Method, trainer: Any, model: Any, trial: Any) -> None:
    run_dir = Path(trainer._get_output_dir(trial=trial))
    target = run_dir / f"{PREFIX}{trainer.state.global_step}"

    def write(folder: Path) -> None:
        with _redirected(trainer, folder.parent):
            stock(model, trial)
        if is_main():
            write_index(folder, trainer.model)
        best = trainer.state.best_model_checkpoint
        # One that lies in `run_dir` the Trainer has looked for in vain: that of a run whose folder was moved since.
        moved = run_dir / f"{PREFIX}{trainer.state.best_global_step}"
        is_new = best is not None and Path(best).absolute() == folder.absolute()
        if is_new or (best is None and moved.is_dir()):
            trainer.state.best_model_checkpoint = str(target if is_new else moved)
            if trainer.args.should_save:
                trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    save_checkpoint(trainer.accelerator, target, write, models=[trainer.model], optimizers=[trainer.optimizer])
    if trainer.args.push_to_hub:
        trainer._push_from_checkpoint(str(target))
    if is_main():
        rotate(run_dir, PREFIX, trainer.args.save_total_limit, protected=trainer.state.best_model_checkpoint)


@contextlib.contextmanager
def _redirected(trainer: Any, run_dir: Path) -> Iterator[None]:
    """Inside, the Trainer takes `run_dir` for its output directory and pushes nothing to the hub."""
    replaced = {"_get_output_dir": lambda trial: str(run_dir), "_push_from_checkpoint": lambda folder: None}
    vars(trainer).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del vars(trainer)[name]


def _is_redirected(trainer: Any) -> bool:
    """Whether a checkpoint is being saved, and not a model."""
    return "_get_output_dir" in vars(trainer)


def _save_model(stock: Method, trainer: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
    plugin = trainer.accelerator.state.fsdp_plugin
    folder = output_dir if output_dir is not None else trainer.args.output_dir
    if _is_redirected(trainer) and _saves_weights_later(trainer):
        together(f"could not write to {folder}", lambda: _describe(trainer, Path(str(folder))))
        return
    # The Trainer writes nothing, and says nothing, while the plugin is set to sharded state.
    with in_format(plugin, "full"), computed_prompts(trainer.model):
        together(f"could not save the model to {folder}", lambda: stock(output_dir, _internal_call))


def _saves_weights_later(trainer: Any) -> bool:
    """Whether the weights come into this checkpoint with the optimizer, in a form that needs none beside it."""
    if format_of(trainer.accelerator.state.fsdp_plugin) == "sharded":
        return True
    return not trainer.args.save_only_model and loads_from_full_state(trainer.model)


def _describe(trainer: Any, folder: Path) -> None:
    if not trainer.args.should_save:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    write_descriptions(folder, trainer.model, [tokenizer] if tokenizer is not None else [])
    torch.save(trainer.args, folder / TRAINING_ARGS_NAME)


def _load_from_checkpoint(stock: Method, trainer: Any, resume_from_checkpoint: str, model: Any = None) -> Any:
    folder = Path(resume_from_checkpoint)
    adapter_only = not learns_a_prompt(trainer.model)
    check_checkpoint(trainer.accelerator, folder, [trainer.model], [trainer.optimizer], adapter_only=adapter_only)
    return stock(resume_from_checkpoint, model)


def _load_rng_state(stock: Method, trainer: Any, checkpoint: str | None) -> None:
    if checkpoint is None:
        return
    alone, ranked = Path(checkpoint, "rng_state.pth"), "rng_state_{}.pth"
    rank = trainer.args.process_index
    own = Path(checkpoint, ranked.format(rank)) if trainer.args.world_size > 1 else alone
    of_rank_0 = next((path for path in (Path(checkpoint, ranked.format(0)), alone) if path.is_file()), alone)
    if not continue_random_state(own, of_rank_0, rank):
        stock(checkpoint)


class StopOnSigterm(TrainerCallback):
    """Saves at the end of the optimizer step in which SIGTERM reached any rank, and ends every process with code 0."""

    def __init__(self, trainer: Any) -> None:
        self._device = trainer.accelerator.device
        self._request = StopRequest()
        self._request.listen()
        self._stopping = False
        self._stepped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Asks for a checkpoint and the end of training; an evaluation that is due would use up the time left."""
        self._stepped = True
        if self._request.agreed(self._device):
            self._stopping = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Asks for a checkpoint of the step after which this evaluation ran, not for another step.

        Before the first step (`eval_on_start`) there is nothing to save, and it ends the process.
        """
        if not self._stepped:
            if self._request.agreed(self._device):
                self._end(state, "stopped before the first optimizer step, so there was nothing new to save")
            return
        # A Trainer that keeps the best alone decides anew whether to save once this returns.
        if args.save_strategy != SaveStrategy.BEST and self._request.agreed(self._device):
            self._stopping = True
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the process: what a script does after train() is meant for a finished training."""
        if self._stopping:
            saved = f"{args.output_dir}/{PREFIX}{state.global_step}"
            self._end(state, f"saved {saved} at the end of the optimizer step and stopped. Resume from there")

    def _end(self, state: TrainerState, done: str) -> None:
        if state.is_world_process_zero:
            print(f"MiCS: SIGTERM received; {done}.", file=sys.stderr, flush=True)
        raise SystemExit(0)

    def close(self) -> None:
        """Gives SIGTERM back."""
        self._request.ignore()


@contextlib.contextmanager
def _stopping_at_sigterm(trainer: Any) -> Iterator[None]:
    callback = StopOnSigterm(trainer)
    # Last, so that nothing that another callback decides for this step is left in force.
    trainer.add_callback(callback)
    try:
        yield
    finally:
        callback.close()
        trainer.remove_callback(callback)
