"""An ordinary Trainer script."""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

model = GPT2LMHeadModel(
    GPT2Config(n_embd=15, n_layer=2, n_head=3, vocab_size=61, n_positions=16, bos_token_id=0, eos_token_id=1)
)
rows = torch.randint(61, (72, 12), generator=torch.Generator().manual_seed(0)).tolist()
arguments = TrainingArguments(
    output_dir=sys.argv[1],
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    num_train_epochs=2,
    learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": r, "labels": r} for r in rows])
trainer.train()
