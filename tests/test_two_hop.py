"""Does an accumulation window end in the gradients of one process, whatever the training loop does in it?"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_mics import apply_mics, remove_mics
from hf_mics.errors import WindowError
from tests.on_ranks import Layout, after_an_error, on_ranks
from tests.toy import (
    HeadNet,
    Net,
    Pair,
    adamw,
    assert_close,
    assert_hop_2_calls,
    batch,
    gradients,
    loss_of,
    my_part,
    weights,
    whole,
)

TWO_REPLICAS = Layout(4, 2, 2)
SPANNING = Layout(4, 2, 4)
DATA_PARALLEL = Layout(4, 2, 1)
LAYOUTS = (TWO_REPLICAS, SPANNING, DATA_PARALLEL)
UNITS = 4  # three layers and the root


# -- hop 2 exactly once ------------------------------------------------------------------------------------------------


@on_ranks(*LAYOUTS)
def test_hop_2_runs_once_per_unit_and_step_under_set_requires_gradient_sync(layout: Layout):
    pair = Pair(layout)
    for step in range(3):
        pair.engine.meter.reset()
        for micro in range(3):
            assert pair.hop_2_calls == 0, "hop 2 before the last micro-step"
            pair.backward(step, micro, of=3)
        assert_hop_2_calls(pair, UNITS)
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


@on_ranks(TWO_REPLICAS)
def test_hop_2_runs_once_per_unit_and_step_under_set_requires_all_reduce(layout: Layout):
    pair = Pair(layout)
    for step in range(2):
        pair.engine.meter.reset()
        for micro in range(3):
            assert pair.hop_2_calls == 0
            rows = batch(step, micro, layout.world)
            pair.mics.set_requires_all_reduce(micro == 2)
            (loss_of(pair.mics, my_part(rows)) / 3).backward()
            (loss_of(pair.twin, rows) / 3).backward()
        assert_hop_2_calls(pair, UNITS)
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


@on_ranks(*LAYOUTS)
def test_hop_2_runs_once_per_unit_and_step_without_accumulation(layout: Layout):
    pair = Pair(layout)
    for step in range(3):
        pair.engine.meter.reset()
        rows = batch(step, 0, layout.world)
        loss_of(pair.mics, my_part(rows)).backward()  # a plain loop never calls set_requires_gradient_sync
        loss_of(pair.twin, rows).backward()
        assert_hop_2_calls(pair, UNITS)
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


@on_ranks(TWO_REPLICAS)
def test_windows_of_different_lengths_follow_each_other(layout: Layout):
    pair = Pair(layout)
    for step, micro_steps in enumerate((3, 1, 2, 1, 4)):
        pair.engine.meter.reset()
        pair.window(step, micro_steps)
        assert_hop_2_calls(pair, UNITS)
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


@on_ranks(*LAYOUTS)
def test_the_gradient_norm_is_that_of_one_process(layout: Layout):
    pair = Pair(layout)
    for step in range(2):
        pair.window(step)
        expected = torch.nn.utils.clip_grad_norm_(pair.twin.parameters(), 0.1)
        got = whole(torch.nn.utils.clip_grad_norm_(pair.mics.parameters(), 0.1))
        assert expected > 0.1, "nothing was clipped"
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


# -- between micro-steps -----------------------------------------------------------------------------------------------


@on_ranks(*LAYOUTS)
def test_gradients_stay_sharded_between_micro_steps(layout: Layout):
    """A rank holds 1/p of the gradients, padding aside, and what it holds is the partition group's partial average."""
    pair, p = Pair(layout), layout.partition
    first = dist.get_rank() // p * p
    for micro in range(2):
        pair.backward(0, micro, of=3, twin=False)
        ours = torch.cat(batch(0, micro, layout.world).chunk(layout.world)[first : first + p])
        (loss_of(pair.twin, ours) / 3).backward()
        pair.assert_same_gradients()
        for parameter in pair.mics.parameters():
            if parameter.grad is not None:
                assert parameter.grad.to_local().shape == parameter.to_local().shape
        storages = {}
        for unit in pair.engine.units:
            storages.update({t.untyped_storage().data_ptr(): t.untyped_storage() for t in unit.gradient_tensors()})
        held = sum(storage.nbytes() for storage in storages.values())
        padded = sum(-(-q.shape[0] // p) * q[0].numel() * 4 for q in pair.twin.parameters() if q.grad is not None)
        assert held == padded, (held, padded)


@on_ranks(TWO_REPLICAS)
def test_stock_fsdp2_would_hold_whole_gradients_there(layout: Layout):
    """What the test above would see without the feature: its own sharp edge."""
    pair = Pair(layout)
    remove_mics(pair.mics)
    pair.backward(0, 0, of=3)
    assert all(p.grad is None for p in pair.mics.parameters())
    held = sum(t.nbytes for unit in pair.engine.units for t in unit.gradient_tensors())
    assert held == sum(p.grad.nbytes for p in pair.twin.parameters() if p.grad is not None)


@on_ranks(TWO_REPLICAS)
def test_an_optimizer_step_in_mid_window_is_refused_on_every_rank(layout: Layout):
    pair = Pair(layout)
    pair.backward(0, 0, of=2)
    before = weights(pair.mics)
    with pytest.raises(WindowError, match=r"optimizer step in mid-window: .*4 units"):
        pair.optimizer.step()
    assert_close(weights(pair.mics), before, tolerance=0.0)
    pair.backward(0, 1, of=2)
    pair.step()
    pair.assert_same_weights()


class Boxed(nn.Linear):
    """Returns an object into which FSDP2 does not look for tensors."""

    def forward(self, rows: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=super().forward(rows).square().mean())


@on_ranks(TWO_REPLICAS)
def test_an_optimizer_step_after_a_backward_that_fsdp2_did_not_see_is_refused(layout: Layout):
    """FSDP2 alone trains nothing then, without a word."""
    model = apply_mics(fully_shard(Boxed(5, 7), mesh=layout.mesh), node_size=layout.node)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.step()
    model(torch.ones(2, 5)).loss.backward()
    with pytest.raises(WindowError, match=r"optimizer step without gradients: .*\(root\)"):
        optimizer.step()


@on_ranks(TWO_REPLICAS)
def test_the_cure_that_the_refusal_names_works(layout: Layout):
    """ "call zero_grad() to drop an unfinished window": then a step has nothing to apply, as in one process."""
    pair = Pair(layout)
    pair.backward(0, 0, of=2)
    pair.zero_grad()
    pair.optimizer.step()
    pair.twin_optimizer.step()
    pair.assert_same_weights()


@on_ranks(TWO_REPLICAS)
def test_another_models_optimizer_may_step_in_mid_window(layout: Layout):
    pair, other = Pair(layout), Pair(layout)
    pair.backward(0, 0, of=2)
    other.window(0)
    other.step()
    other.assert_same_weights()
    pair.backward(0, 1, of=2)
    pair.assert_same_gradients()


@on_ranks(TWO_REPLICAS)
def test_evaluation_between_and_inside_windows_disturbs_nothing(layout: Layout):
    pair = Pair(layout)

    def evaluate() -> None:
        with torch.no_grad():
            expected = loss_of(pair.twin, batch(9, 9, layout.world))
            got = loss_of(pair.mics, batch(9, 9, layout.world))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)

    for step in range(2):
        evaluate()
        pair.engine.meter.reset()
        for micro in range(3):
            if micro:
                evaluate()
            pair.backward(step, micro, of=3)
        assert_hop_2_calls(pair, UNITS)
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


@on_ranks(TWO_REPLICAS)
def test_a_forward_that_never_runs_backward_disturbs_nothing(layout: Layout):
    """A loss computed for the log without no_grad, in every micro-step and in the one that closes the window."""
    pair = Pair(layout)
    for step in range(2):
        pair.engine.meter.reset()
        for micro in range(3):
            loss_of(pair.mics, my_part(batch(8, 8, layout.world)))
            pair.backward(step, micro, of=3)
        assert_hop_2_calls(pair, UNITS)
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


@on_ranks(TWO_REPLICAS)
def test_gradients_that_are_scaled_in_mid_window_stay_scaled(layout: Layout):
    """What stands in `param.grad` is the partial sum itself."""
    pair = Pair(layout)
    pair.backward(0, 0, of=2)
    for model in (pair.mics, pair.twin):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.25)
    pair.backward(0, 1, of=2)
    pair.assert_same_gradients()


