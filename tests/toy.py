"""A small model in two copies: one under MiCS on these ranks, and its twin in one process on the same global batch.

What the two-hop tests share. The model has odd widths, layers that can be skipped, and a head that nobody uses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from hf_mics import apply_mics, mics_engine
from tests.on_ranks import Layout

FEATURES = 7
ROWS_PER_RANK = 2
# Between MiCS and its twin only the order of additions differs. An entry of a gradient is a sum over at most 8 ranks x
# 2 rows x 8 micro-steps, of products that passed through at most 6 matrix products of width <= 17 on the way there and
# back: chains of fewer than 2 x (128 + 6 x 17) = 460 roundings, each of 2^-24 of the largest addend. Entries are
# compared relative to the largest gradient (weight) of the model. A lost, leaked or doubled micro-step is an error of
# order 0.1.
TOLERANCE = 460 * 2.0**-24


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int, unused: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, hidden), nn.Linear(hidden, width)
        if unused:
            self.unused = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class Net(nn.Module):
    """`forward(x, run=(0, 1, 2))` runs these layers in this order, each as often as it is named.

    With `unused`, every unit also holds parameters that never get a gradient.
    """

    def __init__(self, unused: bool = True) -> None:
        super().__init__()
        width, hidden = 13, 17
        self.first = nn.Linear(FEATURES, width)
        self.layers = nn.ModuleList(Layer(width, hidden, unused) for _ in range(3))
        self.last = nn.Linear(width, 3)
        if unused:
            self.never = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor, run: Iterable[int] = (0, 1, 2), wrap: Callable[..., Any] | None = None) -> Any:
        x = self.first(x)
        for index in run:
            x = wrap(self.layers[index], x) if wrap else self.layers[index](x)
        return self.last(x)


class HeadLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(7, 3), nn.Linear(7, 5), nn.Linear(7, 1)

    def forward(self, x: torch.Tensor, run: str) -> torch.Tensor:
        return torch.cat([getattr(self, name)(x) for name in run], dim=1)


class HeadNet(nn.Module):
    """Three heads in one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([HeadLayer()])
        self.scale = nn.Parameter(torch.ones(1, 1))

    def forward(self, x: torch.Tensor, run: str) -> torch.Tensor:
        return self.layers[0](x * self.scale, run)


def batch(step: int, micro: int, world: int) -> torch.Tensor:
    """The global batch of one micro-step."""
    generator = torch.Generator().manual_seed(1000 * step + micro)
    return torch.randn(world * ROWS_PER_RANK, FEATURES, generator=generator)


