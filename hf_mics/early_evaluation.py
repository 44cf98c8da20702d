"""How does a Trainer evaluate a model that it has not begun to train?

accelerate's FSDP2 shards a model together with its optimizer, and a Trainer has none before `train()`. So the model is
evaluated as it is, whole on every rank, and is afterwards as it was: training then shards it as ever.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from torch import nn

from hf_mics._hf_compat import known_for_evaluation, prepared
from hf_mics._torch_compat import is_root
from hf_mics.errors import ConfigError
from hf_mics.process_groups import say_to_all
from hf_mics.sharding import check_everywhere, share_weights


def evaluation_loop(stock: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs `Trainer.evaluation_loop`, which `evaluate()` and `predict()` go through, also before training.

    Raises:
        ConfigError: some rank has no weights, because only rank 0 loaded them; on every rank alike.
    """
    accelerator, model = trainer.accelerator, trainer.model
    if prepared(accelerator).models:
        return stock(*args, **kwargs)
    # Another Trainer may have sharded the model before.
    if not is_root(model):
        _make_whole(accelerator, model)
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


def _make_whole(accelerator: Any, model: nn.Module) -> None:
    """Brings the whole `model` to this rank's device, with rank 0's weights, as training will have them."""
    _check_weights(model)
    check_everywhere(model)
    if accelerator.is_main_process:
        print(
            "MiCS: training has not begun, so the model is evaluated unsharded, whole on every rank. "
            "TrainingArguments(eval_on_start=True) evaluates it sharded.",
            file=sys.stderr,
            flush=True,
        )
    model.to(accelerator.device)
    share_weights(model, accelerator.device)


def _check_weights(model: nn.Module) -> None:
    missing = say_to_all(lambda: any(t.is_meta for t in chain(model.parameters(), model.buffers())))
    if any(missing):
        raise ConfigError(
            "the model cannot be evaluated before training: it would be evaluated unsharded, and expects its weights "
            f"on every rank; rank {missing.index(True)} has them on the meta device. Evaluate with "
            "TrainingArguments(eval_on_start=True), when the model is sharded, or load it on every rank "
            "(fsdp_cpu_ram_efficient_loading: false)."
        )
