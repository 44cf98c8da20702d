"""Does training under MiCS equal training in one process, for real architectures and every kind of layout?

Five optimizer steps of SGD with momentum: four windows of 3 micro-steps and a short last one of 1, on the same global
batch. SGD, because Adam divides by a second moment and turns rounding noise in gradients that are mathematically zero
(BERT's key biases) into whole steps.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_mics import apply_mics, mics_engine
from hf_mics.testing import run_ranks
from hf_mics.wrapping import plan_units
from tests import tiny
from tests.on_ranks import Layout
from tests.toy import all_whole, weights, whole

LAYOUTS = [
    Layout(4, 2, 2),
    Layout(4, 2, 4),
    Layout(4, 1, 2),
    Layout(4, 4, 2),
    Layout(6, 2, 2),
    Layout(8, 2, 4),
]
MODELS = ["gpt2", "bert", "llama", "t5"]
# Layouts that are run flat as well, with these models.
HIERARCHICAL = {Layout(4, 2, 4): MODELS, Layout(8, 2, 4): ["gpt2", "t5"]}
WINDOWS = (3, 3, 3, 3, 1)
ROWS = 24  # per micro-step: 6, 4 or 3 for each of 4, 6 or 8 ranks
MAX_NORM = 0.1
MATRIX_SCALE = {"gpt2": 8.0, "bert": 8.0, "llama": 8.0, "t5": 0.5}

# How far may MiCS be from exact arithmetic? As far as one process in fp32 is: both evaluate the same sums in fp32, in
# another order. The twin is run in fp64 (its rounding, 2^-53, is nothing here) and in fp32, and each tensor's fp32
# error is measured on the spot. Two orders of one sum err independently with the same spread, so the largest errors
# over a tensor's entries differ by a small factor: SLACK. A tensor of few entries may be right by luck in the twin;
# LAST_BITS allows it errors in its last 4 bits.
SLACK = 8
LAST_BITS = 2.0**-20

Record = dict[str, Any]
worst = [0]


def rows_of(window: int, micro: int) -> torch.Tensor:
    """Only 17 of the 61 tokens occur, which is soon learned."""
    return 3 + tiny.token_rows(ROWS, seed=100 * window + micro) % 17


def train(model: nn.Module, part: Callable[[torch.Tensor], torch.Tensor], begin: Callable[[bool], None]) -> Record:
    """The loop that both sides run; `begin` is told before each micro-step whether it closes its window."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    record: Record = {"losses": [], "norms": [], "gradients": []}
    for window, micro_steps in enumerate(WINDOWS):
        for micro in range(micro_steps):
            begin(micro == micro_steps - 1)
            rows = part(rows_of(window, micro))
            loss = model(input_ids=rows, labels=rows).loss
            (loss / micro_steps).backward()
            record["losses"].append(loss.detach().clone())
        gradients = all_whole({n: p.grad for n, p in model.named_parameters()})
        record["gradients"].append({n: None if grad is None else grad.clone() for n, grad in gradients.items()})
        record["norms"].append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)).clone())
        optimizer.step()
        optimizer.zero_grad()
    record["weights"] = weights(model)
    return record


def build(name: str) -> nn.Module:
    """With matrices large enough that attention attends: at these widths the usual 0.02 makes it a plain average."""
    model = tiny.build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(MATRIX_SCALE[name])
    return model


@functools.cache
def twin(name: str, dtype: torch.dtype) -> Record:
    return train(build(name).to(dtype), lambda rows: rows, lambda closes: None)


def shard(model: nn.Module, layout: Layout) -> nn.Module:
    plan = plan_units(model)
    assert plan.layers, "parity of one single unit would prove little"
    for _, module in plan.layers + plan.embeddings:
        fully_shard(module, mesh=layout.mesh, reshard_after_forward=True)
    for _, module in plan.heads:
        fully_shard(module, mesh=layout.mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=layout.mesh)


def train_under_mics(layout: Layout, name: str, hierarchical: bool) -> Record:
    model = shard(build(name), layout)
    apply_mics(model, node_size=layout.node, hierarchical=hierarchical)
    engine = mics_engine(model)
    counts = []

    def begin(closes: bool) -> None:
        if engine.meter.read() and begin.closed:  # type: ignore[attr-defined]
            counts.append(engine.meter.read())
            engine.meter.reset()
        begin.closed = closes  # type: ignore[attr-defined]
        model.set_requires_gradient_sync(closes)

    begin.closed = False  # type: ignore[attr-defined]
    record = train(model, lambda rows: rows.chunk(layout.world)[dist.get_rank()], begin)
    record["counts"] = [*counts, engine.meter.read()]
    record["predicted"] = [engine.predict_step(micro_steps).per_rank for micro_steps in WINDOWS]
    record["units"] = len(engine.units)
    losses = torch.stack(record["losses"])
    dist.all_reduce(losses, op=dist.ReduceOp.AVG)
    record["losses"] = list(losses)
    digest = hashlib.sha256()
    for tensor in (*record["weights"].values(), *record["gradients"][-1].values(), *record["norms"]):
        digest.update(tensor.numpy().tobytes())
    record["digest"] = digest.hexdigest()
    if dist.get_rank() != 0:
        for key in ("weights", "gradients", "norms"):
            del record[key]
    return record


