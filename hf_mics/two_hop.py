"""When do gradients cross between partition groups? The two-hop schedule (MiCS section 3.4)

Every micro-step ends in hop 1: FSDP2 reduce-scatters inside the partition group and each unit keeps one shard of the
partial sum. Hop 2, the all-reduce over the replication group, runs only in the micro-step that closes the
accumulation window, overlapped with its backward.

FSDP2's `set_requires_all_reduce` already defers hop 2. `TwoHopSchedule` adds what a training loop needs around it:

- `set_requires_gradient_sync`, which Accelerate's `no_sync` and plain FSDP2 loops call, defers hop 2 instead of
  keeping whole unsharded gradients.
- `zero_grad()`, on the model or on any optimizer, drops an abandoned window as it does in one process; FSDP2 alone
  leaks it into the next window. `window.py` says how.
- A forward or backward that raised is cleared away by the next forward.
- An optimizer step in mid-window is refused: it would apply gradients that differ between replicas. So is one that
  would apply none, because FSDP2 did not hear of the backward.
- So is a gradient that autograd computes for a shard: neither hop would see it, and each rank would train its shard on
  its own rows alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from hf_mics._torch_compat import (
    Unit,
    after_backward,
    gradient_hooks,
    in_backward,
    in_forward_method,
    override_method,
    remove_override,
    reset_after_error,
    unfinished_pass,
)
from hf_mics.errors import ConfigError, WindowError
from hf_mics.hop2 import ReplicationGroup
from hf_mics.window import Window


class TwoHopSchedule:
    """Two-hop synchronization of one sharded model, from construction until `detach`.

    Args:
        model: the root module, sharded with `fully_shard`.
        units: its communication units.
        hop2_groups: the group over which each of them all-reduces.
    """

    def __init__(self, model: nn.Module, units: list[Unit], hop2_groups: list[ReplicationGroup]) -> None:
        self._model = model
        self._windows = [Window(unit, hop2, hop2_groups) for unit, hop2 in zip(units, hop2_groups, strict=True)]
        for unit in units:
            unit.reduces = True
        self._in_forward = False
        self._hooks = (
            model.register_forward_pre_hook(torch.compiler.disable(self._begin_forward), prepend=True),
            model.register_forward_hook(torch.compiler.disable(self._end_forward)),
        )
        self._undo_after_backward = after_backward(model, self._end_backward)
        self._guards: list[RemovableHandle] = []
        override_method(model, "set_requires_gradient_sync", _set_requires_gradient_sync)
        override_method(model, "reset_iter_state", self._reset_iter_state)
        _watch_optimizers()
        _SCHEDULES.add(self)

    @property
    def awaits_backward(self) -> bool:
        """Whether a forward with gradients has run whose backward has not."""
        return any(window.awaits_backward for window in self._windows)

    def open_names(self) -> list[str]:
        """Names of the units whose window is open."""
        return [window.unit.name or "(root)" for window in self._windows if window.is_open]

    def missed_names(self) -> list[str]:
        """Names of the units whose gradients FSDP2 has left where autograd put them, as after no pass that it knows."""
        if unfinished_pass(self._model) is not None:
            return []
        return [window.unit.name or "(root)" for window in self._windows if window.unit.has_unsharded_gradients]

    def drop_window(self) -> None:
        """Forgets the partial sums of an unfinished accumulation window, as `zero_grad()` would."""
        for window in self._windows:
            window.drop()

    def owns_any(self, params: set[int]) -> bool:
        """Whether one of the parameters with these ids belongs to the model."""
        return any(id(p) in params for window in self._windows for p in window.unit.sharded_params)

    def detach(self) -> None:
        """Gives the model back to FSDP2's own schedule; an open window is dropped."""
        self.drop_window()
        for window in self._windows:
            window.detach()
        for handle in (*self._hooks, *self._guards):
            handle.remove()
        self._undo_after_backward()
        remove_override(self._model, "set_requires_gradient_sync")
        remove_override(self._model, "reset_iter_state")
        _SCHEDULES.discard(self)

    def _begin_forward(self, *_: Any) -> None:
        """Clears away a pass that raised: a bad batch that was skipped, or out of memory and a smaller batch.

        Earlier micro-steps of the window survive a forward that raised. A backward that raised has already mixed its
        gradients into them, so the window is dropped.
        """
        if in_backward():
            return
        if torch.is_grad_enabled():
            for window in self._windows:
                name = window.unit.name or "(root)"
                refuse_gradient_hooks((name, param) for param in window.unit.sharded_params)
                self._guard(name, window.unit.sharded_params)
        unfinished = unfinished_pass(self._model)
        # FSDP2 has begun a forward for such a method, inside which this is the model's own. One that raised earlier has
        # left `_in_forward` behind.
        inside = unfinished == "forward" and not self._in_forward and in_forward_method(self._model)
        if unfinished is not None and not inside:
            self._clear_away(unfinished)
        self._in_forward = True

    def _end_forward(self, *_: Any) -> None:
        self._in_forward = False

    def _clear_away(self, unfinished: str) -> None:
        sums = [window.unit.partial_sum if unfinished == "forward" else None for window in self._windows]
        reset_after_error(self._model)
        for window, partial in zip(self._windows, sums, strict=True):
            window.unit.forget_unsharded_gradients()
            window.unit.partial_sum = partial

    def _guard(self, name: str, params: Iterable[nn.Parameter]) -> None:
        """Anew in every forward: a script may have let frozen parameters be trained since."""
        for param in params:
            if param.requires_grad and not gradient_hooks(param):
                self._guards.append(param.register_hook(_ShardGuard(name)))

    def _reset_iter_state(self, model: nn.Module) -> None:
        """Replaces `FSDPModule.reset_iter_state`, which leaves gradients on unsharded parameters."""
        reset_after_error(model)
        self._in_forward = False
        for window in self._windows:
            window.drop()
            window.unit.forget_unsharded_gradients()

    def _end_backward(self) -> None:
        for window in self._windows:
            window.end_backward()
        for window in self._windows:
            window.finish_hop2()


