"""Pretrain a GPT-style model under MiCS, from text to a Hugging Face folder: a plain Accelerate loop, to be copied.

    accelerate launch --config_file recipes/configs/cpu_2x2.yaml recipes/pretrain_gpt.py --output_dir runs/gpt-tiny
    accelerate launch --config_file recipes/configs/gpu_1x8.yaml recipes/pretrain_gpt.py --output_dir runs/gpt2-xl \
        --preset gpt2-xl --dataset_name HuggingFaceFW/fineweb-edu --streaming --max_steps 50000 --save_steps 1000

The only line of it that knows about MiCS is the one that makes the accelerator; the size of the partition groups comes
from the accelerate config.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import torch
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, default_data_collator, get_scheduler

from hf_mics import MiCSAccelerator
from hf_mics.errors import ConfigError
from hf_mics.loss_watch import LossWatch
from hf_mics.pretraining.arguments import parse_flags, require_at_least
from hf_mics.pretraining.blocks import BlockArguments, Blocks, build_model, prepare_blocks
from hf_mics.pretraining.checkpoints import Progress, checkpoint_path, find_checkpoint
from hf_mics.pretraining.metrics import load_metric
from hf_mics.pretraining.plot import plot_losses
from hf_mics.pretraining.ranks import broadcast_from_main, make_output_dir, mistakes_told_once
from hf_mics.pretraining.text import TextArguments
from hf_mics.throughput import flops_per_token, throughput_metrics


@dataclass(kw_only=True)
class PretrainArguments(BlockArguments):
    """What to train, for how long, and where it goes. Every size is per process unless it says otherwise."""

    output_dir: str = field(default="runs/gpt", metadata={"help": "Model, tokenizer, plot, logs and checkpoints."})
    preset: str = field(default="gpt-tiny", metadata={"help": "A named model shape, see hf_mics/presets.py."})
    max_steps: int = field(default=300, metadata={"help": "Optimizer steps, those of a resumed run included."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Sequences per micro-step."})
    gradient_accumulation_steps: int = field(default=2, metadata={"help": "Micro-steps per optimizer step."})
    learning_rate: float | None = field(default=None, metadata={"help": "Peak; default: the preset's, or 3e-4."})
    warmup_steps: int = field(default=20, metadata={"help": "Optimizer steps of linear warm-up before the cosine."})
    weight_decay: float = field(default=0.1, metadata={"help": "Of matrices; norms and biases have none."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm; 0: not at all."})
    logging_steps: int = field(default=10, metadata={"help": "Log every so many optimizer steps; 0: only the first."})
    eval_steps: int = field(default=100, metadata={"help": "Evaluate every so many steps (0: never), and at the end."})
    save_steps: int = field(default=0, metadata={"help": "Checkpoint every so many optimizer steps; 0: never."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "A checkpoint folder, or 'latest'."})
    report_to: str = field(default="tensorboard", metadata={"help": "Any tracker of Accelerate's, 'all' or 'none'."})
    seed: int = field(default=0, metadata={"help": "Of the weights and of the order of the data."})

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = {"max_steps": self.max_steps, "gradient_accumulation_steps": self.gradient_accumulation_steps}
        require_at_least(1, **steps, per_device_train_batch_size=self.per_device_train_batch_size)
        require_at_least(0, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay)
        require_at_least(0, learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)


@torch.no_grad()
def evaluate(accelerator: MiCSAccelerator, model, loader: DataLoader, metric) -> dict[str, float]:
    """Returns mean loss and perplexity of the validation blocks on the main process, an empty dict on the others."""
    model.eval()
    for batch in loader:
        targets = batch["input_ids"][:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=1)
        # Gathered per sequence: the duplicates that fill up the last batch are dropped, and nothing is counted twice.
        losses = accelerator.gather_for_metrics(losses)
        if accelerator.is_main_process:
            metric.add_batch(loss_nats_per_token=losses.tolist(), num_tokens=[targets.shape[1]] * len(losses))
    model.train()
    return metric.compute() if accelerator.is_main_process else {}


def make_loaders(args: PretrainArguments, blocks: Blocks) -> tuple[DataLoader, DataLoader]:
    """Returns the training and the validation loader."""
    make_loader = partial(DataLoader, batch_size=args.per_device_train_batch_size, collate_fn=default_data_collator)
    # Its own generator: else iterating draws from the one that dropout uses, and a resumed run differs.
    order = (
        {} if isinstance(blocks.train, datasets.IterableDataset) else {"shuffle": True, "generator": torch.Generator()}
    )
    return make_loader(blocks.train, **order), make_loader(blocks.validation)


def build_optimizer(args: PretrainArguments, model, suitable_learning_rate: float):
    """Returns AdamW, which decays matrices but no norms and biases, and its schedule."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    learning_rate = suitable_learning_rate if args.learning_rate is None else args.learning_rate
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    return optimizer, get_scheduler("cosine", optimizer, args.warmup_steps, args.max_steps)