def my_part(rows: torch.Tensor) -> torch.Tensor:
    return rows.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(model: nn.Module, rows: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    # Not symmetric in the output, so that wrong averages cannot cancel.
    out = model(rows.to(next(model.parameters()).dtype), **kwargs).float()
    return (out.square() + out).mean()


def shard(model: nn.Module, layout: Layout, **kwargs: Any) -> nn.Module:
    """`fully_shard` on every layer and on the model."""
    for layer in model.layers:
        fully_shard(layer, mesh=layout.mesh, **kwargs)
    return fully_shard(model, mesh=layout.mesh, **kwargs)


class Pair:
    """The twin and the MiCS model, stepped side by side.

    Args:
        layout: of the running job.
        build: makes the model; called once, both start from the same weights.
        optimizer: makes an optimizer from parameters.
        wire, hierarchical: for `apply_mics`.
        sharding: keyword arguments for `fully_shard`.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        build: Callable[[], nn.Module] = Net,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        wire: Any = "auto",
        hierarchical: bool = True,
        **sharding: Any,
    ) -> None:
        torch.manual_seed(1)
        make = optimizer or (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
        self.layout = layout
        self.twin = build()
        self.start = {name: p.detach().clone() for name, p in self.twin.named_parameters()}
        self.mics = shard(copy.deepcopy(self.twin), layout, **sharding)
        apply_mics(self.mics, node_size=layout.node, hierarchical=hierarchical, gradient_wire_dtype=wire)
        self.engine = mics_engine(self.mics)
        self.twin_optimizer, self.optimizer = make(self.twin.parameters()), make(self.mics.parameters())

    def backward(
        self, step: int, micro: int, *, of: int = 1, sync: bool | None = None, twin: bool = True, **kwargs: Any
    ):
        """One micro-step of a window of `of`; hop 2 runs in the last unless `sync` says otherwise."""
        rows = batch(step, micro, self.layout.world)
        self.mics.set_requires_gradient_sync(micro == of - 1 if sync is None else sync)
        (loss_of(self.mics, my_part(rows), **kwargs) / of).backward()
        if twin:
            (loss_of(self.twin, rows, **kwargs) / of).backward()

    def window(self, step: int, micro_steps: int = 3, **kwargs: Any) -> None:
        """All micro-steps of one window."""
        for micro in range(micro_steps):
            self.backward(step, micro, of=micro_steps, **kwargs)

    def step(self) -> None:
        """Both optimizers, then fresh gradients."""
        self.optimizer.step()
        self.twin_optimizer.step()
        self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)
        self.twin_optimizer.zero_grad(set_to_none=set_to_none)

    @property
    def hop_2_calls(self) -> int:
        tally = self.engine.meter.read().get(("all_reduce", "replication"))
        return tally.calls if tally else 0

    def assert_same_gradients(self) -> None:
        """Every parameter's gradient, whole, on every rank; None in the same places."""
        expected = {name: p.grad for name, p in self.twin.named_parameters()}
        got = all_whole({name: p.grad for name, p in self.mics.named_parameters()})
        nones = [{name for name, grad in grads.items() if grad is None} for grads in (expected, got)]
        assert nones[0] == nones[1], f"None in one process: {nones[0] - nones[1]}, under MiCS: {nones[1] - nones[0]}"
        assert_close(got, expected)

    def assert_same_weights(self) -> None:
        mine = weights(self.mics)
        assert_close(mine, weights(self.twin))
        assert_same_on_all_ranks(mine)


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_whole(tensors: dict[str, Any]) -> dict[str, Any]:
    """What `whole` makes of each, in one exchange for each dtype instead of one for each tensor.

    The shards must lie on one mesh and be of rows, as FSDP2 makes them: of equal numbers of rows but at the end.
    """
    result = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    sharded = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    for dtype in dict.fromkeys(tensor.dtype for tensor in sharded.values()):
        same = {name: tensor for name, tensor in sharded.items() if tensor.dtype == dtype}
        mesh = next(iter(same.values())).device_mesh
        ranks, padded = mesh.size(-1), []
        for tensor in same.values():
            assert tensor.device_mesh == mesh
            assert tensor.placements[-1] == Shard(0)
            rows = tensor.to_local().flatten(1) if tensor.ndim > 1 else tensor.to_local()[:, None]
            padded.append(nn.functional.pad(rows, (0, 0, 0, -(-len(tensor) // ranks) - len(rows))))
        mine = torch.cat([rows.flatten() for rows in padded])
        everyone = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(everyone, mine, group=mesh.get_group(mesh.ndim - 1))
        parts = torch.stack(everyone).split([rows.numel() for rows in padded], dim=1)
        for (name, tensor), rows, part in zip(same.items(), padded, parts, strict=True):
            result[name] = part.reshape(ranks * rows.shape[0], rows.shape[1])[: len(tensor)].reshape(tensor.shape)
    return {name: result[name] for name in tensors}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return all_whole({name: p.detach() for name, p in model.named_parameters()})


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return all_whole({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def assert_close(got: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    """Entries differ by at most `tolerance` of the largest one in the model."""
    largest = max((t.abs().max().item() for t in expected.values() if t is not None), default=0.0)
    assert largest > 0, "nothing was trained"
    for name, value in expected.items():
        if value is not None:
            error = (got[name].double() - value.double()).abs().max().item() / largest
            assert error <= tolerance, f"{name}: off by {error:.2e} of the largest entry, allowed {tolerance:.1e}"


def assert_same_on_all_ranks(tensors: dict[str, torch.Tensor]) -> None:
    flat = torch.cat([t.detach().reshape(-1).double() for t in tensors.values()])
    mine = flat.clone()
    dist.broadcast(flat, src=0)
    assert torch.equal(mine, flat), f"rank {dist.get_rank()} differs from rank 0 by {(mine - flat).abs().max()}"


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def assert_hop_2_calls(pair: Pair, units: int) -> None:
    expected = units if pair.layout.world > pair.layout.partition else 0
    assert pair.hop_2_calls == expected, f"hop 2 ran {pair.hop_2_calls} times, expected {expected}"
