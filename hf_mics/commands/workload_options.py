"""Which flags describe what is trained? The same ones for every command that plans it."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from hf_mics.planning.models import find_model
from hf_mics.planning.workload import OptimizerName, Precision, Workload


def add_workload_arguments(parser: argparse.ArgumentParser, *, accumulation: str) -> None:
    """Adds --model and the sizes of its training step.

    What was not given is None, so that a command can tell.

    Args:
        accumulation: the help of --accumulation.
    """
    parser.add_argument("--model", help="preset, config.json, folder or hub name")
    parser.add_argument("--seq-length", type=int, help="tokens per sequence (default: the model's context)")
    parser.add_argument("--micro-batch", type=int, help="sequences per GPU and micro-step (default 1)")
    parser.add_argument("--accumulation", type=int, help=accumulation)
    parser.add_argument("--precision", choices=get_args(Precision), help="default bf16")
    parser.add_argument("--optimizer", choices=get_args(OptimizerName), help="default adamw")
    parser.add_argument("--no-activation-checkpointing", action="store_true", help="layers are not recomputed")


def workload_from_options(options: argparse.Namespace, *, accumulation: int, cpu_offload: bool = False) -> Workload:
    """The workload that the flags of `add_workload_arguments` describe.

    Args:
        accumulation: micro-steps, if the flag does not say.

    Raises:
        ConfigError: no such model, or sizes that it cannot be trained with.
    """
    model = find_model(options.model)
    return Workload(
        model=model,
        seq_length=given_or(options.seq_length, model.context_length),
        micro_batch=given_or(options.micro_batch, 1),
        accumulation=given_or(options.accumulation, accumulation),
        precision=given_or(options.precision, "bf16"),
        optimizer=given_or(options.optimizer, "adamw"),
        activation_checkpointing=not options.no_activation_checkpointing,
        cpu_offload=cpu_offload,
    )


def flag(name: str) -> str:
    """The flag whose value argparse keeps as `name`."""
    return "--" + name.replace("_", "-")


def given_or(value: Any, default: Any) -> Any:
    """`value`, or `default` where the flag was not given."""
    return default if value is None else value
