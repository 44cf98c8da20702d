"""How does a test body run on several ranks without a spawn of its own?

`@on_ranks(Layout(4, 2, 2), ...)` turns a function into one pytest test per layout. All tests of a module that were
selected and have the same world size share one spawn: the first of them runs every body, one after the other, and
each test reports its own body's outcome. A body asserts on its rank; it passes when it passes on every rank.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from hf_mics.testing import run_ranks

after_an_error = pytest.mark.skipif(
    not hasattr(FSDPModule, "reset_iter_state"),
    reason=f"torch {torch.__version__} has no FSDPModule.reset_iter_state: a pass that raised ends the job",
)


class Layout(NamedTuple):
    """Ranks in all, on a node, and in a partition group."""

    world: int
    node: int
    partition: int

    @property
    def mesh(self) -> DeviceMesh:
        """The (replicate, shard) mesh of the running job; one per partition size, since torch never frees groups."""
        return _mesh(self.world // self.partition, self.partition)


@functools.cache
def _mesh(replicas: int, partition: int) -> DeviceMesh:
    return init_device_mesh("cpu", (replicas, partition), mesh_dim_names=("dp_replicate", "dp_shard"))


def on_ranks(*layouts: Layout) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test body, whose first parameter is `layout`, on the ranks of each layout."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        def test(request: pytest.FixtureRequest, **parameters: Any) -> None:
            failure = _outcomes(request, parameters["layout"].world)[request.node.nodeid]
            if failure:
                pytest.fail(failure, pytrace=False)

        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        test.body = body  # type: ignore[attr-defined]
        own = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = inspect.Signature([own, *inspect.signature(body).parameters.values()])  # type: ignore[attr-defined]
        return pytest.mark.parametrize("layout", layouts, ids=lambda layout: "x".join(map(str, layout)))(test)

    return decorate


_OUTCOMES: dict[tuple[str, int], dict[str, str]] = {}


def _outcomes(request: pytest.FixtureRequest, world: int) -> dict[str, str]:
    """Failure text ('' for none) of every selected test of this module and world size, by node id."""
    module = request.module.__name__
    if (module, world) not in _OUTCOMES:
        mine = [
            item for item in request.session.items if item.module is request.module and hasattr(item.function, "body")
        ]
        mine = [item for item in mine if item.callspec.params["layout"].world == world]
        mine = [item for item in mine if not any(mark.args[0] for mark in item.iter_markers("skipif"))]
        calls = [(item.nodeid, item.function.__name__, dict(item.callspec.params)) for item in mine]
        try:
            per_rank = run_ranks(_run_bodies, world, module, calls)
        except AssertionError as error:
            per_rank = [{node_id: str(error) for node_id, _, _ in calls}]
        _OUTCOMES[module, world] = {
            node_id: next((text for outcomes in per_rank if (text := outcomes[node_id])), "") for node_id, _, _ in calls
        }
    return _OUTCOMES[module, world]


def _run_bodies(module: str, calls: list[tuple[str, str, dict[str, Any]]]) -> dict[str, str]:
    bodies = importlib.import_module(module)
    outcomes = {}
    for node_id, name, parameters in calls:
        torch.manual_seed(0)
        try:
            getattr(bodies, name).body(**parameters)
            outcomes[node_id] = ""
        # What pytest.fail, and pytest.raises around what raises nothing, raise is no Exception.
        except (Exception, pytest.fail.Exception):
            outcomes[node_id] = f"on rank {dist.get_rank()}:\n{traceback.format_exc()}"
        dist.barrier()
    return outcomes
