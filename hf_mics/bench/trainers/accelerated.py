"""How do accelerate, transformers and hf_mics train the model sharded?"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin, GradientAccumulationPlugin
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from hf_mics import MiCSAccelerator, MiCSPlugin, mics_engine
from hf_mics._hf_compat import start_process_state
from hf_mics.bench.configuration import Configuration
from hf_mics.bench.trainers.base import Batch, Trainer
from hf_mics.bench.trainers.plain import held_gradient_bytes
from hf_mics.bench.wire import expected_nic_bytes
from hf_mics.bench.workload import block_class, build_model, build_optimizer


def stock_accelerator(partition_size: int | None, layer: str | None = None, **options: Any) -> Accelerator:
    """Accelerate's own Accelerator with FSDP2 on CPUs, to compare with.

    Args:
        partition_size: hybrid sharding in groups of so many ranks; None shards over all ranks.
        layer: the class of the model's layers; default what the model declares.
        options: as for `Accelerator`.
    """
    start_process_state(cpu=True)  # only makes accelerate's FSDP run on CPUs
    sizes = None
    if partition_size is not None:
        replicas = dist.get_world_size() // partition_size
        sizes = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=partition_size)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=None if layer is None else [layer],
    )
    return Accelerator(fsdp_plugin=plugin, parallelism_config=sizes, cpu=True, **options)


class AcceleratedTrainer(Trainer):
    """An accelerate loop as its documentation writes it, with the Accelerator that `_accelerator` builds."""

    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration
        self._accelerator = self._build_accelerator(configuration)
        model = build_model(configuration.model)
        self.model, self._optimizer = self._accelerator.prepare(model, build_optimizer(model))

    def _build_accelerator(self, configuration: Configuration) -> Accelerator:
        accumulation = GradientAccumulationPlugin(
            num_steps=configuration.micro_steps, sync_each_batch=not configuration.system.endswith("-no-sync")
        )
        return stock_accelerator(
            configuration.partition_size, block_class(configuration.model), gradient_accumulation_plugin=accumulation
        )

    def micro_step(self, batch: Batch, *, last: bool) -> torch.Tensor:
        """See the base class; accelerate itself knows which micro-step is the last."""
        with self._accelerator.accumulate(self.model):
            loss = self.model(**batch).loss
            self._accelerator.backward(loss)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return loss.detach()

    def gradient_bytes(self) -> int:
        """See the base class."""
        return held_gradient_bytes(self.model)


class MiCSTrainer(AcceleratedTrainer):
    """hf_mics through its Accelerator. `two_hop=False` is accelerate's `sync_each_batch`."""

    def _build_accelerator(self, configuration: Configuration) -> Accelerator:
        plugin = MiCSPlugin(
            partition_size=configuration.partition_size,
            node_size=configuration.node_size,
            hierarchical=configuration.hierarchical,
            gradient_wire_dtype=configuration.wire,
        )
        accumulation = GradientAccumulationPlugin(
            num_steps=configuration.micro_steps, sync_each_batch=not configuration.two_hop
        )
        return MiCSAccelerator(mics_plugin=plugin, gradient_accumulation_plugin=accumulation, cpu=True)

    def expected_nic_bytes(self, micro_steps: int) -> dict[str, float]:
        """See the base class."""
        return expected_nic_bytes(mics_engine(self.model), micro_steps, two_hop=self._configuration.two_hop)


class TransformersTrainer(Trainer):
    """A model that transformers shards while loading it, in the loop of transformers' own Trainer."""

    model: Any

    def __init__(self, configuration: Configuration) -> None:
        self._micro_steps = configuration.micro_steps
        topology = configuration.topology
        sizes = DistributedConfig(fsdp_size=topology.partition_size, dp_replicate_size=topology.replication_size)
        auto = AutoModelForMaskedLM if configuration.model == "bert" else AutoModelForCausalLM
        with _saved_by_rank_0(build_model(configuration.model)) as folder:
            self.model = auto.from_pretrained(folder, distributed_config=sizes)
        self.model.train()
        self._optimizer = build_optimizer(self.model)

    def micro_step(self, batch: Batch, *, last: bool) -> torch.Tensor:
        """See the base class."""
        self.model.set_requires_all_reduce(last)
        loss = self.model(**batch).loss
        (loss / self._micro_steps).backward()
        if last:
            self._optimizer.step()
            self._optimizer.zero_grad()
        return loss.detach()

    def gradient_bytes(self) -> int:
        """See the base class."""
        return held_gradient_bytes(self.model)


@contextlib.contextmanager
def _saved_by_rank_0(model: PreTrainedModel) -> Iterator[str]:
    """A folder with the saved model, which every rank of the machine can read; in a job, only rank 0 writes."""
    with tempfile.TemporaryDirectory(prefix="mics_bench_") as own:
        if dist.get_rank() == 0:
            model.save_pretrained(own)
        folder = [own]
        dist.broadcast_object_list(folder)
        yield folder[0]
        dist.barrier()
