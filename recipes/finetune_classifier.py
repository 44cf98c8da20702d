"""Fine-tune a classifier of texts under MiCS, from any Hugging Face folder to another: the stock Trainer, to be copied.

    accelerate launch --config_file recipes/configs/cpu_2x2.yaml recipes/finetune_classifier.py \
        --model_name_or_path runs/bert/model --output_dir runs/topics
    accelerate launch --config_file recipes/configs/gpu_1x8.yaml recipes/finetune_classifier.py \
        --model_name_or_path bert-large-uncased --dataset_name nyu-mll/glue --dataset_config sst2 \
        --text_column sentence --learning_rate 2e-5 --num_train_epochs 3 --output_dir runs/sst2

Without a data set of yours it learns which topic a passage of Python's own documentation speaks of; without a model it
trains a tiny BERT from scratch. The only line of it that knows about MiCS is the callback; the size of the partition
groups comes from the accelerate config. Beside the flags below it takes every flag of `TrainingArguments`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from transformers import DataCollatorWithPadding, Trainer, set_seed

from hf_mics import MiCSCallback
from hf_mics.pretraining.arguments import RecipeArguments, parse_flags
from hf_mics.pretraining.classifiers import load_classifier, tokenize
from hf_mics.pretraining.labels import LabelledArguments, load_labelled
from hf_mics.pretraining.objective import classification_metrics, mean_cross_entropy, predictions
from hf_mics.pretraining.ranks import main_process_first, make_output_dir, mistakes_told_once
from hf_mics.pretraining.results import finish


@dataclass(kw_only=True)
class ClassifierArguments:
    """What to fine-tune."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or hub name of a pretrained model; default: none, train from scratch."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a text; default: what the model takes, 512 at most."},
    )


@dataclass
class RunArguments(RecipeArguments):
    """The Trainer's own flags, with defaults for the default run."""

    output_dir: str = field(default="runs/classifier", metadata={"help": "Model, plot, logs and checkpoints."})
    num_train_epochs: float = field(default=5, metadata={"help": "Passes over the training rows."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak; this one is for tiny models, 2e-5 for BERT."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Texts per micro-step."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})


def main() -> None:
    """Trains, evaluates, logs, saves."""
    data_args, args, run_args = parse_flags(LabelledArguments, ClassifierArguments, RunArguments)
    make_output_dir(run_args.output_dir)
    data = main_process_first(partial(load_labelled, data_args))
    set_seed(run_args.seed)
    model, tokenizer = load_classifier(args.model_name_or_path, data.train["text"], data.names)
    train, validation = (tokenize(rows, tokenizer, model, args.max_length) for rows in (data.train, data.validation))
    trainer = Trainer(
        model=model,
        args=run_args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=partial(mean_cross_entropy, label_smoothing=run_args.label_smoothing_factor),
        compute_metrics=classification_metrics,
        preprocess_logits_for_metrics=predictions,
        callbacks=[MiCSCallback()],
    )
    trainer.train(resume_from_checkpoint=run_args.resume_from)
    start = args.model_name_or_path or "fresh weights"
    metrics = finish(trainer, f"Classifier of {len(data.names)} classes under MiCS, from {start}", "text")
    if trainer.is_world_process_zero():
        print(
            f"Held-out texts ({len(validation)}, classes {', '.join(data.names)}), from {start}: accuracy "
            f"{metrics['eval_accuracy']:.1%} (always the most frequent class: "
            f"{metrics['eval_majority_class_accuracy']:.1%}), macro F1 {metrics['eval_f1_macro']:.3f} "
            f"({metrics['eval_majority_class_f1_macro']:.3f})"
        )


if __name__ == "__main__":
    with mistakes_told_once():
        main()
