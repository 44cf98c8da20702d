"""An ordinary Accelerate script: causal language modelling with accumulation and clipping."""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, get_scheduler


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(42)
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=15, n_layer=2, n_head=3, vocab_size=61, n_positions=16, bos_token_id=0, eos_token_id=1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = torch.randint(61, (40, 12), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(data), batch_size=2, shuffle=True)
    scheduler = get_scheduler("linear", optimizer, 0, args.epochs * len(loader))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for _ in range(args.epochs):
        model.train()
        for (rows,) in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=rows, labels=rows).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            losses = [accelerator.gather_for_metrics(model(input_ids=r, labels=r).loss) for (r,) in loader]
        accelerator.print("loss", torch.cat([loss.reshape(-1) for loss in losses]).mean().item())
    accelerator.end_training()


if __name__ == "__main__":
    main()