def save(accelerator: MiCSAccelerator, model, tokenizer, progress: Progress, output_dir: Path) -> None:
    """Writes a normal Hugging Face folder and the plot: gathering the weights takes every rank, writing only one."""
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(output_dir / "model", state_dict=weights)
        tokenizer.save_pretrained(output_dir / "model")
        title = f"GPT pretraining under MiCS ({model.num_parameters() / 1e6:,.1f}M parameters)"
        plot_losses(progress.train_loss, progress.validation_loss, output_dir / "loss.png", title)
    (first_step, first), (last_step, last) = progress.train_loss[0], progress.train_loss[-1]
    accelerator.print(
        f"Training loss in nats per token: {first:.3f} (step {first_step}), {last:.3f} (step {last_step})"
    )
    accelerator.print(f"Model: {output_dir / 'model'}\nPlot: {output_dir / 'loss.png'}")
    accelerator.end_training()


def optimizer_steps(accelerator, model, optimizer, scheduler, loader, progress: Progress, args: PretrainArguments):
    """Trains; yields the micro-steps' losses and the gradient norm after each optimizer step, until `max_steps`."""
    sequences_per_micro_step = args.per_device_train_batch_size * accelerator.num_processes
    losses: list[torch.Tensor] = []
    watch = LossWatch(accelerator)
    while True:
        loader.set_epoch(progress.epoch)
        # Counted in sequences, so that a run that goes on with other ranks or batches finds its place in the data.
        used = progress.sequences // sequences_per_micro_step
        for batch in accelerator.skip_first_batches(loader, used) if used else loader:
            with accelerator.accumulate(model):
                loss = model(**batch, labels=batch["input_ids"]).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
                    watch.check(progress.step + 1)  # ends every rank if a loss was not finite
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            progress.sequences += sequences_per_micro_step
            if accelerator.sync_gradients:
                scheduler.step()
                progress.step += 1
                yield losses, grad_norm
                losses = []
                if progress.step >= args.max_steps:
                    return
        progress.epoch, progress.sequences = progress.epoch + 1, 0


def is_every(interval: int, step: int) -> bool:
    """Returns whether something that is due every `interval` steps is due at `step`; never if that is 0."""
    return interval > 0 and step % interval == 0


def make_accelerator(args: PretrainArguments) -> MiCSAccelerator:
    """Returns Accelerate's Accelerator with MiCS inside."""
    return MiCSAccelerator(
        # Windows may straddle epochs: each has the same number of micro-steps, and every token the same weight.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
    )


