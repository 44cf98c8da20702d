"""What does a Trainer recipe leave behind? A Hugging Face folder, a picture of the loss, and the figures."""

from __future__ import annotations

from pathlib import Path

from transformers import Trainer

from hf_mics.errors import ConfigError
from hf_mics.pretraining.plot import plot_losses


def finish(trainer: Trainer, title: str, per: str) -> dict[str, float]:
    """Evaluates unless the Trainer just has, and writes below its output folder what a run has to show.

    `model/` is a folder that `from_pretrained` loads, tokenizer included; `loss.png`; `eval_results.json` holds the
    last evaluation, `trainer_state.json` all that was logged. A collective call: every rank must make it.

    Args:
        title: of the picture.
        per: what a loss is the mean of, "token" for example.

    Returns:
        The last evaluation's metrics.

    Raises:
        ConfigError: on every rank, that no held-out row was evaluated; the model is saved.
    """
    metrics = _last_evaluation(trainer) or trainer.evaluate()
    output_dir = Path(trainer.args.output_dir or ".")
    trainer.save_model(str(output_dir / "model"))
    if "eval_loss" not in metrics:
        raise ConfigError(
            "no held-out row was evaluated: --dataloader_drop_last drops the last batch if it is short, and there was "
            f"no other. Leave it out, or lower --per_device_eval_batch_size. The model is in {output_dir / 'model'}."
        )
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        log = trainer.state.log_history
        train, validation = (
            [(entry["step"], entry[key]) for entry in log if key in entry] for key in ("loss", "eval_loss")
        )
        plot_losses(train, validation, output_dir / "loss.png", title, per)
        if train:
            (first_step, first), (last_step, last) = train[0], train[-1]
            print(f"Training loss in nats per {per}: {first:.3f} (step {first_step}), {last:.3f} (step {last_step})")
        print(f"Model: {output_dir / 'model'}\nPlot: {output_dir / 'loss.png'}")
    return metrics


def _last_evaluation(trainer: Trainer) -> dict[str, float]:
    """What the Trainer found when it evaluated the weights that it has now; empty if it did not."""
    state = trainer.state
    # Where it has gone back to the best weights, those of that step.
    is_best = trainer.args.load_best_model_at_end and state.best_model_checkpoint
    step = state.best_global_step if is_best else state.global_step
    found = next((entry for entry in state.log_history if entry["step"] == step and "eval_loss" in entry), {})
    return {name: value for name, value in found.items() if name != "step"}
