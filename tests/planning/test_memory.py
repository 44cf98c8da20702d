"""Do the two grades of memory estimate agree with a tracked run, and behave as sharding says?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hf_mics.errors import ConfigError
from hf_mics.memory_probe import probe_memory, probe_partition_sizes, track_phases
from hf_mics.planning.memory import layer_activations, padded_total, peak_memory
from hf_mics.planning.models import find_model
from hf_mics.planning.workload import ModelShape, Workload
from hf_mics.topology import Topology


def shape(family: str, layers: int, hidden: int, vocab: int, **other: Any) -> ModelShape:
    sizes: dict[str, Any] = {"num_layers": layers, "hidden_size": hidden, "ffn_size": 4 * hidden, "vocab_size": vocab}
    sizes |= {"num_heads": 8, "context_length": 512}
    return ModelShape(name=family, family=family, **(sizes | other))  # type: ignore[arg-type]


def groups(partition: int, world: int = 16) -> Topology:
    return Topology(world_size=world, node_size=8, partition_size=partition)


# Where the peak is in the loss, in a layer's backward with recomputation and without, and in the communication buffers.
CASES = {
    "gpt": (Workload(model=shape("gpt", 3, 256, 8192), seq_length=128, micro_batch=2, accumulation=2), groups(8)),
    "bert": (
        Workload(
            model=shape("bert", 3, 256, 512),
            seq_length=128,
            micro_batch=16,
            accumulation=3,
            activation_checkpointing=False,
            precision="fp32",
        ),
        groups(2),
    ),
    "llama": (
        Workload(
            model=shape("llama", 3, 256, 1024, num_kv_heads=2, tied_embeddings=False), seq_length=128, micro_batch=16
        ),
        groups(4),
    ),
    "t5": (
        Workload(
            model=shape("t5", 2, 256, 512, num_decoder_layers=2, gated_ffn=True),
            seq_length=128,
            micro_batch=8,
            activation_checkpointing=False,
        ),
        groups(8),
    ),
    "t5 of long sequences": (
        Workload(
            model=shape("t5", 2, 64, 64, num_decoder_layers=3, ffn_size=64, head_dim=8, num_heads=16), seq_length=384
        ),
        groups(8),
    ),
    "t5 of long sequences and a deep decoder": (
        Workload(
            model=shape("t5", 1, 64, 64, num_decoder_layers=7, ffn_size=64, head_dim=8, num_heads=16, gated_ffn=True),
            seq_length=384,
        ),
        groups(16),
    ),
    "gpt with a large head of its own": (
        Workload(model=shape("gpt", 3, 128, 65536, tied_embeddings=False), seq_length=32, accumulation=2),
        groups(8),
    ),
    "wide gpt over two nodes": (Workload(model=shape("gpt", 3, 1024, 512), seq_length=32, accumulation=2), groups(16)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_closed_form_is_within_ten_percent_of_what_fsdp2_allocates(case: str):
    workload, topology = CASES[case]
    tracked = max(sum(kinds.values()) for kinds in track_phases(workload, topology).values())
    assert peak_memory(workload, topology).total_bytes == pytest.approx(tracked, rel=0.10)


def test_a_probe_at_shallow_depths_gives_what_the_whole_depth_takes():
    deep = shape("gpt", 14, 128, 2048)
    workload = Workload(model=deep, seq_length=64, micro_batch=4, activation_checkpointing=False)
    tracked = track_phases(workload, groups(8))
    highest = max(tracked, key=lambda name: sum(tracked[name].values()))
    probed = probe_memory(workload, groups(8))
    assert probed.total_bytes == pytest.approx(sum(tracked[highest].values()), rel=0.03)
    assert probed.moment == highest


def test_sizes_between_two_probed_ones_are_interpolated():
    """A constant and a part that is 1 / partition size: exact but for padding, here of 250 rows."""
    workload = Workload(model=shape("gpt", 2, 256, 250), seq_length=64, micro_batch=2, accumulation=2)
    sizes = [groups(p, world=64) for p in (2, 4, 8, 16, 32, 64)]
    probed = probe_partition_sizes(workload, sizes)
    assert list(probed) == [2, 4, 8, 16, 32, 64]
    for size in (4, 32):
        exact = probe_memory(workload, groups(size, world=64)).total_bytes
        assert probed[size].total_bytes == pytest.approx(exact, rel=0.01)


def test_sharding_divides_the_model_state_and_nothing_else():
    workload = Workload(model=find_model("bert-10b"), seq_length=512, micro_batch=8, accumulation=4, precision="fp16")
    two, four = (peak_memory(workload, groups(p)).memory_bytes for p in (2, 4))
    for kind in ("parameters", "optimizer"):
        assert two[kind] / four[kind] == pytest.approx(2, rel=1e-3)
    assert two["activations"] == four["activations"]
    # AdamW keeps two fp32 values beside each fp32 parameter.
    assert two["optimizer"] == 2 * two["parameters"] == 8 * padded_total(workload.model, 2) / 2


def test_what_is_gathered_and_reduced_at_the_peak_depends_on_where_it_is():
    def memory(layers: int, vocab: int, seq_length: int, partition: int) -> tuple[Any, dict[str, int]]:
        model = shape("llama", layers, 256, vocab, tied_embeddings=False)
        units = {unit.kind: 2 * unit.padded_numel(partition) for unit in model.units}
        workload = Workload(model=model, seq_length=seq_length, micro_batch=8 if seq_length > 8 else 1)
        return peak_memory(workload, groups(partition)), units

    peak, units = memory(3, 8192, 128, 8)
    assert peak.moment == "loss"
    assert peak.memory_bytes["communication"] == units["root"] + units["head"]
    peak, units = memory(6, 6000, 8, 2)
    assert peak.moment == "backward of the first layer, end"
    assert units["layer"] < units["embedding"] < 2 * units["layer"]
    assert peak.memory_bytes["communication"] == units["root"] + units["embedding"] + 2 * units["layer"]
    peak, units = memory(1, 32000, 8, 1)
    assert peak.moment == "optimizer step"
    assert peak.memory_bytes["gradients"] == 2 * sum(units.values())
    tied = Workload(model=find_model("gpt2-xl"), seq_length=1024)
    peak, layers = peak_memory(tied, groups(16)), [unit for unit in tied.model.units if unit.kind == "layer"]
    assert peak.moment == "end of backward"
    # The tied table's is there three times: the sum, the head's part and the embedding's.
    table = 2 * tied.model.vocab_size * tied.model.hidden_size
    assert peak.memory_bytes["gradients"] == sum(4 * unit.padded_numel(16) / 16 for unit in layers) + 3 * table


def test_partial_sums_stay_sharded_between_micro_steps():
    """With accumulation a GPU holds one fp32 sum per parameter of its shard, however many micro-steps there are."""
    workload = Workload(model=find_model("gpt2-xl"), seq_length=1024, accumulation=1)
    one, two, many = (peak_memory(replace(workload, accumulation=steps), groups(8)).total_bytes for steps in (1, 2, 64))
    shard = 4 * padded_total(workload.model, 8) / 8
    assert 0 < two - one <= shard
    assert many == two


def test_recomputation_keeps_one_input_per_layer():
    workload = Workload(model=find_model("gpt-20b"), seq_length=1024, micro_batch=4)
    whole = replace(workload, activation_checkpointing=False)
    saved = peak_memory(whole, groups(16)).total_bytes - peak_memory(workload, groups(16)).total_bytes
    layer = layer_activations(workload)
    assert layer.input == 2 * 4096 * 5120, "bf16, 4 x 1024 tokens"
    # The two peaks lie in different moments, which differ by less than the backward of one layer of 62.
    assert saved == pytest.approx(61 * (layer.saved - layer.input), rel=0.04)


@pytest.mark.parametrize(("accumulation", "partition", "waiting"), [(1, 8, 0), (4, 8, 1), (1, 16, 0), (4, 16, 0)])
def test_cpu_offload_leaves_on_the_gpu_only_the_sums_that_wait_for_hop_2(
    accumulation: int, partition: int, waiting: int
):
    """Of 16 GPUs: groups of 8 all-reduce between two of them, groups of 16 do not."""
    workload = Workload(model=find_model("gpt-20b"), seq_length=1024, accumulation=accumulation)
    here, offloaded = (peak_memory(replace(workload, cpu_offload=on), groups(partition)) for on in (False, True))
    shard = 4 * padded_total(workload.model, partition) / partition
    assert here.host_bytes == 0
    assert offloaded.host_bytes == 4 * shard, "parameters, gradients and AdamW's two values"
    assert offloaded.memory_bytes["parameters"] == offloaded.memory_bytes["optimizer"] == 0
    # Unsharded gradients of one of 62 layers and of the tied embedding, and one layer's on their way to the host.
    model, layer = workload.model, workload.model.units[-1].padded_numel(partition)
    there = 2 * model.vocab_size * model.hidden_size + 2 * layer + 4 * layer / partition
    assert offloaded.memory_bytes["gradients"] == waiting * shard + there
    # Backward of the last layer with and without the state: nothing else differs but what leaves.
    assert offloaded.total_bytes < here.total_bytes - (3 + (1 - waiting) * (accumulation > 1)) * shard + 0.1 * shard
    with pytest.raises(ConfigError, match="leave out --cpu-offload"):
        probe_memory(replace(workload, cpu_offload=True), groups(partition))


def test_cpu_offload_leaves_zero2_its_copy_and_is_refused_for_ddp():
    workload = Workload(model=find_model("gpt2-xl"), seq_length=1024, cpu_offload=True)
    zero2 = peak_memory(workload, groups(16), system="zero2")
    assert zero2.memory_bytes["parameters"] == 2 * workload.model.num_parameters
    assert zero2.memory_bytes["optimizer"] == 0
    assert zero2.host_bytes == 16 * padded_total(workload.model, 16) / 16
    with pytest.raises(ConfigError, match="keeps parameters and optimizer state on the GPU: leave out --cpu-offload"):
        peak_memory(workload, groups(1), system="ddp")


def test_peers_keep_what_their_sharding_says():
    workload = Workload(model=find_model("gpt2-xl"), seq_length=1024)
    n = workload.model.num_parameters
    ddp = peak_memory(workload, groups(1), system="ddp").memory_bytes
    assert (ddp["parameters"], ddp["optimizer"], ddp["gradients"]) == (4 * n + 2 * n, 8 * n, 4 * n)
    assert ddp["communication"] == 50 * 2**20, "two buckets of 25 MiB"
    zero3, zero2 = (peak_memory(workload, groups(16), system=system) for system in ("zero3", "zero2"))
    whole_copy = zero2.memory_bytes["parameters"] - zero3.memory_bytes["parameters"]
    assert whole_copy == 2 * n
    assert zero2.memory_bytes["communication"] <= zero3.memory_bytes["communication"]
    hybrid, mics = (peak_memory(workload, groups(16), system=system).total_bytes for system in ("hsdp", "mics"))
    assert hybrid <= mics, "MiCS has the buffers of two-stage collectives on top"
    workload, topology = CASES["wide gpt over two nodes"]
    hybrid, mics = (peak_memory(workload, topology, system=system).total_bytes for system in ("hsdp", "mics"))
    assert mics - hybrid == 2 * workload.model.units[-1].padded_numel(16) / 8, "one shard for each node of the group"
