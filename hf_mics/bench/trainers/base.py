"""What does a benchmark run ask of a system? Micro-steps, and what it holds and sends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch

Batch = dict[str, torch.Tensor]


class Trainer(ABC):
    """One model under one system, on one rank. Constructing it is a collective call."""

    @abstractmethod
    def micro_step(self, batch: Batch, *, last: bool) -> torch.Tensor:
        """Forward and backward; on the last micro-step the optimizer's step and `zero_grad` too. Returns the loss."""

    @abstractmethod
    def gradient_bytes(self) -> int:
        """Bytes of gradients that this rank holds now, asked between micro-steps."""

    def expected_nic_bytes(self, micro_steps: int) -> dict[str, float] | None:
        """Bytes that should leave each node's NIC per optimizer step, by hop, where the system can tell."""
        return None


def storage_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())
