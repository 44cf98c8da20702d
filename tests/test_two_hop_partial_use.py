"""Does every parameter get the gradient of one process if it is not used, not always, or frozen?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.on_ranks import Layout, on_ranks
from tests.toy import HeadNet, Net, Pair, adamw, assert_hop_2_calls, weights

TWO_REPLICAS = Layout(4, 2, 2)
LAYOUTS = (TWO_REPLICAS, Layout(4, 2, 4), Layout(4, 2, 1))

SKIPS = {
    "last": [(0, 1, 2), (0, 1, 2), (0, 2)],
    "first": [(0, 2), (0, 1, 2), (0, 1, 2)],
    "middle": [(0, 1, 2), (1,), (0, 1, 2)],
    "a-different-one-each-time": [(1, 2), (0, 2), (0, 1)],
    "all-but-first-micro-step": [(0, 1, 2), (), ()],
    "one-throughout": [(0, 2), (0, 2), (0, 2)],
}


@pytest.mark.parametrize("runs", SKIPS.values(), ids=SKIPS)
@on_ranks(*LAYOUTS)
def test_a_layer_skipped_in_some_micro_steps_gets_the_gradient_of_one_process(layout: Layout, runs: list[Any]):
    pair = Pair(layout)
    used = len(set().union(*runs)) + 1
    for step in range(2):
        pair.engine.meter.reset()
        for micro, run in enumerate(runs):
            pair.backward(step, micro, of=3, run=run)
        assert_hop_2_calls(pair, used)
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


@pytest.mark.parametrize(
    "runs", [("a", "b", "c"), ("c", "b", "a"), ("ab", "bc", "b"), ("b", "b", "c"), ("abc", "a", "a")]
)
@on_ranks(*LAYOUTS)
def test_parameters_of_one_unit_may_be_used_in_different_micro_steps(layout: Layout, runs: tuple[str, ...]):
    """FSDP2 alone packs partial sums by position and would add up the gradients of different parameters."""
    pair = Pair(layout, build=HeadNet, optimizer=adamw)
    for step in range(2):
        for micro, run in enumerate(runs):
            pair.backward(step, micro, of=3, run=run)
        pair.assert_same_gradients()
        pair.zero_grad()


@on_ranks(*LAYOUTS)
def test_weight_decay_does_not_touch_a_parameter_that_was_never_used(layout: Layout):
    pair = Pair(layout, optimizer=adamw)
    for step in range(2):
        pair.window(step, run=(0, 2))
        pair.assert_same_gradients()
        pair.step()
    end = weights(pair.mics)
    for name, start in pair.start.items():
        untouched = "unused" in name or "never" in name or "layers.1" in name
        assert torch.equal(end[name], start) == untouched, name


@on_ranks(TWO_REPLICAS)
def test_weight_decay_does_not_touch_a_parameter_padded_by_a_neighbours_window(layout: Layout):
    """Head b of a unit is used in the first window only; later ones pad it at most, never decay it."""
    pair = Pair(layout, build=HeadNet, optimizer=adamw)
    pair.window(0, run="ab")
    pair.step()
    after_first = weights(pair.mics)
    for step in range(1, 3):
        for micro, run in enumerate(("a", "c", "a")):
            pair.backward(step, micro, of=3, run=run)
        pair.assert_same_gradients()
        pair.step()
    end = weights(pair.mics)
    for name, weight in after_first.items():
        assert torch.equal(end[name], weight) == (".b." in name), name


@on_ranks(*LAYOUTS)
def test_frozen_parameters_stay_as_they_are_and_the_others_train(layout: Layout):
    def frozen() -> nn.Module:
        net = Net()
        net.layers[1].requires_grad_(False)
        net.layers[0].a.requires_grad_(False)
        net.first.requires_grad_(False)
        return net

    pair = Pair(layout, build=frozen, optimizer=adamw)
    for step in range(2):
        pair.engine.meter.reset()
        pair.window(step)
        assert_hop_2_calls(pair, 3)
        pair.assert_same_gradients()
        pair.step()
    end = weights(pair.mics)
    for name, parameter in pair.twin.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(end[name], pair.start[name]), name


@on_ranks(TWO_REPLICAS)
def test_layers_may_be_frozen_and_unfrozen_between_windows(layout: Layout):
    pair = Pair(layout)
    for step, trainable in enumerate((True, False, True)):
        for model in (pair.twin, pair.mics):
            model.layers[1].requires_grad_(trainable)
            model.layers[2].a.requires_grad_(trainable)
        pair.window(step)
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()
