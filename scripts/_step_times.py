"""What does an optimizer step of a small GPT-2 take under MiCS, for several layouts? One launch, one JSON line.

Started by scripts/validate_time on every rank; --layouts is a list of PARTITION_SIZE:ACCUMULATION.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2LMHeadModel

from hf_mics import apply_mics


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("layers", "hidden", "heads", "vocab", "seq-length", "micro-batch", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--layouts", nargs="+", required=True)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    try:
        times = {layout: step_times(options, *map(int, layout.split(":"))) for layout in options.layouts}
        if dist.get_rank() == 0:
            print("STEP_TIMES " + json.dumps(times), flush=True)
    finally:
        dist.destroy_process_group()


def step_times(options: argparse.Namespace, partition_size: int, accumulation: int) -> list[float]:
    """Seconds of each optimizer step after one that warms up, of the slowest rank."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=options.layers,
            n_embd=options.hidden,
            n_head=options.heads,
            vocab_size=options.vocab,
            n_positions=options.seq_length,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    shape = (dist.get_world_size() // partition_size, partition_size)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard"))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    model = apply_mics(fully_shard(model, mesh=mesh))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = torch.randint(options.vocab, (options.micro_batch, options.seq_length))
    seconds = []
    for _ in range(1 + options.steps):
        dist.barrier()
        began = time.perf_counter()
        for micro_step in range(accumulation):
            model.set_requires_gradient_sync(micro_step == accumulation - 1)
            model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    slowest = torch.tensor(seconds[1:], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()


if __name__ == "__main__":
    main()
