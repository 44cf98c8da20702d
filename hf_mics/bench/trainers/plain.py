"""How do one process, DDP and FSDP2 train without a library above them?"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_mics._torch_compat import find_units
from hf_mics.bench.configuration import Configuration
from hf_mics.bench.trainers.base import Batch, Trainer, storage_bytes
from hf_mics.bench.workload import blocks, build_model, build_optimizer


class LocalTrainer(Trainer):
    """A model that no other rank knows of; the base of the others here."""

    def __init__(self, configuration: Configuration) -> None:
        self._micro_steps = configuration.micro_steps
        self.model: Any = self._wrap(build_model(configuration.model))
        self.optimizer = build_optimizer(self.model)

    def _wrap(self, model: nn.Module) -> nn.Module:
        return model

    def _before(self, *, last: bool) -> contextlib.AbstractContextManager[object]:
        """The context of one micro-step's forward and backward."""
        return contextlib.nullcontext()

    def micro_step(self, batch: Batch, *, last: bool) -> torch.Tensor:
        """See the base class."""
        with self._before(last=last):
            loss = self.model(**batch).loss
            (loss / self._micro_steps).backward()
        if last:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def gradient_bytes(self) -> int:
        """See the base class."""
        return storage_bytes(param.grad for param in self.model.parameters())


class DDPTrainer(LocalTrainer):
    """DistributedDataParallel with `no_sync`."""

    def _wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def _before(self, *, last: bool) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if last else self.model.no_sync()


class FSDP2Trainer(LocalTrainer):
    """`fully_shard` on every block and the root, over all ranks; reduces every micro-step."""

    def _wrap(self, model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def gradient_bytes(self) -> int:
        """See the base class."""
        return held_gradient_bytes(self.model)


class FSDP2NoSyncTrainer(FSDP2Trainer):
    """The same, reducing only in the last micro-step: gradients stay whole until then."""

    def _before(self, *, last: bool) -> contextlib.AbstractContextManager[object]:
        self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()


def held_gradient_bytes(model: nn.Module) -> int:
    """Bytes of gradients that FSDP2 or hf_mics holds on this rank, sharded or not."""
    return storage_bytes(tensor for unit in find_units(model) for tensor in unit.gradient_tensors())
