"""Does hop 2 run below the backward on CPUs wherever nobody reads its result early, and only there?"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_mics import apply_mics, mics_engine
from tests.on_ranks import Layout, on_ranks
from tests.toy import Net, Pair, assert_close, batch, gradients, loss_of, my_part, shard

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


def watch(pair: Any) -> list[str]:
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
            # bf16 rounds three times, each time by at most 2^-8 of addends that may be twice as large as their average.
            expected = {name: p.grad for name, p in pair.twin.named_parameters() if p.grad is not None}
            assert_close(gradients(pair.mics), expected, 6 * 2.0**-8)
            pair.step()
        if wire == "float32":
            pair.assert_same_weights()


@on_ranks(TWO_REPLICAS)
def test_forwards_without_gradients_do_not_put_hop_2_off_to_the_end_of_backward(layout: Layout):
    pair = Pair(layout)
    events = watch(pair)
    with torch.no_grad():
        loss_of(pair.mics, my_part(batch(9, 9, layout.world)))

    def noted(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if layer is pair.mics.layers[0]:
            x.register_hook(lambda grad: events.append("through all layers"))
        return layer(x)

    pair.backward(0, 0, twin=False, wrap=noted)
    assert events[:2] == ["issued", "issued"]
    assert "through all layers" in events


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
def test_a_parameter_that_two_units_hold_is_added_to_the_finished_result(layout: Layout):
    """Tied after sharding, as transformers' load-time sharding does."""
    twin = Net(unused=False)
    twin.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
    twin.first, twin.last = nn.Linear(7, 4), nn.Linear(4, 2)
    model = shard(copy.deepcopy(twin), layout)
    for net in (twin, model):
        net.layers[1].weight = net.layers[0].weight
    apply_mics(model, node_size=layout.node)
    events = watch(SimpleNamespace(engine=mics_engine(model)))
    rows = batch(0, 0, layout.world)
    loss_of(model, my_part(rows), run=(0, 1)).backward()
    loss_of(twin, rows, run=(0, 1)).backward()
    # The last layer, whose result the first one is added to; then the root.
    assert events == [*AT_ONCE[:4], "issued", "awaited"]
    assert_close(gradients(model), {name: p.grad for name, p in twin.named_parameters()})


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
