"""How does DeepSpeed train over gloo? (In an environment of its own; the two releases differ in MiCS alone.)"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from hf_mics.bench.configuration import Configuration
from hf_mics.bench.trainers.base import Batch, Trainer, storage_bytes
from hf_mics.bench.workload import build_model, build_optimizer


class DeepSpeedTrainer(Trainer):
    """ZeRO-2, ZeRO-3, or MiCS where the release still has it, with torch's AdamW."""

    def __init__(self, configuration: Configuration) -> None:
        deepspeed = _import_deepspeed(configuration)
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        model = build_model(configuration.model)
        numel = sum(param.numel() for param in model.parameters())
        settings = _settings(configuration, numel)
        if configuration.system.endswith("-mics"):
            # As a context around construction MiCS_Init spoils Hugging Face's own initialization.
            deepspeed.zero.MiCS_Init(module=model, config_dict_or_path=settings)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(model), config=settings, dist_init_required=False
        )

    def micro_step(self, batch: Batch, *, last: bool) -> torch.Tensor:
        """See the base class; DeepSpeed itself knows which micro-step is the last."""
        loss = self._engine(**batch).loss
        self._engine.backward(loss)
        self._engine.step()
        return loss.detach()

    def gradient_bytes(self) -> int:
        """See the base class: the flat buffers in which DeepSpeed keeps gradients."""
        optimizer: Any = self._engine.optimizer
        held = [param.grad for param in self._engine.module.parameters()]
        held.append(getattr(optimizer, "grad_partitions_flat_buffer", None))
        for name in ("averaged_gradients", "all_grad_tensors"):
            for parts in getattr(optimizer, name, {}).values():
                held += parts or []
        return storage_bytes(tensor for tensor in held if isinstance(tensor, torch.Tensor))


def _import_deepspeed(configuration: Configuration) -> Any:
    os.environ["DS_ACCELERATOR"] = "cpu"
    if configuration.system.endswith("-mics"):
        # Unset, MiCS takes every rank for a node of its own.
        os.environ["NDEV_PER_NODE"] = str(configuration.node_size)
        _give_gloo_a_coalesced_gather()
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # A shared-memory kernel that it would compile for every rank, and that training does not need.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _settings(configuration: Configuration, numel: int) -> dict[str, Any]:
    c = configuration
    zero: dict[str, Any] = {"stage": 2 if c.system == "deepspeed-zero2" else 3}
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0
        if c.system != "deepspeed-zero3-reuse":
            zero |= {"stage3_max_live_parameters": numel // 10, "stage3_max_reuse_distance": numel // 10}
    if c.partition_size is not None:
        spans = c.topology.nodes_per_partition > 1  # DeepSpeed refuses the hierarchical gather inside one node
        zero |= {"mics_shard_size": c.partition_size, "mics_hierarchical_params_gather": c.hierarchical and spans}
    return {
        "train_micro_batch_size_per_gpu": c.rows,
        "gradient_accumulation_steps": c.micro_steps,
        "gradient_clipping": 0.0,  # the default clips to a norm of 1 (tried, 0.19.8); no other system here clips
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }


def _give_gloo_a_coalesced_gather() -> None:
    """DeepSpeed's MiCS gathers through a function of torch that is gone, and that gloo never had."""
    from torch.distributed import distributed_c10d

    def gather_one_by_one(outputs: list[Any], inputs: list[Any], group: Any = None, async_op: bool = False) -> Any:
        works = [
            dist.all_gather_into_tensor(output, shard, group=group, async_op=async_op)
            for output, shard in zip(outputs, inputs, strict=True)
        ]
        return _Works(works) if async_op else None

    # Under the name by which DeepSpeed imports it.
    distributed_c10d.__dict__["_all_gather_base_coalesced"] = gather_one_by_one


class _Works:
    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()