class _ShardGuard:
    """A hook on the gradient of a sharded parameter. FSDP2 computes on gathered ones, so autograd never gets there."""

    def __init__(self, unit: str) -> None:
        self._unit = unit

    def __call__(self, gradient: torch.Tensor) -> None:
        raise ConfigError(
            f"the loss was computed from shards of {self._unit} (by full_tensor() or to_local() of a parameter), so "
            "their gradient misses other ranks' rows and no hop adds them. Expected parameters that are gathered: call "
            "the module that holds them inside the model's forward."
        )


def refuse_gradient_hooks(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuses hooks that nobody would call: autograd sees gathered parameters, the hooks stand on the sharded ones.

    Args:
        parameters: each with the name of the parameter or of its unit.

    Raises:
        ConfigError: a parameter has a hook of `register_hook`.
    """
    for name, param in parameters:
        if not all(isinstance(hook, _ShardGuard) for hook in gradient_hooks(param)):
            raise ConfigError(
                f"{name} has a hook of register_hook, which FSDP2 never calls. Change gradients between backward and "
                "the optimizer step, or use register_post_accumulate_grad_hook after prepare(). (wandb.watch registers "
                "such hooks for log='gradients' or 'all'; WANDB_WATCH=false turns it off.)"
            )


def _set_requires_gradient_sync(model: nn.Module, requires_gradient_sync: bool, *, recurse: bool = True) -> None:
    """Replaces `FSDPModule.set_requires_gradient_sync`: without synchronization, hop 1 still runs."""
    # FSDP2's own may have been called before, or on a submodule, and have turned hop 1 off as well.
    FSDPModule.set_requires_gradient_sync(model, True, recurse=recurse)  # type: ignore[arg-type]
    model.set_requires_all_reduce(requires_gradient_sync, recurse=recurse)  # type: ignore[operator]


_SCHEDULES: WeakSet[TwoHopSchedule] = WeakSet()


@functools.cache  # once
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_refuse_step_in_mid_window)


def _refuse_step_in_mid_window(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for schedule in _SCHEDULES:
        opened, missed = schedule.open_names(), schedule.missed_names()
        if not opened and not missed:
            continue
        params = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not schedule.owns_any(params):
            continue
        if opened:
            raise WindowError(
                f"optimizer step in mid-window: the gradients of {len(opened)} units ({', '.join(opened[:3])}"
                f"{', ...' if len(opened) > 3 else ''}) were reduced inside their partition group (hop 1) but not "
                "across replicas (hop 2), so every replica would step differently. Expected the last backward of the "
                "window to run outside no_sync(), or after set_requires_gradient_sync(True); call zero_grad() to drop "
                "an unfinished window."
            )
        raise WindowError(
            f"optimizer step without gradients: FSDP2 did not see the backward through {', '.join(missed[:3])}, so the "
            "weights would stay as they are. It looks for tensors in what forward returns: expected a tensor, tuple, "
            "list, dict or transformers' ModelOutput (since torch 2.13 also a dataclass), got an object of another "
            "class. Return one of these."
        )
