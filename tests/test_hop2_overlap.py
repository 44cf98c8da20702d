"""Does hop 2 run below the backward on CPUs wherever nobody reads its result early, and only there?"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.on_ranks import Layout, on_ranks
from tests.toy import Net, Pair

TWO_REPLICAS = Layout(4, 2, 2)
UNITS = 4  # three layers and the root
DEFERRED = ["issued"] * UNITS + ["awaited"] * UNITS
AT_ONCE = ["issued", "awaited"] * UNITS


class Watched:
    """The real group of a hop 2, writing down when its all-reduces are issued and waited for."""

    def __init__(self, inner: dist.ProcessGroup, events: list[str]) -> None:
        self._inner, self._events = inner, events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def allreduce(self, *args: Any) -> Any:
        self._events.append("issued")
        work, events = self._inner.allreduce(*args), self._events

        class Work:
            def wait(self) -> None:
                events.append("awaited")
                work.wait()

        return Work()


def watch(pair: Pair) -> list[str]:
    events: list[str] = []
    for unit in pair.engine.units:
        group: Any = unit.replication_group
        group.inner = Watched(group.inner, events)
    return events


@on_ranks(TWO_REPLICAS)
def test_every_unit_is_issued_before_the_first_is_awaited(layout: Layout):
    for wire in ("float32", "bfloat16"):
        pair = Pair(layout, wire=wire)
        events = watch(pair)
        for step in range(2):
            pair.window(step, 3)
            assert events == DEFERRED
            events.clear()
            if wire == "float32":
                pair.assert_same_gradients()
            pair.step()
        if wire == "float32":
            pair.assert_same_weights()


@on_ranks(TWO_REPLICAS)
def test_a_gradient_that_is_there_already_is_added_to_the_finished_result(layout: Layout):
    pair = Pair(layout)
    pair.window(0)
    events = watch(pair)
    # A window of one micro-step: in a longer one the first micro-step takes the gradient into the partial sum.
    pair.window(1, 1)
    assert events == AT_ONCE
    pair.assert_same_gradients()


@on_ranks(TWO_REPLICAS)
def test_a_hook_on_the_gradient_sees_the_finished_result(layout: Layout):
    pair = Pair(layout)
    seen = {}
    for name, param in pair.mics.named_parameters():
        param.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.full_tensor().clone()}))
    events = watch(pair)
    pair.window(0)
    assert events == AT_ONCE
    for name, param in pair.mics.named_parameters():
        if param.grad is not None:
            assert torch.equal(seen[name], param.grad.full_tensor())
    pair.assert_same_gradients()


@on_ranks(TWO_REPLICAS)
def test_a_gradient_of_another_dtype_is_cast_from_the_finished_result(layout: Layout):
    pair = Pair(layout, build=lambda: Net().to(torch.bfloat16))
    events = watch(pair)
    pair.window(0, twin=False)
    assert events == AT_ONCE


@on_ranks(TWO_REPLICAS)
def test_a_layer_that_is_skipped_in_the_last_micro_step_is_awaited_too(layout: Layout):
    pair = Pair(layout)
    events = watch(pair)
    pair.backward(0, 0, of=2)
    pair.backward(0, 1, of=2, run=(0, 2))
    assert events == DEFERRED
    pair.assert_same_gradients()
