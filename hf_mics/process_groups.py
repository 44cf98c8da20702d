"""Which torch process groups carry a topology?

A 3-D DeviceMesh (replication, inter_node, intra_node) over all ranks in natural order yields every subgroup with one
public call, and NCCL communicators only come to life for the axes that are used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hf_mics._torch_compat import default_store, job_store
from hf_mics.errors import ConfigError, TopologyError
from hf_mics.topology import Topology

T = TypeVar("T")


def say_to_all(say: Callable[[], T]) -> list[T]:
    """What `say()` returns on every rank, in rank order; a collective.

    Raises:
        ConfigError: `say()` raised it on some rank; then every rank raises the first rank's, and none is left waiting.
            Or ranks share a GPU, which NCCL finds at its first collective.
    """
    try:
        mine: T | ConfigError = say()
    except ConfigError as error:
        mine = error
    everyone: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(everyone, mine)
    except dist.DistBackendError as error:
        if "Duplicate GPU" not in str(error):
            raise
        raise ConfigError(
            f"several of the {len(everyone)} ranks were given the same GPU. Expected one process for each GPU: set "
            "num_processes in the accelerate config to their number. For a run on CPUs, put CUDA_VISIBLE_DEVICES= "
            "before the command: accelerate does not tell the ranks of an FSDP job about `use_cpu`."
        ) from error
    for said in everyone:
        if isinstance(said, ConfigError):
            raise said
    return everyone


def missing_callers(what: str, seconds: float) -> list[int]:
    """Ranks that have not called this with the same `what` within `seconds` of this rank; empty when all have.

    No collective, which a rank that calls alone could not leave again: ranks leave marks in the job's store.
    """
    store = job_store() or default_store()
    marks = [f"callers/{what}/{_CALLS[what]}/{rank}" for rank in range(dist.get_world_size())]
    mine = marks[dist.get_rank()]
    store.set(mine, "")
    try:
        store.wait(marks, timedelta(seconds=seconds))
    except RuntimeError:  # the time is up
        if missing := [rank for rank, mark in enumerate(marks) if not store.check([mark])]:
            store.delete_key(mine)
            return missing
    _CALLS[what] += 1
    return []


# How often all ranks have met, by what for.
_CALLS: Counter[str] = Counter()


@dataclass(frozen=True)
class HopGroups:
    """The process groups of this rank.

    `inter_node` and `intra_node` are None unless the partition group spans nodes and `hierarchical` was asked for.
    """

    topology: Topology
    partition: dist.ProcessGroup
    inter_node: dist.ProcessGroup | None = None
    intra_node: dist.ProcessGroup | None = None


# Groups are never freed by torch before the end of the job, so a second model on the same mesh must find the first
# one's. Keyed by the partition group, which goes away with its job.
_CACHE: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Topology, bool], HopGroups]] = WeakKeyDictionary()


def hop_groups(mesh: DeviceMesh, shard_axis: int, topology: Topology, *, hierarchical: bool) -> HopGroups:
    """The groups of `topology` for a model sharded along `shard_axis` of `mesh`.

    Checks that the mesh's partition groups are the topology's, then, the first time and only for groups that span
    nodes, creates the subgroups: a collective call that every rank of the job makes.

    Raises:
        TopologyError: the mesh's shard axis does not hold consecutive ranks.
    """
    _check_natural_order(mesh, shard_axis, topology)
    partition = mesh.get_group(shard_axis)
    staged = hierarchical and topology.is_hierarchical
    known = _CACHE.setdefault(partition, {})
    if (topology, staged) not in known:
        inter = intra = None
        if staged:
            shape = (topology.replication_size, topology.nodes_per_partition, topology.node_size)
            names = ("mics_replication", "mics_inter_node", "mics_intra_node")
            subgroups = init_device_mesh(mesh.device_type, shape, mesh_dim_names=names)
            inter, intra = subgroups.get_group("mics_inter_node"), subgroups.get_group("mics_intra_node")
        known[topology, staged] = HopGroups(topology, partition, inter, intra)
    return known[topology, staged]


def _check_natural_order(mesh: DeviceMesh, shard_axis: int, topology: Topology) -> None:
    layout = mesh.mesh.movedim(shard_axis, -1).reshape(-1, mesh.size(shard_axis)).tolist()
    expected = [list(group) for group in topology.partition_groups]
    if layout != expected:
        raise TopologyError(
            "the mesh's shard axis must hold consecutive ranks, because gathers put shards in the order of global "
            f"ranks: expected partition groups {_short(expected)}, got {_short(layout)}. Build the mesh with "
            f"init_device_mesh(device, ({topology.replication_size}, {topology.partition_size}), "
            "mesh_dim_names=('dp_replicate', 'dp_shard'))."
        )


def _short(groups: list[list[int]]) -> str:
    return f"{groups[:4]}" + (" ..." if len(groups) > 4 else "")
