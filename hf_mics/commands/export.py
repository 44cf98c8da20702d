"""How does a checkpoint become a model folder from a shell? `hf-mics export CHECKPOINT OUT`"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to `parser`."""
    parser.add_argument("checkpoint", type=Path, help="a folder of Accelerator.save_state or of a Trainer")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--model-index", type=int, default=0, help="which model, where several were prepared")
    parser.add_argument(
        "--max-shard-size",
        help="of a weight file, in bytes or as 5GB; each is put together in memory (default: the largest tensor, at "
        "least 32 MiB; adapters are one file)",
    )


def run(options: argparse.Namespace) -> None:
    """Exports and says what was written."""
    from hf_mics.checkpoint.export import export_checkpoint

    size = options.max_shard_size
    size = int(size) if size is not None and size.isdecimal() and int(size) else size
    done = export_checkpoint(options.checkpoint, options.out, model_index=options.model_index, max_shard_size=size)
    print(
        f"{options.out}: {done.tensors} tensors, {done.weight_bytes / 1e6:,.1f} MB, in {done.files} "
        f"safetensors file{'s' * (done.files > 1)}; load with {done.loads_with}"
    )
