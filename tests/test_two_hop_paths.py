"""Does two-hop synchronization hold on unusual ways through a model: checkpointing, errors, precision, offload?"""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import checkpoint

from hf_mics import apply_mics, mics_engine, remove_mics, two_hop
from hf_mics.errors import ConfigError, MiCSError
from hf_mics.meter import Tally
from tests.on_ranks import Layout, after_an_error, on_ranks
from tests.toy import (
    Net,
    Pair,
    adamw,
    assert_close,
    assert_hop_2_calls,
    assert_same_on_all_ranks,
    batch,
    gradients,
    loss_of,
    my_part,
    sgd,
    shard,
    weights,
    whole,
)

TWO_REPLICAS = Layout(4, 2, 2)
SPANNING = Layout(4, 2, 4)
DATA_PARALLEL = Layout(4, 2, 1)
LAYOUTS = (TWO_REPLICAS, SPANNING, DATA_PARALLEL)
UNITS = 4  # three layers and the root


# -- unusual ways through the model ------------------------------------------------------------------------------------


@on_ranks(*LAYOUTS)
def test_a_layer_that_runs_several_times_in_one_forward_reduces_once(layout: Layout):
    pair = Pair(layout)
    for step in range(2):
        pair.engine.meter.reset()
        pair.window(step, run=(0, 1, 1, 2, 1))
        assert_hop_2_calls(pair, UNITS)
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("use_reentrant", [False, True])
@on_ranks(*LAYOUTS)
def test_activation_checkpointing_reduces_once_and_trains_the_same(
    layout: Layout, use_reentrant: bool, micro_steps: int
):
    def recomputed(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(layer, x, use_reentrant=use_reentrant)

    pair = Pair(layout)
    for step in range(2):
        pair.engine.meter.reset()
        pair.window(step, micro_steps, wrap=recomputed)
        assert_hop_2_calls(pair, UNITS)
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


@on_ranks(TWO_REPLICAS)
def test_a_checkpointed_layer_that_runs_several_times_trains_the_same(layout: Layout):
    def recomputed(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        # With use_reentrant=True plain FSDP2 (2.13) itself loses all but one use's gradient.
        return checkpoint(layer, x, use_reentrant=False)

    pair = Pair(layout)
    for step in range(2):
        pair.window(step, wrap=recomputed, run=(0, 1, 1, 2))
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


class Boom(torch.autograd.Function):
    """Identity whose backward runs out of memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise MemoryError("out of memory in backward")


def explode(layer: nn.Module, x: torch.Tensor, pair: Pair) -> torch.Tensor:
    """Runs `layer`, and in backward out of memory if it is the second one."""
    return layer(Boom.apply(x) if layer is pair.mics.layers[1] else x)


@after_an_error
@pytest.mark.parametrize("failing", [0, 1, 2])
@on_ranks(*LAYOUTS)
def test_a_window_whose_backward_raised_can_be_tried_again(layout: Layout, failing: int):
    """The recovery that FSDP2 documents, reset_iter_state on the root, and zero_grad as in one process."""
    pair = Pair(layout)
    pair.window(0)
    pair.step()

    for micro in range(failing):
        pair.backward(1, micro, of=3, twin=False)
    with pytest.raises(MemoryError):
        pair.backward(1, failing, of=3, twin=False, wrap=functools.partial(explode, pair=pair))
    pair.mics.reset_iter_state()
    pair.zero_grad()
    for step in (1, 2):
        pair.engine.meter.reset()
        pair.window(step)
        assert_hop_2_calls(pair, UNITS)
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


@after_an_error
@pytest.mark.parametrize("failing", [0, 1])
@on_ranks(TWO_REPLICAS)
def test_a_backward_that_raised_has_dropped_its_window_at_the_next_forward(layout: Layout, failing: int):
    """Without any of the recovery above: a loop that skips a bad batch and begins its window again.

    In the last micro-step layers that came before have finished gradients, which stay, as in one process.
    """
    pair = Pair(layout)

    for micro in range(failing):
        pair.backward(1, micro, of=3, twin=False)
    with pytest.raises(MemoryError):
        pair.backward(1, failing, of=3, twin=False, wrap=functools.partial(explode, pair=pair))
    pair.window(2)
    pair.assert_same_gradients()
    pair.step()
    pair.assert_same_weights()


@pytest.mark.parametrize("forwards_first", [False, True])
@on_ranks(*LAYOUTS)
def test_two_backwards_per_micro_step_add_up(layout: Layout, forwards_first: bool):
    """As with two losses on two batches, the last micro-step included."""
    pair = Pair(layout)
    for step in range(2):
        for micro in range(2):
            pair.mics.set_requires_gradient_sync(micro == 1)
            for model in (pair.mics, pair.twin):
                part = my_part if model is pair.mics else (lambda rows: rows)
                losses: list[Callable[[], torch.Tensor]] = [
                    lambda m=model, p=part, i=i: loss_of(m, p(batch(step, 2 * micro + i, layout.world)))  # type: ignore[misc]
                    for i in range(2)
                ]
                if forwards_first:
                    for loss in [loss() for loss in losses]:
                        loss.backward()
                else:
                    for make in losses:
                        make().backward()
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


@on_ranks(TWO_REPLICAS)
def test_backwards_through_different_layers_add_up(layout: Layout):
    pair = Pair(layout)
    for step in range(2):
        for micro in range(2):
            pair.mics.set_requires_gradient_sync(micro == 1)
            rows = batch(step, micro, layout.world)
            for run in ((0, 1), (1, 2)):
                loss_of(pair.mics, my_part(rows), run=run).backward()
                loss_of(pair.twin, rows, run=run).backward()
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


@pytest.mark.parametrize("factor", [1.0, 8.0, 2.0])
@on_ranks(*LAYOUTS)
def test_a_gradient_divide_factor_divides_once(layout: Layout, factor: float):
    """set_gradient_divide_factor(f): sums over all ranks divided by f, where the default f is the world size."""
    pair = Pair(layout)
    for module in (*pair.mics.layers, pair.mics):
        module.set_gradient_divide_factor(factor)
    # The second window finds the gradient of the first, which a sum over replicas must not multiply.
    for step in range(2):
        pair.window(step)
        expected = {n: p.grad * (layout.world / factor) for n, p in pair.twin.named_parameters() if p.grad is not None}
        assert_close(gradients(pair.mics), expected)


# -- precision ---------------------------------------------------------------------------------------------------------

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)


class Constant(nn.Module):
    """A model whose gradient is a chosen number in every micro-step, exactly representable in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.weight = nn.Parameter(torch.zeros(12, 3))

    def forward(self, scale: float) -> torch.Tensor:
        return self.weight.float().sum() * scale


def accumulate(model: Any, scales: list[float]) -> torch.Tensor:
    for micro, scale in enumerate(scales):
        model.set_requires_all_reduce(micro == len(scales) - 1)
        model(scale).backward()
    return whole(model.weight.grad).float()


@pytest.mark.parametrize("wire", ["auto", "float32", "bfloat16"])
@on_ranks(TWO_REPLICAS, SPANNING, DATA_PARALLEL)
def test_micro_steps_add_up_in_fp32_under_bf16_where_stock_fsdp2_loses_them(layout: Layout, wire: Any):
    """1 and then 16 times 2^-9: each is below half a bf16 step at 1, so a bf16 sum never leaves 1. fp32: 1.03125.

    1.03125 is a bf16 number, so that hop 2 in bf16 carries it exactly.
    """
    scales = [1.0] + [2.0**-9] * 16
    ours = fully_shard(Constant(), mesh=layout.mesh, mp_policy=BF16)
    apply_mics(ours, node_size=layout.node, gradient_wire_dtype=wire)
    stock = fully_shard(Constant(), mesh=layout.mesh, mp_policy=BF16)
    assert torch.equal(accumulate(ours, scales), torch.full((12, 3), 1.03125))
    assert torch.equal(accumulate(stock, scales), torch.ones(12, 3)), "stock FSDP2 no longer loses them: drop our claim"


@on_ranks(TWO_REPLICAS)
def test_bf16_travels_on_both_hops_under_bf16_and_fp32_on_request(layout: Layout):
    counted = {}
    for wire in ("auto", "bfloat16", "float32"):
        pair = Pair(layout, wire=wire, mp_policy=BF16)
        pair.window(0, 2)
        assert {p.grad.dtype for p in pair.mics.parameters() if p.grad is not None} == {torch.float32}
        tallies = pair.engine.meter.read()
        counted[wire] = (
            tallies["reduce_scatter", "partition"].bytes_sent,
            tallies["all_reduce", "replication"].bytes_sent,
        )
    assert counted["auto"] == counted["bfloat16"]
    assert counted["float32"] == tuple(2 * size for size in counted["auto"])


@on_ranks(*LAYOUTS)
def test_mixed_precision_stays_within_the_rounding_of_bf16(layout: Layout):
    """Weights, activations and gradients pass bf16 (u = 2^-8) some 12 times in 3 layers: 12 u = 0.05 of the largest."""
    pair = Pair(layout, mp_policy=BF16)
    pair.window(0)
    assert_close(gradients(pair.mics), gradients(pair.twin), tolerance=0.05)
    assert_same_on_all_ranks(gradients(pair.mics))


@on_ranks(*LAYOUTS)
def test_a_pure_bf16_model_trains_on_sums_that_were_added_up_in_fp32(layout: Layout):
    """As above, but the parameters and their finished gradients are bf16."""

    def build() -> nn.Module:
        return Constant().bfloat16()

    model = fully_shard(build(), mesh=layout.mesh)
    apply_mics(model, node_size=layout.node)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        assert torch.equal(accumulate(model, [1.0] + [2.0**-9] * 16), torch.full((12, 3), 1.03125))
        assert model.weight.grad.dtype == torch.bfloat16
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(whole(model.weight).float(), torch.full((12, 3), -2.0625))


class Mixed(nn.Module):
    """A frozen bf16 parameter, first in its unit, beside a trainable fp32 one, as under QLoRA-like training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.frozen = nn.Parameter(torch.ones(5, 7, dtype=torch.bfloat16), requires_grad=False)
        self.weight = nn.Parameter(torch.ones(7, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.frozen.float().T).sum() * 0 + x @ self.weight


@on_ranks(TWO_REPLICAS, SPANNING)
def test_a_frozen_bf16_neighbour_does_not_round_fp32_gradients(layout: Layout):
    """wire "auto" is what stock FSDP2 sends: the dtype of the gradients, fp32 here. Gathers go as uint8."""
    model = fully_shard(Mixed(), mesh=layout.mesh)
    apply_mics(model, node_size=layout.node)
    twin = Mixed()
    for micro in range(2):
        model.set_requires_gradient_sync(micro == 1)
        rows = batch(0, micro, layout.world)
        (model(my_part(rows)).square().mean()).backward()
        (twin(rows).square().mean()).backward()
    assert_close({"weight": whole(model.weight.grad)}, {"weight": twin.weight.grad})
    assert mics_engine(model).wire_dtypes == [torch.float32]


@on_ranks(*LAYOUTS)
def test_fp16_with_a_gradient_scaler_skips_an_overflow_on_every_rank_and_trains_on(layout: Layout):
    """The parameters are fp32, FSDP2 computes and reduces in fp16. Rank 1 alone overflows, in a middle micro-step.

    fp16 keeps 11 bits: 12 roundings of 2^-11 on the way through 3 layers make 0.006 of the largest gradient.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float16)
    pair = Pair(layout, optimizer=sgd, mp_policy=policy)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
    scales = []
    for step in range(3):
        before = weights(pair.mics)
        for micro in range(3):
            pair.mics.set_requires_gradient_sync(micro == 2)
            rows = batch(step, micro, layout.world)
            loss = loss_of(pair.mics, my_part(rows)) / 3
            if step == 1 and micro == 1 and dist.get_rank() == 1:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            if step != 1:
                (loss_of(pair.twin, rows) / 3).backward()
        scaler.unscale_(pair.optimizer)
        if step != 1:
            assert_close(gradients(pair.mics), gradients(pair.twin), tolerance=0.006)
        scaler.step(pair.optimizer)
        scaler.update()
        if step == 1:
            assert all(torch.equal(w, before[name]) for name, w in weights(pair.mics).items()), "stepped on inf"
        else:
            pair.twin_optimizer.step()
        pair.zero_grad()
        scales.append(scaler.get_scale())
        assert_same_on_all_ranks({**weights(pair.mics), "scale": torch.tensor([scaler.get_scale()])})
    assert scales == [256.0, 128.0, 128.0]


# -- memory and undo ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abandon", [None, True, False])
@on_ranks(TWO_REPLICAS, SPANNING)
def test_cpu_offload_trains_the_same(layout: Layout, abandon: bool | None):
    """`abandon`: a window is dropped first, with zero_grad(set_to_none=abandon)."""
    pair = Pair(layout, offload_policy=CPUOffloadPolicy(pin_memory=False))
    if abandon is not None:
        pair.backward(7, 0, of=3)
        pair.zero_grad(abandon)
    for step in range(2):
        pair.window(step)
        pair.assert_same_gradients()
        pair.step()
    pair.assert_same_weights()


@pytest.mark.parametrize("policy", [MixedPrecisionPolicy(), BF16], ids=["fp32", "bf16"])
@on_ranks(*LAYOUTS)
def test_removing_mics_restores_plain_fsdp2_to_the_last_bit(layout: Layout, policy: MixedPrecisionPolicy):
    """Against a model that never was under MiCS, from an open window on, with and without whole-gradient no_sync."""
    net = Net()
    never, once = (shard(copy.deepcopy(net), layout, mp_policy=policy) for _ in range(2))
    apply_mics(once, node_size=layout.node)
    engine = mics_engine(once)
    (loss_of(once, my_part(batch(5, 5, layout.world)))).backward()
    once.zero_grad()
    once.set_requires_gradient_sync(False)
    loss_of(once, my_part(batch(5, 6, layout.world))).backward()
    remove_mics(once)
    once.set_requires_gradient_sync(True)
    with pytest.raises(ConfigError, match="not under MiCS"):
        mics_engine(once)
    assert all(p.grad is None for p in once.parameters()), "the open window must be dropped"
    assert "set_requires_gradient_sync" not in vars(once)
    counted = engine.meter.read()
    for model in (never, once):
        optimizer = adamw(model.parameters())
        for step in range(2):
            for micro in range(3):
                model.set_requires_gradient_sync(micro == 2)
                (loss_of(model, my_part(batch(step, micro, layout.world)))).backward()
                assert (next(model.parameters()).grad is None) == (micro < 2), "no_sync must keep whole gradients again"
            optimizer.step()
            optimizer.zero_grad()
    assert engine.meter.read() == counted, "collectives of MiCS still run"
    expected, got = weights(never), weights(once)
    assert all(torch.equal(got[name], w) for name, w in expected.items())
    apply_mics(once, node_size=layout.node)


@on_ranks(TWO_REPLICAS)
def test_a_model_can_leave_and_join_mics_again(layout: Layout):
    pair = Pair(layout)
    pair.window(0)
    pair.step()
    remove_mics(pair.mics)
    apply_mics(pair.mics, node_size=layout.node)
    pair.engine = mics_engine(pair.mics)
    pair.engine.meter.reset()
    pair.window(1)
    assert_hop_2_calls(pair, UNITS)
    pair.assert_same_gradients()
    pair.step()
    pair.assert_same_weights()


@on_ranks(SPANNING)
def test_resharding_to_a_smaller_group_after_forward_changes_no_gradient(layout: Layout):
    """fully_shard(reshard_after_forward=2): backward gathers over 2 ranks, not over the partition group of 4."""
    pair = Pair(layout, reshard_after_forward=2)
    pair.window(0)
    pair.assert_same_gradients()
    # Each of two ranks sends the other its half of a unit.
    halves = sum(unit.gather_bytes // 2 for unit in pair.engine.unit_shapes())
    assert pair.engine.meter.read()["all_gather", "partition"] == Tally(3 * len(pair.engine.units), 3 * halves)


@on_ranks(TWO_REPLICAS)
def test_scaling_or_replacing_a_gradient_in_mid_window_acts_on_the_sum_as_in_one_process(layout: Layout):
    """In place and by a new tensor, also where a finished gradient of zeros stands."""
    pair = Pair(layout)
    pair.window(0)
    pair.zero_grad(set_to_none=False)
    for replace in (False, True):
        pair.backward(1, 0, of=3)
        for model in (pair.mics, pair.twin):
            for param in (p for p in model.parameters() if p.grad is not None):
                if replace:
                    param.grad = param.grad * 0.5
                else:
                    param.grad.mul_(0.5)
        pair.backward(1, 1, of=3)
        pair.backward(1, 2, of=3)
        pair.assert_same_gradients()
        pair.zero_grad(set_to_none=False)


@on_ranks(TWO_REPLICAS)
def test_a_fused_zero_grad_to_zeros_drops_an_abandoned_window_beside_a_finished_gradient(layout: Layout):
    pair = Pair(layout, optimizer=lambda params: torch.optim.SGD(params, lr=0.1, foreach=True))
    pair.window(0)
    pair.backward(1, 0, of=3)
    pair.zero_grad(set_to_none=False)
    pair.window(2)
    pair.assert_same_gradients()


def bad_batch(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    raise MemoryError("bad batch")


@after_an_error
@on_ranks(TWO_REPLICAS)
def test_earlier_micro_steps_survive_a_forward_that_raised(layout: Layout):
    pair = Pair(layout)
    pair.backward(0, 0, of=3)
    with pytest.raises(MemoryError):
        pair.backward(0, 1, of=3, twin=False, wrap=bad_batch)
    pair.backward(0, 1, of=3)
    pair.backward(0, 2, of=3)
    pair.assert_same_gradients()


@on_ranks(TWO_REPLICAS)
def test_a_method_that_calls_forward_is_taken_for_one_that_raised_only_after_that(layout: Layout):
    """FSDP2 begins a forward for the method, as of an encoder-decoder's generate, and the forward inside is another."""
    pair = Pair(layout)
    pair.mics.score = lambda rows: pair.mics(pair.mics(rows)[:, :1].expand_as(rows))
    register_fsdp_forward_method(pair.mics, "score")
    rows = my_part(batch(0, 0, layout.world))
    clear = mock.Mock(side_effect=MiCSError)
    with mock.patch.object(two_hop, "reset_after_error", clear):
        for micro in range(3):
            with torch.no_grad():
                pair.mics.score(rows)
            pair.backward(0, micro, of=3)
        pair.assert_same_gradients()
        clear.assert_not_called()
        with pytest.raises(MemoryError):
            pair.backward(1, 0, of=2, twin=False, wrap=bad_batch)
        with pytest.raises(MiCSError):
            pair.mics.score(rows)


@on_ranks(TWO_REPLICAS)
def test_a_torch_that_cannot_start_again_after_an_error_is_told_apart(layout: Layout):
    """torch 2.11 and 2.12; FSDP2 alone would train on with what the pass that raised has left."""
    pair = Pair(layout)
    with pytest.raises(MemoryError):
        pair.backward(0, 0, of=2, twin=False, wrap=bad_batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(FSDPModule, "reset_iter_state", raising=False)
        with pytest.raises(MiCSError, match=r"cannot start again after that\. Install torch 2\.13 or 2\.14"):
            pair.backward(0, 0, of=2, twin=False)


@on_ranks(TWO_REPLICAS)
def test_a_model_under_mics_is_freed_with_its_last_reference(layout: Layout):
    pair = Pair(layout)
    pair.window(0)
    gone = weakref.ref(pair.mics)
    del pair
    gc.collect()
    assert gone() is None


@on_ranks(TWO_REPLICAS)
def test_fp64_models_add_up_in_fp64(layout: Layout):
    torch.manual_seed(0)
    twin = Net().double()
    model = apply_mics(shard(copy.deepcopy(twin), layout), node_size=layout.node)
    for micro in range(3):
        rows = batch(0, micro, layout.world).double()
        model.set_requires_gradient_sync(micro == 2)
        loss_of(model, my_part(rows)).backward()
        loss_of(twin, rows).backward()
    for name, param in model.named_parameters():
        if param.grad is not None:
            expected = dict(twin.named_parameters())[name].grad
            # fp32 anywhere would show as 1e-7.
            torch.testing.assert_close(param.grad.full_tensor(), expected, rtol=1e-12, atol=1e-13)
