"""Do the bytes on every node's NIC equal what the engine counts and what Topology predicts? Phase by phase.

Run by torchrun on each node of a virtual cluster: `python -m hf_mics.bench.wire_check FOLDER`. Every MiCS configuration
of a small model runs one optimizer step of two micro-steps; before and after each part of it every node reads its own
NIC's counter:

- a micro-step: all-gathers for forward and backward, hop 1's reduce-scatters;
- the micro-step at the accumulation boundary: the same and hop 2;
- a forward without gradients: all-gathers alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from hf_mics.bench.namespaces import NIC
from hf_mics.engine import MiCSEngine, WireDtype, apply_mics, mics_engine
from hf_mics.topology import Topology, valid_partition_sizes
from hf_mics.traffic import node_bytes

# 2.1 million parameters: megabytes per phase, beside which headers and barriers are small. No size divides by 8.
_WIDTH, _HIDDEN, _LAYERS = 259, 1021, 4
_WIRES: tuple[WireDtype, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Setting:
    """One way to run MiCS."""

    partition_size: int
    hierarchical: bool
    wire: WireDtype


@dataclass(frozen=True)
class Measurement:
    """Bytes that left one node's NIC in one part of a step, beside what they should be.

    `counted_bytes` follows from the engine's counters, `predicted_bytes` from Topology and the units' sizes.
    """

    setting: Setting
    part: str
    node: int
    measured_bytes: int
    counted_bytes: float
    predicted_bytes: float


def settings(topology: Topology) -> list[Setting]:
    """Every partition size, flat and hierarchical where they differ, with fp32 and bf16 on the wire."""
    found = []
    for p in valid_partition_sizes(topology.world_size, topology.node_size):
        spans = Topology(world_size=topology.world_size, node_size=topology.node_size, partition_size=p).is_hierarchical
        for hierarchical in (False, True) if spans else (True,):
            found += [Setting(p, hierarchical, wire) for wire in _WIRES]
    return found


def measure(setting: Setting, read_nic: Callable[[], int]) -> list[Measurement]:
    """Runs one setting on the ranks of this job; this node's measurements. A collective."""
    node_size = int(os.environ["LOCAL_WORLD_SIZE"])
    world = dist.get_world_size()
    p = setting.partition_size
    mesh = init_device_mesh("cpu", (world // p, p), mesh_dim_names=("dp_replicate", "dp_shard"))
    torch.manual_seed(0)
    model = nn.Sequential(*(_layer() for _ in range(_LAYERS)))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    apply_mics(model, node_size=node_size, hierarchical=setting.hierarchical, gradient_wire_dtype=setting.wire)
    engine = mics_engine(model)
    rows = torch.randn(2, _WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))

    def forward() -> None:
        with torch.no_grad():
            model(rows)

    def micro_step(boundary: bool) -> None:
        cast(FSDPModule, model).set_requires_gradient_sync(boundary)
        model(rows).square().mean().backward()

    # Connections, and what FSDP2 settles in its first step; then every part once more, measured.
    micro_step(True)
    parts = {
        "micro-step": lambda: micro_step(False),
        "boundary micro-step": lambda: micro_step(True),
        # Last: after a forward without gradients FSDP2's next backward gathers one unit more than it uses.
        "forward": forward,
    }
    predicted = _predict(engine)
    found = []
    for name, run in parts.items():
        dist.barrier()
        engine.meter.reset()
        before = read_nic()
        dist.barrier()
        run()
        dist.barrier()
        found.append(
            Measurement(
                setting=setting,
                part=name,
                node=dist.get_rank() // node_size,
                measured_bytes=read_nic() - before,
                counted_bytes=node_bytes(engine.topology, engine.meter.read(), backend=engine.backend),
                predicted_bytes=predicted[name],
            )
        )
    return found


def _layer() -> nn.Module:
    return nn.Sequential(nn.Linear(_WIDTH, _HIDDEN), nn.Tanh(), nn.Linear(_HIDDEN, _WIDTH))


def _predict(engine: MiCSEngine) -> dict[str, float]:
    """What each part should move, from Topology and the units' sizes alone."""
    micro = engine.predict_step(1).per_rank
    hop1 = {key: tally for key, tally in micro.items() if key[0] != "all_reduce"}
    # Every unit is gathered once in forward, and again in backward if it was freed.
    gathered = {unit.name: unit.gathers_per_micro_step for unit in engine.unit_shapes()}
    gathers = {key: tally for key, tally in micro.items() if key[0] == "all_gather"}
    once = sum(u.gather_bytes for u in engine.unit_shapes())
    share = once / sum(u.gather_bytes * gathered[u.name] for u in engine.unit_shapes())
    return {
        "forward": node_bytes(engine.topology, gathers, backend=engine.backend) * share,
        "micro-step": node_bytes(engine.topology, hop1, backend=engine.backend),
        "boundary micro-step": node_bytes(engine.topology, micro, backend=engine.backend),
    }


def _read_own_nic() -> int:
    return int(Path(f"/sys/class/net/{NIC}/statistics/tx_bytes").read_text())


def main(folder: str) -> None:
    """Measures every setting and leaves this node's measurements in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    node_size = int(os.environ["LOCAL_WORLD_SIZE"])
    topology = Topology(world_size=dist.get_world_size(), node_size=node_size, partition_size=1)
    found = [measurement for setting in settings(topology) for measurement in measure(setting, _read_own_nic)]
    if dist.get_rank() % node_size == 0:
        path = Path(folder) / f"node{dist.get_rank() // node_size}.json"
        path.write_text(json.dumps([asdict(measurement) for measurement in found]))
    dist.barrier()
    dist.destroy_process_group()


def read(folder: Path) -> list[Measurement]:
    """What all nodes have left in `folder`."""
    entries = [entry for path in sorted(folder.glob("node*.json")) for entry in json.loads(path.read_text())]
    return [Measurement(**{**entry, "setting": Setting(**entry["setting"])}) for entry in entries]


if __name__ == "__main__":
    main(sys.argv[1])
