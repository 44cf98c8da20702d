"""How many bytes should leave a node's NIC per optimizer step of a benchmark run, by hop?"""

from __future__ import annotations

from hf_mics.bench.wire_check import nic_bytes
from hf_mics.engine import MiCSEngine

HOP1, HOP2 = "hop1", "hop2"


def expected_nic_bytes(engine: MiCSEngine, micro_steps: int, *, two_hop: bool = True) -> dict[str, float]:
    """Payload bytes that leave each node's NIC in one optimizer step, {"hop1": ..., "hop2": ...}.

    From the engine's prediction of what a rank sends, and from how gloo moves it. Left out: headers, acknowledgements.
    """
    sent = engine.predict_step(micro_steps).per_rank
    hop1 = {key: tally for key, tally in sent.items() if key[0] != "all_reduce"}
    hop2 = {key: tally for key, tally in sent.items() if key[0] == "all_reduce"}
    times = 1 if two_hop else micro_steps
    return {HOP1: nic_bytes(engine.topology, hop1), HOP2: times * nic_bytes(engine.topology, hop2)}
