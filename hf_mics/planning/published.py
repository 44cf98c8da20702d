"""What has been published of MiCS, and in which setting is each figure predicted?

Figures: Amazon Science, "Near-linear scaling of gigantic-model training on AWS", and arXiv 2205.00119 (abstract).
TFLOPS there count recomputed activations. The sources give model sizes, instances and, for the 175B model, the
sequence length; the rest of `SETTINGS` is this project's assumption.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hf_mics.planning.cluster import Cluster
from hf_mics.planning.instances import instance_cluster
from hf_mics.planning.models import find_model
from hf_mics.planning.timing import Implementation, System
from hf_mics.planning.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model on instances, as a published figure had it or, where it does not say, as is assumed here."""

    model: str
    instance: str
    partition_size: int
    micro_batch: int
    seq_length: int = 2048
    accumulation: int = 4

    @cached_property
    def workload(self) -> Workload:
        """The training run: fp16, AdamW, activations recomputed."""
        return Workload(
            model=find_model(self.model),
            seq_length=self.seq_length,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            precision="fp16",
        )

    def cluster(self, world_size: int) -> Cluster:
        """The instances that hold `world_size` GPUs."""
        return instance_cluster(self.instance, 1).with_world_size(world_size)


# What is not published follows from this project's memory estimate: the partition group is the smallest in which the
# model fits, the micro-batch the largest power of two that then fits (BERT: sequences of 512, an assumption).
SETTINGS = {
    "175B": Setting(model="gpt-175b", instance="p4de.24xlarge", partition_size=64, micro_batch=2),
    "100B": Setting(model="gpt-100b", instance="p4d.24xlarge", partition_size=128, micro_batch=2),
    "BERT 10B": Setting(model="bert-10b", instance="p3dn.24xlarge", partition_size=8, micro_batch=16, seq_length=512),
}

# DeepSpeed 0.5.6 fetched the parameters of one module, for a layer its four matrix products, at a time. How much of it
# ran beside computing is not published: all of it at the fast end of a prediction, none at the slow end.
DEEPSPEED_OVERLAPPED = Implementation(calls_per_unit=4)
DEEPSPEED_SERIAL = Implementation(calls_per_unit=4, overlap=False)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published point: TFLOPS of one GPU."""

    setting: str
    system: System
    world_size: int
    tflops_per_gpu: float


MICS_WEAK_SCALING = 0.994
ZERO3_WEAK_SCALING = 0.72
BERT_SPEEDUP_UP_TO = 2.82
# At 128 GPUs from the published scaling efficiencies.
POINTS = (
    Published(setting="175B", system="mics", world_size=128, tflops_per_gpu=169),
    Published(setting="100B", system="mics", world_size=128, tflops_per_gpu=170 / MICS_WEAK_SCALING),
    Published(setting="100B", system="mics", world_size=512, tflops_per_gpu=170),
    Published(setting="100B", system="zero3", world_size=128, tflops_per_gpu=62 / ZERO3_WEAK_SCALING),
    Published(setting="100B", system="zero3", world_size=512, tflops_per_gpu=62),
)
