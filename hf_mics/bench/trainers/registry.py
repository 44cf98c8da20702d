"""Which trainer belongs to which system? Imports only the library that the system needs."""

from __future__ import annotations

from hf_mics.bench.configuration import OWN_ENVIRONMENT, Configuration
from hf_mics.bench.trainers.base import Trainer


def build_trainer(configuration: Configuration) -> Trainer:
    """The trainer of `configuration` on this rank; a collective call."""
    if configuration.spec.environment != OWN_ENVIRONMENT:
        from hf_mics.bench.trainers.zero import DeepSpeedTrainer

        return DeepSpeedTrainer(configuration)
    if configuration.system.startswith(("accelerate-", "transformers-", "mics")):
        from hf_mics.bench.trainers import accelerated

        if configuration.system == "mics":
            return accelerated.MiCSTrainer(configuration)
        if configuration.system.startswith("transformers-"):
            return accelerated.TransformersTrainer(configuration)
        return accelerated.AcceleratedTrainer(configuration)
    from hf_mics.bench.trainers import plain

    return {
        "reference": plain.LocalTrainer,
        "no-communication": plain.LocalTrainer,
        "ddp": plain.DDPTrainer,
        "fsdp2": plain.FSDP2Trainer,
        "fsdp2-no-sync": plain.FSDP2NoSyncTrainer,
    }[configuration.system](configuration)