# -- abandoned windows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("whose", ["optimizer", "model"])
@on_ranks(*LAYOUTS)
def test_an_abandoned_window_leaks_nothing_after_zero_grad(layout: Layout, whose: str, set_to_none: bool):
    pair = Pair(layout)
    pair.window(0)
    pair.step()
    pair.backward(1, 0, of=3)
    pair.backward(1, 1, of=3)
    owners = (pair.optimizer, pair.twin_optimizer) if whose == "optimizer" else (pair.mics, pair.twin)
    for owner in owners:
        owner.zero_grad(set_to_none=set_to_none)
    pair.window(2)
    pair.assert_same_gradients()
    pair.step()
    pair.assert_same_weights()


@pytest.mark.parametrize("set_to_none", [True, False])
@on_ranks(TWO_REPLICAS)
def test_an_abandoned_window_leaks_nothing_beside_an_earlier_finished_gradient(layout: Layout, set_to_none: bool):
    """No zero_grad after the first window: its gradient stands in `param.grad` when the second is abandoned."""
    pair = Pair(layout)
    pair.window(0)
    pair.backward(1, 0, of=3)
    pair.zero_grad(set_to_none)
    pair.window(2)
    pair.assert_same_gradients()


@pytest.mark.parametrize("set_to_none", [True, False])
@on_ranks(TWO_REPLICAS)
def test_an_abandoned_window_of_a_pure_bf16_model_leaks_nothing(layout: Layout, set_to_none: bool):
    """Nothing but the second window may show in the gradient, to the bit."""
    build = lambda: Net().bfloat16()  # noqa: E731
    fresh, pair = Pair(layout, build=build), Pair(layout, build=build)
    pair.backward(1, 0, of=3)
    pair.zero_grad(set_to_none)
    pair.window(2)
    fresh.window(2)
    expected, got = gradients(fresh.mics), gradients(pair.mics)
    assert all(torch.equal(got[name], grad) for name, grad in expected.items())


