"""How is MiCS used from the stock Trainer? `Trainer(..., callbacks=[MiCSCallback()])`

The Trainer that gets the callback makes a MiCSAccelerator instead of accelerate's own, which is all that MiCS needs:
the model is sharded and trained as through every other door. The callback adds what only a callback can: figures in
the Trainer's log, a stop at the first loss that is not finite, and the way back to plain FSDP2 when training ends.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import ReferenceType, ref

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_mics._hf_compat import (
    give_sharded_parameters,
    is_switched_on,
    join_launched_job,
    leave_mics_state,
    unchanged_fsdp_switch,
)
from hf_mics._trainer_compat import accelerator_class, replaced_accelerator, report_first, run_constructors_inside
from hf_mics.accelerator import MiCSAccelerator
from hf_mics.engine import apply_mics, is_under_mics, mics_engine, remove_mics
from hf_mics.errors import ConfigError
from hf_mics.loss_watch import LossWatch
from hf_mics.plugin import MiCSPlugin
from hf_mics.sharding import keep_class_name
from hf_mics.summary import start_up_summary
from hf_mics.training_meter import TrainingMeter


class MiCSCallback(TrainerCallback):
    """Trains the Trainer it is handed to under MiCS: `Trainer(..., callbacks=[MiCSCallback()])`.

    While that Trainer is constructed, its Accelerator becomes a `MiCSAccelerator`; the job is joined on CPUs too, and
    also when TrainingArguments has taken this process for a lone one. Each `train()` then: shards the model and puts
    MiCS on it, runs hop 2 once per optimizer step, adds `mics/...` figures to the Trainer's training log (see
    docs/trainer.md), raises before an optimizer step whose loss is not finite, and at its end gives the model back to
    plain FSDP2 for evaluation and prediction. Under `-m hf_mics` MiCS is there already and stays; the callback adds the
    figures and the stop. A model that transformers sharded at load time (`DistributedConfig`) keeps its own sharding.

    Args:
        mics_plugin: MiCS settings; default those of the accelerate config.

    Raises:
        ConfigError: DeepSpeed, no FSDP config, a second MiCSCallback in one Trainer, a callback that came after the
            Trainer was made, or a model on a 1-D mesh; when the callback or the Trainer is made or training begins.
        LossError: from `train()`, a loss that is not finite.
    """

    def __init__(self, mics_plugin: MiCSPlugin | None = None) -> None:
        _refuse_deepspeed(is_switched_on("ACCELERATE_USE_DEEPSPEED"))
        self._plugin = mics_plugin
        self._trainer: ReferenceType[Trainer] | None = None
        # Whether MiCS comes and goes with this callback, rather than with the runner.
        self._owns_mics = True
        self._run: TrainRun | None = None
        self._figures: dict[str, float] = {}
        run_constructors_inside(_around_construction)

    # -- construction of the Trainer -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _constructing(self, trainer: Trainer, arguments: Mapping[str, Any]) -> Iterator[None]:
        args = arguments.get("args")
        _refuse_deepspeed(bool(getattr(args, "deepspeed_plugin", None) or getattr(args, "deepspeed", None)))
        base = accelerator_class()
        self._owns_mics = not getattr(base, "knows_mics", False)
        self._trainer = ref(trainer)
        if getattr(arguments.get("model"), "is_distributed_loading_by_transformers", False):
            join_launched_job()
            yield
        else:
            with replaced_accelerator(self._accelerator_maker(MiCSAccelerator if self._owns_mics else base)):
                yield
        report_first(trainer, self)

    def _accelerator_maker(self, base: Callable[..., MiCSAccelerator]) -> Callable[..., MiCSAccelerator]:
        def make(**kwargs: Any) -> MiCSAccelerator:
            if self._plugin is not None:
                kwargs["mics_plugin"] = self._plugin
            with unchanged_fsdp_switch():
                return base(**kwargs)

        return make

    def on_init_end(self, *_: Any, **__: Any) -> None:
        """Refuses a callback that came as a class: the Trainer has made it, and its own Accelerator before."""
        self._my_trainer()

    def _my_trainer(self) -> Trainer:
        trainer = self._trainer() if self._trainer else None
        if trainer is None:
            raise ConfigError(
                "MiCSCallback must be there when the Trainer is made, because that is when it makes its Accelerator. "
                "Expected an object, Trainer(..., callbacks=[MiCSCallback()]); got the class, or add_callback() later."
            )
        return trainer

    # -- training --------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts MiCS on the model unless the MiCSAccelerator has, and starts measuring."""
        self._stop()
        trainer = self._my_trainer()
        model: nn.Module = kwargs["model"]
        if model is not trainer.model:
            raise ConfigError(
                "this MiCSCallback was handed to another Trainer since; expected one callback for each Trainer. Pass "
                "each its own MiCSCallback()."
            )
        if not is_under_mics(model):
            # Not through a MiCSAccelerator, which does this when it prepares the two.
            give_sharded_parameters(kwargs["optimizer"], model)
            self._apply(model, args)
        self._run = TrainRun(model, trainer.accelerator)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts measuring an optimizer step."""
        if self._run:
            self._run.meter.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Raises LossError on every rank if a loss of this window was not finite on any."""
        if self._run:
            self._run.losses.check(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measures the step; collects the figures when the Trainer is about to log."""
        if self._run:
            self._run.meter.end_step()
            self._collect(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Collects the figures when the Trainer logs once per epoch."""
        self._collect(control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Adds the figures to the training log and to `log_history`."""
        if logs is not None and "loss" in logs and self._figures:
            logs.update(self._figures)
            state.log_history[-1].update(self._figures)
            self._figures = {}

    def on_evaluate(self, *_: Any, **kwargs: Any) -> None:
        """Leaves evaluation out of the step times; outside training it leaves no parameter gathered."""
        if self._run:
            self._run.meter.skip_pause()
        else:
            _reshard(kwargs["model"])

    def on_predict(self, *_: Any, **kwargs: Any) -> None:
        """Leaves no parameter gathered outside training."""
        if not self._run:
            _reshard(kwargs["model"])

    def on_save(self, *_: Any, **__: Any) -> None:
        """Leaves saving out of the step times."""
        if self._run:
            self._run.meter.skip_pause()

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        """Gives the model back to plain FSDP2, unless the script runs under `-m hf_mics`."""
        self._stop()
        if self._owns_mics and is_under_mics(kwargs["model"]):
            remove_mics(kwargs["model"])
        _reshard(kwargs["model"])

    def _collect(self, control: TrainerControl) -> None:
        # Here and not in on_log, which a script may call on one rank: collecting is a collective.
        if self._run and control.should_log:
            figures = self._run.meter.collect()
            if figures:
                self._figures = {f"mics/{name}": float(f"{value:.4g}") for name, value in figures.items()}

    def _apply(self, model: nn.Module, args: TrainingArguments) -> None:
        settings = self._plugin.settings() if self._plugin else {}
        settings.pop("partition_size", None)
        apply_mics(model, **settings)
        keep_class_name(model)
        if args.process_index == 0:
            summary = start_up_summary(mics_engine(model), (), micro_steps=args.gradient_accumulation_steps)
            print(summary, file=sys.stderr, flush=True)

    def _stop(self) -> None:
        if self._run:
            self._run.close()
            self._run = None


class TrainRun:
    """What the callback measures and watches in one `train()`, from its beginning to `close`.

    Args:
        model: under MiCS.
        accelerator: whose `backward` the losses pass through.
    """

    def __init__(self, model: nn.Module, accelerator: Any) -> None:
        self.meter = TrainingMeter(model, mics_engine(model))
        self.losses = LossWatch(accelerator)

    def close(self) -> None:
        """Takes everything off the model and the accelerator."""
        self.meter.close()
        self.losses.close()


def _reshard(model: nn.Module) -> None:
    """Frees the parameters that an evaluation has left gathered: whoever makes an optimizer next would train those."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


@contextlib.contextmanager
def _around_construction(trainer: Trainer, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Around every construction of a Trainer: next to nothing, unless it is handed a MiCSCallback."""
    ours = [callback for callback in arguments.get("callbacks") or () if isinstance(callback, MiCSCallback)]
    if len(ours) > 1:
        raise ConfigError(
            f"one Trainer was handed {len(ours)} MiCSCallbacks; expected one, which does all there is to do. Remove "
            "the others."
        )
    if ours:
        with ours[0]._constructing(trainer, arguments):
            yield
    else:
        is_ours = getattr(accelerator_class(), "knows_mics", False)
        if not is_ours:
            leave_mics_state()
        yield
        if not is_ours:
            return
    _refuse_data_parallel(trainer.args.n_gpu)


def _refuse_data_parallel(gpus: int) -> None:
    """A lone process with several GPUs, whose model the Trainer would wrap in DataParallel before MiCS sees it."""
    if gpus > 1:
        raise ConfigError(
            f"this one process sees {gpus} GPUs, over which the Trainer would spread the model with DataParallel; MiCS "
            "needs one process for each. Launch with `accelerate launch --config_file ...` (see recipes/configs), or "
            "set CUDA_VISIBLE_DEVICES to one of them."
        )


def _refuse_deepspeed(enabled: bool) -> None:
    if enabled:
        raise ConfigError(
            "MiCSCallback cannot train with DeepSpeed, which brings its own sharding: expected `distributed_type: "
            "FSDP` with `fsdp_version: 2` in the accelerate config and no `deepspeed` in TrainingArguments; see "
            "recipes/configs."
        )