def main() -> None:
    """Trains, evaluates, logs, saves."""
    text_args, args = parse_flags(TextArguments, PretrainArguments)
    output_dir, accelerator = Path(args.output_dir), make_accelerator(args)
    make_output_dir(output_dir)
    resume_from, skipped = None, ""
    if args.resume_from_checkpoint:
        resume_from, skipped = broadcast_from_main(partial(find_checkpoint, args.resume_from_checkpoint, output_dir))
    set_seed(args.seed)
    if not accelerator.is_local_main_process:
        datasets.disable_progress_bars()

    blocks = prepare_blocks(args, text_args, "causal", args.seed)
    train_loader, validation_loader = make_loaders(args, blocks)
    model = build_model(AutoModelForCausalLM, blocks.config)
    model.loss_type = "ForCausalLM"  # transformers infers it from the class's name and warns about "GPT2LMHeadModel"
    depth, width = blocks.config.num_hidden_layers, blocks.config.hidden_size
    token_flops = flops_per_token(model.num_parameters(), depth, width, blocks.block_size)
    optimizer, scheduler = build_optimizer(args, model, blocks.learning_rate)
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    validation_loader = accelerator.prepare(validation_loader)
    progress = Progress()
    accelerator.register_for_checkpointing(progress, scheduler)
    accelerator.save_with_checkpoints(blocks.tokenizer)
    if resume_from:
        accelerator.load_state(str(resume_from))
        accelerator.print(f"Resumed from {resume_from} at step {progress.step}.", skipped, sep="\n")
        if progress.step >= args.max_steps:
            raise ConfigError(f"nothing to do: the checkpoint is at step {progress.step}; raise --max_steps.")
    accelerator.init_trackers("logs", {k: v if isinstance(v, int | float) else str(v) for k, v in vars(args).items()})

    metric = load_metric("perplexity") if accelerator.is_main_process else None
    micro_step_tokens = args.per_device_train_batch_size * blocks.block_size * accelerator.num_processes
    bar = tqdm(total=args.max_steps, initial=progress.step, unit="step", disable=not accelerator.is_local_main_process)
    losses, started_s = [], time.perf_counter()
    model.train()
    accelerator.should_stop()  # from here on SIGTERM ends in a checkpoint, on every rank
    training = optimizer_steps(accelerator, model, optimizer, scheduler, train_loader, progress, args)
    for step_losses, grad_norm in training:
        bar.update()
        losses += step_losses
        step, is_last = progress.step, progress.step == args.max_steps
        is_stopped = accelerator.should_stop()  # SIGTERM: the cloud takes a node back
        is_evaluation = is_last or (is_every(args.eval_steps, step) and not is_stopped)
        is_save = is_stopped or is_every(args.save_steps, step)
        if not (step == 1 or is_every(args.logging_steps, step) or is_evaluation or is_save):
            continue

        loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        num_tokens, seconds = len(losses) * micro_step_tokens, time.perf_counter() - started_s
        speed = throughput_metrics(num_tokens, seconds, token_flops, accelerator.num_processes)
        metrics = {
            "train/loss_nats_per_token": loss,
            "train/grad_norm": grad_norm.item(),
            "train/learning_rate": scheduler.get_last_lr()[0],
            **{f"train/{name}": value for name, value in speed.items()},
        }
        bar.set_postfix_str(f"loss {loss:.3f}, {speed['tokens_per_s']:,.0f} tokens/s")
        progress.train_loss.append((step, loss))
        if is_evaluation:
            result = evaluate(accelerator, model, validation_loader, metric)
            metrics |= {f"validation/{name}": value for name, value in result.items()}
            if accelerator.is_main_process:
                progress.validation_loss.append((step, result["loss_nats_per_token"]))
                bar.write(f"step {step}: loss {loss:.3f}, validation perplexity {result['perplexity']:.1f}")
        accelerator.log(metrics, step=step)
        if is_save:
            saved = accelerator.save_state(str(checkpoint_path(output_dir, step)))
        if is_stopped:
            accelerator.print(f"Stopped by SIGTERM after step {step}; --resume_from_checkpoint {saved} goes on.")
            accelerator.end_training()
            return
        losses, started_s = [], time.perf_counter()
    bar.close()
    save(accelerator, model, blocks.tokenizer, progress, output_dir)


if __name__ == "__main__":
    with mistakes_told_once():
        main()