@after_an_error
@on_ranks(*LAYOUTS)
def test_an_abandoned_window_leaks_nothing_after_reset_iter_state(layout: Layout):
    pair = Pair(layout)
    pair.backward(1, 0, of=3)
    pair.backward(1, 1, of=3)
    pair.mics.reset_iter_state()
    pair.twin_optimizer.zero_grad()
    pair.window(2)
    pair.assert_same_gradients()
    pair.step()
    pair.assert_same_weights()


@after_an_error
@on_ranks(TWO_REPLICAS)
def test_reset_iter_state_leaves_no_partial_gradient_on_a_layer_that_is_skipped_afterwards(layout: Layout):
    pair = Pair(layout)
    pair.backward(1, 0, of=3)
    pair.mics.reset_iter_state()
    pair.twin_optimizer.zero_grad()
    pair.window(2, run=(0, 2))
    pair.assert_same_gradients()
    pair.step()
    pair.assert_same_weights()


@on_ranks(TWO_REPLICAS)
def test_a_layer_that_only_an_abandoned_window_used_ends_without_a_gradient(layout: Layout):
    pair = Pair(layout, optimizer=adamw)
    pair.backward(1, 0, of=3)
    pair.zero_grad()
    pair.window(2, run=(0, 2))
    pair.assert_same_gradients()
    pair.step()
    pair.assert_same_weights()


@on_ranks(TWO_REPLICAS)
def test_drop_window_forgets_what_zero_grad_would(layout: Layout):
    pair = Pair(layout)
    pair.backward(1, 0, of=3)
    assert pair.engine.schedule.open_names()
    pair.engine.schedule.drop_window()
    assert not pair.engine.schedule.open_names()
    assert all(p.grad is None for p in pair.mics.parameters())
    pair.twin_optimizer.zero_grad()
    pair.window(2)
    pair.assert_same_gradients()


@pytest.mark.parametrize("set_to_none", [True, False])
@on_ranks(*LAYOUTS)
def test_zero_grad_of_half_of_the_parameters_in_mid_window_drops_these_only(layout: Layout, set_to_none: bool):
    pair = Pair(layout)
    halves = [list(model.parameters())[::2] for model in (pair.mics, pair.twin)]
    half_optimizers = [torch.optim.SGD(half, lr=0.1) for half in halves]
    for step in range(2):
        pair.backward(step, 0, of=3)
        pair.backward(step, 1, of=3)
        for optimizer in half_optimizers:
            optimizer.zero_grad(set_to_none)
        pair.backward(step, 2, of=3)
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


@on_ranks(TWO_REPLICAS)
def test_a_parameter_dropped_in_mid_window_and_not_used_again_ends_without_a_gradient(layout: Layout):
    pair = Pair(layout)
    pair.backward(0, 0, of=2)
    for model in (pair.mics, pair.twin):
        for parameter in model.layers[1].parameters():
            parameter.grad = None
    pair.backward(0, 1, of=2, run=(0, 2))
    pair.assert_same_gradients()


@on_ranks(*LAYOUTS)
def test_one_of_a_units_parameters_dropped_and_not_used_again_ends_without_a_gradient(layout: Layout):
    """Its place in the packed sum is reduced as zeros, which must not become a gradient for AdamW to decay by."""
    pair = Pair(layout, build=HeadNet, optimizer=adamw)
    pair.backward(0, 0, of=2, run="ab")
    for model in (pair.mics, pair.twin):
        model.layers[0].b.zero_grad()
    pair.backward(0, 1, of=2, run="a")
    pair.assert_same_gradients()
    pair.step()
    assert torch.equal(weights(pair.mics)["layers.0.b.weight"], pair.start["layers.0.b.weight"])


@on_ranks(TWO_REPLICAS)
def test_a_gradient_of_the_users_own_in_place_of_a_dropped_one_stays(layout: Layout):
    pair = Pair(layout, build=HeadNet)
    pair.backward(0, 0, of=3, run="ab")
    for model in (pair.mics, pair.twin):
        model.layers[0].b.zero_grad()
    pair.backward(0, 1, of=3, run="a")
    for model in (pair.mics, pair.twin):
        for parameter in model.layers[0].b.parameters():
            parameter.grad = torch.ones_like(parameter)
    pair.backward(0, 2, of=3, run="a")
    pair.assert_same_gradients()


@on_ranks(*LAYOUTS)
def test_windows_add_up_without_zero_grad_between_them(layout: Layout):
    pair = Pair(layout)
    for step in range(3):
        pair.window(step, 2)
        pair.assert_same_gradients()
        pair.optimizer.step()
        pair.twin_optimizer.step()
    pair.assert_same_weights()
