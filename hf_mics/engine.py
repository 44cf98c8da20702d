"""How does a sharded model become a MiCS model? The one place where all doors into the product meet.

`apply_mics` takes a model that `fully_shard` has sharded on a 2-D mesh and installs the collectives, hop 2's wire and
the two-hop schedule. Accelerate, the Trainer and the runner call the same function.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import nn

from hf_mics._torch_compat import Unit, find_units, inherit_timeout, is_root
from hf_mics.collectives import MiCSAllGather, MiCSReduceScatter
from hf_mics.errors import ConfigError, TopologyError
from hf_mics.hop2 import ReplicationGroup
from hf_mics.meter import TrafficMeter
from hf_mics.process_groups import HopGroups, hop_groups, say_to_all
from hf_mics.topology import Topology
from hf_mics.traffic import Backend, StepTraffic, UnitShape, predict
from hf_mics.two_hop import TwoHopSchedule

WireDtype = Literal["auto", "float32", "bfloat16"]

_WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


class MiCSEngine:
    """MiCS on one model: what was installed, what it counted, and how to undo it.

    `mics_engine(model)` returns it.

    Attributes:
        topology: the groups.
        hierarchical: whether collectives of groups that span nodes run in two stages.
        units: the model's communication units.
        wire_dtypes: what each unit's gradients travel as.
        meter: calls and bytes that this rank has sent since the start or the last `meter.reset()`.
        schedule: the two-hop schedule.
    """

    def __init__(
        self, model: nn.Module, units: list[Unit], groups: HopGroups, *, hierarchical: bool, wire: WireDtype
    ) -> None:
        self.topology = groups.topology
        self.hierarchical = hierarchical
        self.units = units
        self.meter = TrafficMeter()
        self.wire_dtypes: list[torch.dtype] = []
        self._former: list[tuple[Any, dist.ProcessGroup, tuple[Any, Any]]] = []
        all_gather = MiCSAllGather(groups, self.meter)
        hop2_groups = []
        for unit in units:
            dtype = unit.stock_reduce_dtype if wire == "auto" else _WIRE_DTYPES[wire]
            replication = unit.replication_group
            comms = unit.set_comms(all_gather, MiCSReduceScatter(groups, self.meter, dtype))
            # Micro-steps add up in fp32 at least: in bf16 a sum of many small gradients stops growing (pytorch 194628).
            policy = unit.reduce_in(torch.promote_types(torch.float32, unit.stock_reduce_dtype))
            unit.replication_group = hop2 = ReplicationGroup(replication, dtype, self.meter)
            hop2_groups.append(hop2)
            self.wire_dtypes.append(dtype)
            self._former.append((policy, replication, comms))
        self.schedule = TwoHopSchedule(model, units, hop2_groups)

    def detach(self) -> None:
        """Gives every unit back to plain FSDP2; an open accumulation window is dropped."""
        self.schedule.detach()
        for unit, former in zip(self.units, self._former, strict=True):
            unit.restore(*former)

    @property
    def backend(self) -> Backend:
        """What the collectives run on, which they choose by the device as well."""
        return "gloo" if self.units[0].device.type == "cpu" else "nccl"

    def unit_shapes(self) -> list[UnitShape]:
        """Bytes of every unit on the wire."""
        p = self.topology.partition_size
        shapes = []
        for unit, wire in zip(self.units, self.wire_dtypes, strict=True):
            gather = sum(unit.shard_numel(i) * unit.gather_dtype(i).itemsize for i in range(len(unit.sharded_params)))
            reduce = sum(unit.shard_numel(i) for i in unit.trainable) * wire.itemsize
            shapes.append(
                UnitShape(
                    name=unit.name,
                    gather_bytes=gather * p,
                    reduce_bytes=reduce * p,
                    gathers_per_micro_step=2 if unit.frees_after_forward else 1,
                )
            )
        return shapes

    def predict_step(self, micro_steps: int) -> StepTraffic:
        """What one optimizer step of `micro_steps` micro-steps will move; see `hf_mics.traffic.predict`."""
        return predict(
            self.topology,
            self.unit_shapes(),
            micro_steps=micro_steps,
            hierarchical=self.hierarchical,
            backend=self.backend,
        )


# The engine lives in the model's own __dict__, so that both are freed together.
_ENGINE = "_mics_engine"


def apply_mics(
    model: M,
    *,
    node_size: int | None = None,
    hierarchical: bool = True,
    gradient_wire_dtype: WireDtype = "auto",
) -> M:
    """Trains `model`, already sharded with `fully_shard` on a 2-D mesh, the MiCS way; returns the same model.

    In this order: finds the communication units and their mesh, derives the topology, checks everything on values that
    all ranks share, creates the subgroups of groups that span nodes (collective; once per mesh), installs the
    collectives and the fp32 accumulation on every unit, and starts the two-hop schedule. From then on
    `model.set_requires_gradient_sync(False)` defers hop 2 only, and gradients stay sharded between micro-steps.

    Args:
        model: the root module; the mesh's axes are (replicate, shard), either of size 1 if need be.
        node_size: ranks per node; default `LOCAL_WORLD_SIZE`, which torchrun and `accelerate launch` set.
        hierarchical: two-stage collectives where a partition group spans nodes (False: flat, for comparison).
        gradient_wire_dtype: what travels in hops 1 and 2. "auto" is what FSDP2 alone would send (bf16 under bf16);
            "float32" and "bfloat16" say so. Partial sums are always added up in fp32.

    Raises:
        ConfigError: the model or its root is not sharded, on a 1-D mesh, on several meshes, or already under MiCS; or
            the job runs on several hosts and nobody says how many ranks each has.
        TopologyError: the mesh and the node size form no valid groups.
    """
    check_wire_dtype(gradient_wire_dtype)
    if _ENGINE in model.__dict__:
        raise ConfigError(
            "this model is already under MiCS: apply_mics (or the plugin, callback or runner) was called on it "
            "before. Call it once; to change settings, remove_mics(model) first."
        )
    node_size = _agree(node_size, hierarchical, gradient_wire_dtype)
    units = list(find_units(model))
    shard_axis = _shard_axis(model, units)
    if any(isinstance(unit.replication_group, ReplicationGroup) for unit in units):
        raise ConfigError(
            f"a part of this {type(model).__name__}, or a model that contains it, is already under MiCS. Call "
            "apply_mics once, on the outermost module, or remove_mics on the other one first."
        )
    mesh = units[0].mesh
    _refuse_late_ties(units)
    topology = Topology(
        world_size=dist.get_world_size(),
        node_size=node_size,
        partition_size=mesh.size(shard_axis),
    )
    if mesh.size() != topology.world_size:
        raise TopologyError(
            f"the model's mesh must hold every rank of the job: expected {topology.world_size}, got {mesh.size()} "
            f"({mesh}). Tensor, pipeline and context parallelism cannot be combined with hf_mics."
        )
    groups = hop_groups(mesh, shard_axis, topology, hierarchical=hierarchical)
    used = {groups.partition, groups.inter_node, groups.intra_node, *(unit.replication_group for unit in units)}
    inherit_timeout([group for group in used if group is not None], units[0].device)
    model.__dict__[_ENGINE] = MiCSEngine(model, units, groups, hierarchical=hierarchical, wire=gradient_wire_dtype)
    return model


def mics_engine(model: nn.Module) -> MiCSEngine:
    """The engine of a model under MiCS.

    Raises:
        ConfigError: the model is not under MiCS.
    """
    engine = model.__dict__.get(_ENGINE)
    if engine is None:
        raise ConfigError(
            f"this {type(model).__name__} is not under MiCS: pass the model that prepare() or apply_mics() returned."
        )
    return engine


def is_under_mics(model: nn.Module) -> bool:
    """Whether `apply_mics`, through whichever door, has been called on the model."""
    return _ENGINE in model.__dict__


def remove_mics(model: M) -> M:
    """Undoes `apply_mics`: the model goes on as plain FSDP2, the same weights, an open window dropped."""
    mics_engine(model).detach()
    del model.__dict__[_ENGINE]
    return model


def node_size_from_launcher() -> int:
    """Ranks on this node, from torchrun's and accelerate's `LOCAL_WORLD_SIZE`; without it all ranks, of one host.

    Raises:
        ConfigError: the variable is not a positive integer.
    """
    text = os.environ.get("LOCAL_WORLD_SIZE")
    if text is None:
        return dist.get_world_size()
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE must be the number of ranks on this node, got {text!r}. Launch with `accelerate "
            "launch` or torchrun, which set it, or pass node_size."
        )
    return int(text)


def say_node_size(node_size: int | None, settings: T) -> list[tuple[int, T]]:
    """(ranks per node, `settings`) as every rank says them, in rank order; a collective.

    Args:
        node_size: the user's; None takes `node_size_from_launcher`.
        settings: anything else that the ranks want to know of one another.

    Raises:
        ConfigError: a launcher's variable that is no number of ranks; or neither the user nor the launcher says how
            many ranks a node has, and there are several hosts, which would be taken for one node.
    """
    is_unknown = node_size is None and "LOCAL_WORLD_SIZE" not in os.environ
    said = say_to_all(
        lambda: (
            socket.gethostname() if is_unknown else None,
            node_size_from_launcher() if node_size is None else node_size,
            settings,
        )
    )
    hosts = sorted({host for host, _, _ in said if host is not None})
    if len(hosts) > 1:
        raise ConfigError(
            f"the job runs on {len(hosts)} hosts ({', '.join(hosts[:4])}{', ...' if len(hosts) > 4 else ''}), but how "
            "many ranks each runs is not known: LOCAL_WORLD_SIZE is not set. Launch with `accelerate launch` or "
            "torchrun, which set it, export it in the srun or mpirun command, or pass node_size."
        )
    return [(size, theirs) for _, size, theirs in said]


def check_wire_dtype(name: str) -> None:
    """Raises ConfigError unless `name` is one of `WireDtype`."""
    if name not in get_args(WireDtype):
        raise ConfigError(f"gradient_wire_dtype must be one of {', '.join(get_args(WireDtype))}, got {name!r}.")


def _agree(node_size: int | None, hierarchical: bool, wire: str) -> int:
    """The node size, once every rank has said the same settings; so that all ranks raise or none does."""
    everyone = [(size, *settings) for size, settings in say_node_size(node_size, (hierarchical, wire))]
    if len(set(everyone)) > 1:
        table = "; ".join(f"rank {rank}: {said}" for rank, said in list(enumerate(everyone))[:16])
        raise TopologyError(
            "every rank must pass the same settings, and every node run as many ranks: (node_size, hierarchical, "
            f"gradient_wire_dtype) differ between ranks ({table}). Launch the same number of processes on every node."
        )
    return everyone[0][0]


def _refuse_late_ties(units: list[Unit]) -> None:
    """Tied after sharding and padded: FSDP2 2.13 trains one copy and gathers the other, which goes stale (tried)."""
    holders = Counter(key for unit in units for key in unit.held())
    uneven = {key: name for unit in units for key, name in unit.unevenly_held().items() if holders[key] > 1}
    if uneven:
        raise ConfigError(
            f"{len(uneven)} parameters were tied to one another after they had been sharded, and do not divide by the "
            "partition size; FSDP2 would go on with a stale copy. Expected weights tied before fully_shard, or a first "
            "dimension that divides: model.resize_token_embeddings(size, pad_to_multiple_of=partition_size) before "
            "saving does it for embeddings and head. Loading without distributed_config and preparing with "
            "MiCSAccelerator needs neither."
        )


def _shard_axis(model: nn.Module, units: list[Unit]) -> int:
    if not units:
        raise ConfigError(
            f"this {type(model).__name__} is not sharded: no module in it was passed to fully_shard. Call "
            "fully_shard(layer, mesh=mesh) on its layers and then on the model, on a mesh of (replicate, shard)."
        )
    if not is_root(model):
        raise ConfigError(
            f"only parts of this {type(model).__name__} are sharded ({len(units)}, the first {units[0].name!r}), not "
            "the model itself. Call fully_shard(model, mesh=mesh) after its layers, or pass the module sharded last."
        )
    meshes = {unit.mesh for unit in units}
    if len(meshes) > 1:
        raise ConfigError(
            f"all units must be sharded on one mesh, got {len(meshes)}: {sorted(map(str, meshes))}. Pass the same mesh "
            "to every fully_shard."
        )
    replicate, shard = units[0].mesh_axes
    if replicate is None or shard is None:
        raise ConfigError(
            f"the model is sharded on a {units[0].mesh.ndim}-D mesh without replicas: {units[0].mesh}. MiCS needs the "
            "axes (replicate, shard), the first of size 1 if one group holds all ranks: "
            "init_device_mesh(device, (replicas, partition_size), mesh_dim_names=('dp_replicate', 'dp_shard'))."
        )
    return shard
