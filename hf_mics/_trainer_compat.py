"""The one file that reaches into transformers' Trainer, checked on transformers 5.23.0.

A Trainer makes its Accelerator at the start of its constructor, from the name `Accelerator` in its module, before any
callback hears of it. So the constructor is wrapped, once per process; around Trainers that nobody asks for, the wrapper
does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import transformers
from transformers import Trainer, TrainerCallback
from transformers import trainer as trainer_module

from hf_mics.errors import MiCSError

Around = Callable[[Trainer, Mapping[str, Any]], AbstractContextManager[None]]

_MARK = "_hf_mics_around"


def run_constructors_inside(around: Around) -> None:
    """From now on every Trainer is constructed inside `around(trainer, arguments)`, arguments by name."""
    original = Trainer.__init__
    if hasattr(original, _MARK):
        return
    if not hasattr(trainer_module, "Accelerator"):
        raise MiCSError(
            f"transformers {transformers.__version__} has no transformers.trainer.Accelerator, which MiCSCallback "
            "replaces. hf_mics was checked on transformers 5.23.0; install that, or launch with `-m hf_mics`."
        )
    signature = inspect.signature(original)

    @functools.wraps(original)
    def construct(self: Trainer, *args: Any, **kwargs: Any) -> None:
        with around(self, signature.bind_partial(self, *args, **kwargs).arguments):
            original(self, *args, **kwargs)

    setattr(construct, _MARK, True)
    cast(Any, Trainer).__init__ = construct


def accelerator_class() -> Any:
    """What Trainers make their accelerator with now."""
    return trainer_module.Accelerator


@contextlib.contextmanager
def replaced_accelerator(make: Callable[..., Any]) -> Iterator[None]:
    """Inside, Trainers make their accelerator with `make(**kwargs)`."""
    former = trainer_module.Accelerator
    cast(Any, trainer_module).Accelerator = make
    try:
        yield
    finally:
        cast(Any, trainer_module).Accelerator = former


def report_first(trainer: Trainer, callback: TrainerCallback) -> None:
    """Moves `callback` before the Trainer's reporting integrations, which log what they find when their turn comes.

    The first place stays with the Trainer's own callback, which decides whether this step logs.
    """
    callbacks = trainer.callback_handler.callbacks
    callbacks.remove(callback)
    callbacks.insert(1, callback)
