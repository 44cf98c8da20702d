"""What does MiCS tell its user when training starts?"""

from __future__ import annotations

from collections.abc import Sequence

from hf_mics.engine import MiCSEngine
from hf_mics.topology import Topology


def start_up_summary(
    engine: MiCSEngine, wrapped: Sequence[str], *, micro_steps: int, node_names: Sequence[str] = ()
) -> str:
    """The start-up summary: groups, nodes, what was wrapped, and what one optimizer step will move.

    `micro_steps` is the number of micro-steps per optimizer step as far as it is known when training starts.
    """
    topology = engine.topology
    step = engine.predict_step(micro_steps)
    lines = [
        f"MiCS: {_count(topology.world_size, 'rank')} on {_count(topology.node_count, 'node')} of "
        f"{topology.node_size}, {_count(topology.replication_size, 'partition group')} of {topology.partition_size}"
        + (f" ({_named(node_names)})" if node_names else ""),
        *topology.draw(max_nodes=8).splitlines(),
        f"sharded: {_count(len(engine.units), 'unit')}: {wrapped[0] if wrapped else 'as the model came'}",
        *(f"  left in the root: {text}" for text in wrapped[1:]),
        f"collectives: {_collectives(topology, engine.hierarchical)}; gradients travel as {_wires(engine)}, "
        "add up in float32",
        f"per optimizer step of {_count(micro_steps, 'micro-step')} each rank sends "
        f"{_size(step.hop1_bytes)} in hop 1 and {_size(step.hop2_bytes)} in hop 2",
        "  of which each node's network interface carries "
        f"{_size(step.nic_bytes['hop1_all_gather'] + step.nic_bytes['hop1_reduce_scatter'])} of hop 1 and "
        f"{_size(step.nic_bytes['hop2_all_reduce'])} of hop 2",
    ]
    return "\n".join(lines)


def _collectives(topology: Topology, hierarchical: bool) -> str:
    if topology.partition_size == 1:
        return "none in hop 1 (plain data parallelism)"
    if topology.nodes_per_partition == 1:
        return "hop 1 inside each node"
    staged = hierarchical and topology.is_hierarchical
    return f"hop 1 spans {topology.nodes_per_partition} nodes, {'hierarchical' if staged else 'flat'}"


def _wires(engine: MiCSEngine) -> str:
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in engine.wire_dtypes}))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _size(size_bytes: float) -> str:
    exponent = 0
    while size_bytes >= 1000 and exponent < 4:
        size_bytes /= 1000
        exponent += 1
    number = f"{size_bytes:.0f}" if size_bytes >= 100 else f"{size_bytes:.3g}"
    return f"{number} {('', 'k', 'M', 'G', 'T')[exponent]}B"
