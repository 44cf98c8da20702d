"""An ordinary Trainer script, with MiCSCallback or without: `trainer_door.py OUT [--callback]`. Rank 0 writes OUT.

GPT-2, then BERT, whose own loss ignores the Trainer's `num_items_in_batch` (transformers 5.23) and grows with the
number of processes; so BERT gets a loss function that does not, as the Trainer's documentation shows it.
"""

import sys
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

MODELS = ("gpt2", "bert")


def masked_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits.flatten(0, 1)
    if num_items_in_batch is None:
        return torch.nn.functional.cross_entropy(logits, labels.flatten())
    return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch


def make_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        ids = {"bos_token_id": 0, "eos_token_id": 1}
        return GPT2LMHeadModel(
            GPT2Config(n_embd=15, n_layer=2, n_head=3, vocab_size=61, n_positions=16, **no_dropout, **ids)
        )
    return BertForMaskedLM(
        BertConfig(
            hidden_size=15, num_hidden_layers=2, num_attention_heads=3, intermediate_size=29, vocab_size=61,
            max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def make_dataset() -> list[dict[str, torch.Tensor]]:
    # 72 rows on 4 ranks in batches of 2 are 9 micro-steps an epoch: four windows of 2 and one of 1. Rows of different
    # lengths, so that ranks train on different numbers of tokens.
    rows = torch.randint(61, (72, 12), generator=torch.Generator().manual_seed(0))
    real = torch.arange(12) < torch.arange(72)[:, None] % 9 + 4
    return [
        {"input_ids": row, "attention_mask": mask.long(), "labels": row.where(mask, -100)}
        for row, mask in zip(rows, real, strict=True)
    ]


def make_trainer(name: str, output_dir: str, batch_size: int, callbacks: list[Any], **settings: Any) -> Trainer:
    dataset = make_dataset()
    settings = {
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-1,
        "optim": "sgd",
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }
    return Trainer(
        model=make_model(name),
        args=TrainingArguments(output_dir=output_dir, **settings),
        train_dataset=dataset,
        eval_dataset=dataset[8::9],  # rows of full length: a mean of means is the mean then
        callbacks=callbacks,
        compute_loss_func=masked_loss if name == "bert" else None,
    )


class Hop2Calls(TrainerCallback):
    """How often hop 2 has run on each unit, after every optimizer step."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    def on_step_end(self, *args, model=None, **kwargs) -> None:
        from hf_mics import mics_engine

        engine = mics_engine(model)
        self.calls.append(engine.meter.read()["all_reduce", "replication"].calls / len(engine.units))


def report(trainer: Trainer) -> dict[str, Any]:
    return {
        "log": trainer.state.log_history,
        "evaluation": trainer.evaluate()["eval_loss"],
        "weights": {k: v.clone() for k, v in trainer.accelerator.get_state_dict(trainer.model).items()},
    }


def main() -> None:
    reports = {}
    for name in MODELS:
        counter = Hop2Calls()
        callbacks: list[TrainerCallback] = [counter]
        if "--callback" in sys.argv:
            from hf_mics import MiCSCallback

            callbacks.append(MiCSCallback())
        trainer = make_trainer(name, sys.argv[1] + ".d", 2, callbacks)
        trainer.train()
        reports[name] = {**report(trainer), "hop 2 calls": counter.calls}
    if trainer.is_world_process_zero():
        torch.save(reports, sys.argv[1])


if __name__ == "__main__":
    main()