def run_all(world: int) -> dict[tuple[Layout, str, bool], Record]:
    return {
        (layout, name, hierarchical): train_under_mics(layout, name, hierarchical)
        for layout in LAYOUTS
        if layout.world == world
        for name in MODELS
        for hierarchical in ((True, False) if name in HIERARCHICAL.get(layout, ()) else (True,))
    }


@functools.cache
def runs(world: int) -> list[dict[tuple[Layout, str, bool], Record]]:
    """Every rank's records; one spawn per world size."""
    return run_ranks(run_all, world, world, timeout_s=300)


def records(layout: Layout, name: str, hierarchical: bool = True) -> list[Record]:
    return [per_rank[layout, name, hierarchical] for per_rank in runs(layout.world)]


def assert_as_close_as_fp32(got: list[torch.Tensor], fp32: list[torch.Tensor], fp64: list[torch.Tensor]) -> None:
    for index, (mine, single, exact) in enumerate(zip(got, fp32, fp64, strict=True)):
        error = (mine.double() - exact).abs().max().item()
        allowed = SLACK * (single.double() - exact).abs().max().item() + LAST_BITS * exact.abs().max().item()
        worst[0] = max(worst[0], error / allowed)
        assert error <= allowed, f"tensor {index}: off by {error:.2e}, allowed {allowed:.2e}"


def named(record: Record, what: str) -> list[torch.Tensor]:
    if what == "weights":
        return list(record["weights"].values())
    if what == "gradients":
        return [grad for window in record["gradients"] for grad in window.values()]
    return record[what]


every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.mark.parametrize("what", ["losses", "gradients", "norms", "weights"])
@every_model
@every_layout
def test_training_equals_one_process(layout: Layout, name: str, what: str):
    assert_as_close_as_fp32(
        named(records(layout, name)[0], what),
        named(twin(name, torch.float32), what),
        named(twin(name, torch.float64), what),
    )


@every_model
def test_the_twin_learns_and_clips_so_that_parity_says_something(name: str):
    exact = twin(name, torch.float64)
    assert max(exact["losses"][-3:]) < min(exact["losses"][:3])
    assert min(exact["norms"]) > MAX_NORM
    start = build(name).double().state_dict()
    moved = {n: (w - start[n]).abs().max().item() for n, w in exact["weights"].items()}
    # A key's bias shifts all scores of a softmax alike: its gradient is mathematically zero.
    still = [n for n, distance in moved.items() if distance < 1e-4 and "key.bias" not in n]
    assert not still, f"a parameter that does not move cannot show a difference: {still}"


@every_model
@every_layout
def test_every_rank_holds_the_same_weights_gradients_and_norms(layout: Layout, name: str):
    assert len({record["digest"] for record in records(layout, name)}) == 1


@every_model
@every_layout
def test_calls_and_bytes_of_every_window_are_what_the_topology_predicts(layout: Layout, name: str):
    for record in records(layout, name):
        assert len(record["counts"]) == len(WINDOWS)
        assert record["counts"] == record["predicted"]


@every_model
@every_layout
def test_hop_2_runs_once_per_unit_and_step(layout: Layout, name: str):
    record = records(layout, name)[0]
    expected = record["units"] if layout.world > layout.partition else 0
    assert record["units"] > 2
    for counted in record["counts"]:
        tally = counted.get(("all_reduce", "replication"))
        assert (tally.calls if tally else 0) == expected


@pytest.mark.parametrize(
    ("layout", "name"),
    [(layout, name) for layout, names in HIERARCHICAL.items() for name in names],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_hierarchical_training_equals_flat_to_the_last_bit(layout: Layout, name: str):
    """Additions run in the same order, node by node and rank by rank, so nothing may differ."""
    staged, flat = records(layout, name)[0], records(layout, name, hierarchical=False)[0]
    scopes = [{scope for counted in record["counts"] for _, scope in counted} for record in (staged, flat)]
    assert {"inter_node", "intra_node"} <= scopes[0], "the staged run was not staged"
    assert not {"inter_node", "intra_node"} & scopes[1]
    for what in ("losses", "gradients", "norms", "weights"):
        assert all(torch.equal(a, b) for a, b in zip(named(staged, what), named(flat, what), strict=True)), what
