"""Pretrain a BERT-style model under MiCS, from text to a Hugging Face folder: the stock Trainer, to be copied.

    accelerate launch --config_file recipes/configs/cpu_2x2.yaml recipes/pretrain_bert.py --output_dir runs/bert-tiny
    accelerate launch --config_file recipes/configs/gpu_1x8.yaml recipes/pretrain_bert.py --output_dir runs/bert-large \
        --preset bert-large --dataset_name HuggingFaceFW/fineweb-edu --streaming --whole_word_mask \
        --per_device_train_batch_size 32 --max_steps 50000 --save_steps 1000

The only line of it that knows about MiCS is the callback; the size of the partition groups comes from the accelerate
config. Beside the flags below it takes every flag of `TrainingArguments`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from transformers import AutoModelForMaskedLM, Trainer, set_seed

from hf_mics import MiCSCallback
from hf_mics.pretraining.arguments import RecipeArguments, parse_flags
from hf_mics.pretraining.blocks import BlockArguments, build_model, prepare_blocks
from hf_mics.pretraining.masking import CountEpochs, MaskingArguments, mask_once, masking_collator
from hf_mics.pretraining.objective import masked_token_metrics, mean_cross_entropy, predictions_and_losses
from hf_mics.pretraining.ranks import make_output_dir, mistakes_told_once
from hf_mics.pretraining.results import finish
from hf_mics.pretraining.text import TextArguments


@dataclass(kw_only=True)
class BertArguments(BlockArguments):
    """What to pretrain."""

    preset: str = field(default="bert-tiny", metadata={"help": "A named model shape, see hf_mics/presets.py."})


@dataclass
class RunArguments(RecipeArguments):
    """The Trainer's own flags, with defaults for the default run."""

    output_dir: str = field(default="runs/bert", metadata={"help": "Model, plot, logs and checkpoints."})
    max_steps: int = field(
        default=600,
        metadata={"help": "Optimizer steps, those of a resumed run included; -1: by --num_train_epochs."},
    )
    learning_rate: float | None = field(default=None, metadata={"help": "Peak; default: what suits the model."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "What the learning rate does after warm-up."})
    per_device_train_batch_size: int = field(
        # Small, for many steps: a masked model first learns how often tokens are, and leaves that plateau by steps
        # rather than by tokens (64 blocks a step were still on it after 140 steps, 16 left it within 150).
        default=2,
        metadata={"help": "Blocks per micro-step."},
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float = field(default=200, metadata={"help": "Evaluate every so many optimizer steps."})


def main() -> None:
    """Trains, evaluates, logs, saves."""
    text_args, args, mask_args, run_args = parse_flags(TextArguments, BertArguments, MaskingArguments, RunArguments)
    make_output_dir(run_args.output_dir)
    blocks = prepare_blocks(args, text_args, "masked", run_args.seed, with_offsets=mask_args.whole_word_mask)
    collator = masking_collator(blocks.tokenizer, mask_args, run_args.seed)
    run_args.learning_rate = blocks.learning_rate if run_args.learning_rate is None else run_args.learning_rate
    run_args.remove_unused_columns = False  # the collator needs them all
    set_seed(run_args.seed)
    model = build_model(AutoModelForMaskedLM, blocks.config)
    trainer = Trainer(
        model=model,
        args=run_args,
        train_dataset=blocks.train,
        eval_dataset=mask_once(blocks.validation, collator),
        processing_class=blocks.tokenizer,
        data_collator=collator,
        compute_loss_func=partial(mean_cross_entropy, label_smoothing=run_args.label_smoothing_factor),
        compute_metrics=masked_token_metrics,
        preprocess_logits_for_metrics=predictions_and_losses,
        callbacks=[MiCSCallback(), CountEpochs(collator)],
    )
    trainer.train(resume_from_checkpoint=run_args.resume_from)
    metrics = finish(trainer, f"BERT pretraining under MiCS ({model.num_parameters() / 1e6:,.1f}M parameters)", "token")
    if trainer.is_world_process_zero():
        print(
            f"Held-out text: perplexity of masked tokens {metrics['eval_perplexity']:.1f}, accuracy on them "
            f"{metrics['eval_masked_accuracy']:.1%} (always the most frequent token: "
            f"{metrics['eval_most_frequent_token_accuracy']:.1%})"
        )


if __name__ == "__main__":
    with mistakes_told_once():
        main()
