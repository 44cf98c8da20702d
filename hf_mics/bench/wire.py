"""How many bytes should leave a node's NIC per optimizer step, given how gloo moves them?"""

from __future__ import annotations

from hf_mics.engine import MiCSEngine

HOP1, HOP2 = "hop1", "hop2"


def expected_nic_bytes(engine: MiCSEngine, micro_steps: int, *, two_hop: bool = True) -> dict[str, float]:
    """Payload bytes that leave each node's NIC in one optimizer step, {"hop1": ..., "hop2": ...}.

    The engine's own prediction, with one correction: it counts a flat reduce-scatter as a ring, and over gloo the
    engine sends every slice straight to its owner. A rank on a node of k then sends p - k slices over the NIC, which
    makes k (p-k)/p of the gradients per node, where the ring's one edge would carry (p-1)/p. Left out: headers and
    acknowledgements.
    """
    topology = engine.topology
    nic = dict(engine.predict_step(micro_steps).nic_bytes)
    staged = engine.hierarchical and topology.is_hierarchical
    if topology.nodes_per_partition > 1 and not staged:
        p, k = topology.partition_size, topology.node_size
        gradients = micro_steps * sum(unit.reduce_bytes for unit in engine.unit_shapes())
        nic["hop1_reduce_scatter"] = gradients * k * (p - k) / p
    hop2_times = 1 if two_hop else micro_steps
    return {
        HOP1: nic["hop1_all_gather"] + nic["hop1_reduce_scatter"],
        HOP2: nic["hop2_all_reduce"] * hop2_times,
    }
