"""Which clusters can be had by name, and how is any other described by its rates?

Data sheets: GPUs per node, device memory, dense peaks, NVLink bytes per second per GPU and NIC bits per second per
node, each link per direction. What part of them a collective reaches is an assumption until `hf-mics measure` has run.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_mics.errors import ConfigError, did_you_mean
from hf_mics.planning.cluster import Accelerator, Cluster, Link, Range, require_positive
from hf_mics.planning.workload import Precision

# End-to-end figures bound the efficiency of computing alone from below: 33 % (nanoGPT, torchtitan 8B eager) to 47 % of
# the peak in model FLOPS (Megatron-LM, MPT 7B), a third more where activations are recomputed; the best single matrix
# product, 80 % on an H100, bounds it from above.
COMPUTE_EFFICIENCY = Range(0.45, 0.65)
# On p4d, collectives are known to reach about 340 of the 400 Gbit/s: the upper end.
NIC_EFFICIENCY = Range(0.60, 0.85)
NVLINK_EFFICIENCY = Range(0.50, 0.80)
MEMORY_EFFICIENCY = Range(0.60, 0.90)
INTRA_NODE_LATENCY_S = Range(2e-6, 10e-6)
INTER_NODE_LATENCY_S = Range(10e-6, 50e-6)

# name: (memory GB, dense bf16 peak in TFLOP/s (V100: fp16), fp32 peak without TF32, as PyTorch computes unless told
# otherwise, memory bandwidth in GB/s), from NVIDIA's data sheets.
# Decimal GB as sold: devices have up to 7 % more, about what CUDA and NCCL take for themselves.
_GPUS: dict[str, tuple[float, float, float, float]] = {
    "V100-32GB": (32, 125, 15.7, 900),
    "A100-40GB": (40, 312, 19.5, 1555),
    "A100-80GB": (80, 312, 19.5, 2039),
    "H100-80GB": (80, 989, 67, 3350),
    "H200-141GB": (141, 989, 67, 4800),
    "B200-180GB": (180, 2250, 75, 8000),
}


@dataclass(frozen=True)
class Instance:
    """A kind of node: `gpus` of one type, NVLink in GB/s per GPU, network interface in Gbit/s per node."""

    gpu: str
    nvlink_gb_per_s: float
    nic_gbit_per_s: float
    gpus: int = 8


INSTANCES: dict[str, Instance] = {
    "p3dn.24xlarge": Instance("V100-32GB", 150, 100),
    "p4d.24xlarge": Instance("A100-40GB", 300, 400),
    "p4de.24xlarge": Instance("A100-80GB", 300, 400),
    "p5.48xlarge": Instance("H100-80GB", 450, 3200),
    "p5e.48xlarge": Instance("H200-141GB", 450, 3200),
    "p5en.48xlarge": Instance("H200-141GB", 450, 3200),
    "p6-b200.48xlarge": Instance("B200-180GB", 900, 3200),
    "nd-a100-v4-40gb": Instance("A100-40GB", 300, 1600),
    "nd-a100-v4-80gb": Instance("A100-80GB", 300, 1600),
    "nd-h100-v5": Instance("H100-80GB", 450, 3200),
    "a2-ultragpu-8g": Instance("A100-80GB", 300, 100),
    "a3-highgpu-8g": Instance("H100-80GB", 450, 800),
    "a3-megagpu-8g": Instance("H100-80GB", 450, 1600),
    "a3-ultragpu-8g": Instance("H200-141GB", 450, 3200),
    "dgx-a100": Instance("A100-80GB", 300, 1600),
    "dgx-h100": Instance("H100-80GB", 450, 3200),
}


def instance_cluster(name: str, nodes: int, precision: Precision = "bf16") -> Cluster:
    """A cluster of `nodes` instances called `name`, in capitals or not; its links are ranges of what data sheets say.

    Args:
        precision: of matrix products, whose peak it is.

    Raises:
        ConfigError: no such instance; the message holds the nearest names.
    """
    known = name.casefold()
    instance = INSTANCES.get(known)
    if instance is None:
        raise ConfigError(
            f"unknown instance: expected one of {', '.join(INSTANCES)}, got {name!r}.{did_you_mean(known, INSTANCES)} "
            "Describe any other with --gpus-per-node --gpu-memory --nvlink --nic --peak, or measure it with hf-mics "
            "measure."
        )
    memory_gb, half_tflops, fp32_tflops, memory_gb_per_s = _GPUS[instance.gpu]
    return custom_cluster(
        name=known,
        gpu=instance.gpu,
        nodes=nodes,
        gpus_per_node=instance.gpus,
        gpu_memory_gb=memory_gb,
        peak_tflops=fp32_tflops if precision == "fp32" else half_tflops,
        nvlink_gb_per_s=instance.nvlink_gb_per_s,
        nic_gbit_per_s=instance.nic_gbit_per_s,
        memory_gb_per_s=memory_gb_per_s,
        source="data sheet",
    )


def custom_cluster(
    *,
    nodes: int,
    gpus_per_node: int,
    gpu_memory_gb: float,
    peak_tflops: float,
    nvlink_gb_per_s: float,
    nic_gbit_per_s: float,
    memory_gb_per_s: float | None = None,
    name: str = "custom",
    gpu: str = "GPU",
    source: str = "as given",
) -> Cluster:
    """A cluster from its rates, as data sheets state them.

    Args:
        gpu_memory_gb: decimal GB. `peak_tflops`: dense, at the precision of training.
        nvlink_gb_per_s: GB/s per GPU and direction.
        nic_gbit_per_s: Gbit/s of one node's network interface, per direction. `memory_gb_per_s`: of the GPU's own
            memory; without it the optimizer step is left out of predicted times.

    Raises:
        ConfigError: a rate that is not positive, a count that is not a positive integer.
    """
    for what, value in (
        ("gpu memory in GB", gpu_memory_gb),
        ("peak in TFLOP/s", peak_tflops),
        ("NVLink in GB/s", nvlink_gb_per_s),
        ("NIC in Gbit/s", nic_gbit_per_s),
        ("memory bandwidth in GB/s", 1.0 if memory_gb_per_s is None else memory_gb_per_s),
    ):
        require_positive(f"{name}: {what}", value)
    links = {
        "intra_node": (nvlink_gb_per_s * 1e9, NVLINK_EFFICIENCY, INTRA_NODE_LATENCY_S),
        "inter_node": (nic_gbit_per_s * 1e9 / 8, NIC_EFFICIENCY, INTER_NODE_LATENCY_S),
    }
    intra, inter = (Link(bandwidth_bytes_per_s=part.scaled(peak), latency_s=s) for peak, part, s in links.values())
    sources = {
        lane: f"{peak / 1e9:.4g} GB/s {source}, of which {part.low:.0%} to {part.high:.0%} assumed; latency assumed"
        for lane, (peak, part, _) in links.items()
    }
    memory = None if memory_gb_per_s is None else MEMORY_EFFICIENCY.scaled(memory_gb_per_s * 1e9)
    return Cluster(
        name=name,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        accelerator=Accelerator(name=gpu, memory_bytes=gpu_memory_gb * 1e9, peak_flops_per_s=peak_tflops * 1e12),
        intra_node=intra,
        inter_node=inter,
        compute_efficiency=COMPUTE_EFFICIENCY,
        update_bytes_per_s=memory,
        sources={
            **sources,
            "ring_lockstep": "assumed: from NCCL's model of a ring's latency to MiCS's",
            "compute_efficiency": f"of the {peak_tflops:.4g} TFLOP/s {source}; assumed from published training runs",
            "update_bytes_per_s": f"memory bandwidth, {source}, of which {MEMORY_EFFICIENCY.low:.0%} to "
            f"{MEMORY_EFFICIENCY.high:.0%} assumed",
        },
    )
