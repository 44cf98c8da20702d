"""How many bytes should leave a node's NIC per optimizer step of a benchmark run, by hop?"""

from __future__ import annotations

from hf_mics.engine import MiCSEngine

HOP1, HOP2 = "hop1", "hop2"


def expected_nic_bytes(engine: MiCSEngine, micro_steps: int, *, two_hop: bool = True) -> dict[str, float]:
    """Payload bytes that leave each node's NIC in one optimizer step, {"hop1": ..., "hop2": ...}.

    From the engine's prediction of a step, in which hop 2 runs once. Left out: headers, acknowledgements.
    """
    predicted = engine.predict_step(micro_steps).nic_bytes
    times = 1 if two_hop else micro_steps
    hop1 = predicted["hop1_all_gather"] + predicted["hop1_reduce_scatter"]
    return {HOP1: hop1, HOP2: times * predicted["hop2_all_reduce"]}
