"""An ordinary Accelerate script, all at module level: a classifier with no_sync by hand and a checkpoint."""

import sys
import tempfile

import torch
from accelerate import Accelerator
from transformers import BertConfig, BertForSequenceClassification

if __name__ == "__main__":
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            hidden_size=15,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=29,
            vocab_size=61,
            max_position_embeddings=16,
        )
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    generator = torch.Generator().manual_seed(accelerator.process_index)
    for _ in range(3):
        for micro_step in range(4):
            rows = torch.randint(61, (2, 12), generator=generator)
            labels = rows[:, 0] % 2
            if micro_step < 3:
                with accelerator.no_sync(model):
                    accelerator.backward(model(input_ids=rows, labels=labels).loss)
            else:
                accelerator.backward(model(input_ids=rows, labels=labels).loss)
        optimizer.step()
        optimizer.zero_grad()
    folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
    accelerator.save_state(folder)
    accelerator.load_state(folder)
