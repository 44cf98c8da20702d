"""How does a Trainer evaluate a model that it has not begun to train?

accelerate's FSDP2 shards a model together with its optimizer, and a Trainer has none before `train()`. So the model is
evaluated as it is, whole on every rank, and is afterwards as it was: training then shards it as ever.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from hf_mics._hf_compat import known_for_evaluation, prepared
from hf_mics._torch_compat import is_root
from hf_mics.absent_weights import expect_weights, has_absent_weights, move_present
from hf_mics.errors import ConfigError
from hf_mics.process_groups import say_to_all
from hf_mics.sharding import check_everywhere, share_weights


def evaluation_loop(stock: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs `Trainer.evaluation_loop`, which `evaluate()` and `predict()` go through, also before training.

    Raises:
        ConfigError: the Trainer was given an optimizer of weights that only rank 0 has; on every rank alike.
    """
    accelerator, model = trainer.accelerator, trainer.model
    if prepared(accelerator).models:
        return stock(*args, **kwargs)
    # Another Trainer may have sharded the model before.
    if not is_root(model):
        _make_whole(trainer)
    with _unchanged_tensors(model), known_for_evaluation(accelerator, model):
        return stock(*args, **kwargs)


@contextlib.contextmanager
def _unchanged_tensors(model: nn.Module) -> Iterator[None]:
    """Inside, a Trainer with `bf16_full_eval` may cast the model; training begins with the weights from before."""
    weights = [(param, param.data) for param in model.parameters()]
    buffers = [(module, dict(module.named_buffers(recurse=False))) for module in model.modules()]
    try:
        yield
    finally:
        for param, data in weights:
            param.data = data
        for module, former in buffers:
            for name, buffer in former.items():
                setattr(module, name, buffer)


def _make_whole(trainer: Any) -> None:
    """Brings the whole model to this rank's device, with rank 0's weights, as training will have them."""
    accelerator, model = trainer.accelerator, trainer.model
    _check_optimizer(trainer)
    if accelerator.is_main_process:
        print(
            "MiCS: training has not begun, so the model is evaluated unsharded, whole on every rank. "
            "TrainingArguments(eval_on_start=True) evaluates it sharded.",
            file=sys.stderr,
            flush=True,
        )
    make_whole(model, accelerator.device)


def make_whole(model: nn.Module, device: torch.device) -> None:
    """Gives every rank the whole `model` on `device` with rank 0's weights, also ranks that have none; a collective.

    Raises:
        ConfigError: ranks hold different models, or rank 0 has no weights; on every rank alike.
    """
    check_everywhere(model)
    move_present(model, device)
    share_weights(model, device)
    expect_weights(model)


def _check_optimizer(trainer: Any) -> None:
    missing = say_to_all(lambda: trainer.optimizer is not None and has_absent_weights(trainer.model))
    if any(missing):
        raise ConfigError(
            "this Trainer was given an optimizer, whose parameters are on the meta device of rank "
            f"{missing.index(True)}: evaluated before training the model would get others, with weights. Evaluate with "
            "TrainingArguments(eval_on_start=True), when the model is sharded, or load it on every rank "
            "(fsdp_cpu_ram_efficient_loading: false)."
        )
