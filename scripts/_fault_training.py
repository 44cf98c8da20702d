"""An ordinary Accelerate script that scripts/cluster_faults launches: trains a small GPT-2, saves, and resumes."""

from __future__ import annotations

import argparse
import time
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY, TOKENS, GLOBAL_ROWS, MICRO_STEPS = 512, 32, 24, 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--save-after", type=int)
    parser.add_argument("--resume-after", type=int, default=0)
    parser.add_argument("--folder")
    options = parser.parse_args()
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=options.timeout_s))
    accelerator = Accelerator(gradient_accumulation_steps=MICRO_STEPS, kwargs_handlers=[timeout])
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": TOKENS}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=1))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    if options.resume_after:
        accelerator.load_state(options.folder)
    for step in range(options.resume_after + 1, options.steps + 1):
        total = torch.zeros(())
        for micro in range(MICRO_STEPS):
            # The same global batch for every number of ranks.
            generator = torch.Generator().manual_seed(100 * step + micro)
            rows = torch.randint(VOCABULARY, (GLOBAL_ROWS, TOKENS), generator=generator)
            rows[:, 1::2] = rows[:, ::2]  # something to learn
            mine = rows.chunk(accelerator.num_processes)[accelerator.process_index]
            with accelerator.accumulate(model):
                loss = model(input_ids=mine, labels=mine).loss
                accelerator.backward(loss)
                total += loss.detach() / MICRO_STEPS
                optimizer.step()
                optimizer.zero_grad()
        mean = accelerator.reduce(total, "mean").item()
        accelerator.print(f"step {step} at {time.time():.2f} loss {mean:.6f}", flush=True)
        if step == options.save_after:
            accelerator.save_state(options.folder)
    accelerator.end_training()


if __name__ == "__main__":
    main()
