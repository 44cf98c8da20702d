"""What does an evaluation leave gathered? Nothing, on all ranks alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_mics._torch_compat import after_forward_methods, copy_from, find_units, passes_running, plain
from hf_mics.engine import is_under_mics, mics_engine


def free_after_evaluation(model: nn.Module) -> None:
    """From now on a forward without gradients frees what it gathered, the root's parameters too, as a backward does.

    FSDP2 keeps those for a backward or the next forward. What a script wrote into them after an evaluation (clipped
    weights, an average put back) would be lost without a word when they are freed. It happens in the forward, which all
    ranks run: a rank that freed them when asked for its parameters would gather again while others do not.

    So does a method for which FSDP2 runs its forward hooks, `generate` and what a script registers. Nothing is freed
    while a forward with gradients waits for its backward, which may need a head that it would not gather again and
    frees everything itself, nor by a pass inside another of the model's own. What is returned is copied first.
    """
    sharded = model if isinstance(model, FSDPModule) else plain(model)
    units = list(find_units(sharded))

    def free(output: Any) -> Any:
        inside = passes_running(sharded) > 1
        if inside or not is_under_mics(model) or mics_engine(model).schedule.awaits_backward:
            return output
        gathered = [unit for unit in units if unit.is_gathered]
        output = copy_from(output, {address for unit in gathered for address in unit.gathered_addresses})
        for unit in gathered:
            unit.module.reshard()
        return output

    def after_forward(_: nn.Module, args: Any, output: Any) -> Any:
        return output if torch.is_grad_enabled() else free(output)

    sharded.register_forward_hook(torch.compiler.disable(after_forward))
    after_forward_methods(sharded, free)
