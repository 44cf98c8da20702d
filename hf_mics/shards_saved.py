"""What becomes of shards that a script saves? Nothing: it is told before they are written.

`torch.save(model.state_dict(), path)` writes the shards of the rank that calls it, under the shapes of the whole
weights; what is missing shows when the file is loaded, after the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_mics._hf_compat import wrap_once
from hf_mics.errors import ConfigError


def refuse_to_save_shards() -> None:
    """From now on `torch.save`, through which accelerate saves too, refuses shards of parameters."""
    wrap_once(torch, "save", _refusing)


def check_whole(obj: Any) -> None:
    """Refuses what holds shards.

    Raises:
        ConfigError: it does.
    """
    if _holds_shards(obj):
        raise ConfigError(
            "what is saved here holds shards of parameters, this rank's alone, which no other program could load. "
            "Expected whole tensors, gathered on every rank before one of them saves: accelerator.get_state_dict(model)"
            " in place of model.state_dict(), accelerator.save_state(folder) for an optimizer, tensor.full_tensor() "
            "for any other."
        )


def _refusing(stock: Callable[..., Any]) -> Callable[..., Any]:
    def save(obj: Any, *args: Any, **kwargs: Any) -> Any:
        check_whole(obj)
        return stock(obj, *args, **kwargs)

    return save


# A dataset that a script has tokenized and keeps has them by the million.
_NO_CONTAINERS = {int, float, str, bool, bytes, type(None)}


def _holds_shards(obj: Any) -> bool:
    seen, left = set(), [obj]
    while left:
        each = left.pop()
        if isinstance(each, DTensor):
            return True
        if isinstance(each, nn.Module):
            left += each.parameters()
        elif isinstance(each, torch.optim.Optimizer):
            left += each.param_groups
        elif isinstance(each, dict | list | tuple) and id(each) not in seen:
            seen.add(id(each))  # what holds itself, which torch.save takes
            values = each.values() if isinstance(each, dict) else each
            left += [value for value in values if type(value) not in _NO_CONTAINERS]
    return False
