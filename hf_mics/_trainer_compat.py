"""How does a stock Trainer come by another Accelerator than accelerate's? Checked on transformers 5.23.0.

A Trainer makes its Accelerator at the start of its constructor, from the name `Accelerator` in its module, before any
callback hears of it. So the constructor is wrapped, once per process; around Trainers that nobody asks for, the wrapper
does nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import transformers
from transformers import Trainer, TrainerCallback
from transformers import trainer as trainer_module

from hf_mics._hf_compat import replaced, wrap_once
from hf_mics.errors import MiCSError

Around = Callable[[Trainer, Mapping[str, Any]], AbstractContextManager[None]]


def run_constructors_inside(around: Around) -> None:
    """From now on every Trainer is constructed inside `around(trainer, arguments)`, arguments by name."""
    if not hasattr(trainer_module, "Accelerator"):
        raise MiCSError(
            f"transformers {transformers.__version__} has no transformers.trainer.Accelerator, which MiCSCallback "
            "replaces. hf_mics was checked on transformers 5.23.0; install that, or launch with `-m hf_mics`."
        )

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(original)

        def construct(self: Trainer, *args: Any, **kwargs: Any) -> None:
            with around(self, signature.bind_partial(self, *args, **kwargs).arguments):
                original(self, *args, **kwargs)

        return construct

    wrap_once(Trainer, "__init__", wrap)


def accelerator_class() -> Any:
    """What Trainers make their accelerator with now."""
    return trainer_module.Accelerator


def replaced_accelerator(make: Callable[..., Any]) -> AbstractContextManager[None]:
    """Inside, Trainers make their accelerator with `make(**kwargs)`."""
    return replaced((trainer_module, "Accelerator", make))


def report_first(trainer: Trainer, callback: TrainerCallback) -> None:
    """Moves `callback` before the Trainer's reporting integrations, which log what they find when their turn comes.

    The first place stays with the Trainer's own callback, which decides whether this step logs.
    """
    callbacks = trainer.callback_handler.callbacks
    callbacks.remove(callback)
    callbacks.insert(1, callback)
