"""Do the Trainer's features work with MiCSCallback, and are mistakes told? Twins are stock Trainers under DDP."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.distributed import DistributedConfig

from hf_mics import MiCSCallback, MiCSPlugin, mics_engine
from hf_mics._hf_compat import unchanged_fsdp_switch
from hf_mics._torch_compat import is_root
from hf_mics.checkpoint.check import check_folder
from hf_mics.engine import is_under_mics
from hf_mics.errors import ConfigError, LossError
from hf_mics.throughput import flops_per_token
from hf_mics.training_meter import TrainingMeter
from tests import tiny
from tests.assets.trainer_door import Hop2Calls, make_dataset, make_model, make_trainer
from tests.on_ranks import Layout, after_an_error, on_ranks
from tests.test_accelerator import fresh_accelerator
from tests.test_callback import TOLERANCE
from tests.toy import Net, Pair

LAYOUT = Layout(4, 2, 2)


def shared_folder() -> Path:
    """A new folder that all ranks know."""
    name = [tempfile.mkdtemp(prefix="mics_callback_") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    return Path(name[0])


def trainer_of(layout: Layout | None, *callbacks: Any, batch_size: int = 2, **settings: Any) -> Trainer:
    """The stock Trainer for GPT-2, with MiCSCallback on `layout`, or under DDP for None."""
    settings = {"use_cpu": True, "max_steps": 3, "num_train_epochs": 1, "eval_strategy": "no", **settings}
    folder = settings.pop("output_dir", None) or shared_folder()
    mine = [] if layout is None else [MiCSCallback(MiCSPlugin(partition_size=layout.partition, node_size=layout.node))]
    return make_trainer("gpt2", str(folder), batch_size, [*callbacks, *mine], **settings)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    whole = [{k.removeprefix("_orig_mod."): v.clone() for k, v in state.items()} if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(whole)
    return whole[0]


def assert_same(ours: dict[str, torch.Tensor], twin: dict[str, torch.Tensor], tolerance: float = TOLERANCE) -> None:
    assert ours.keys() == twin.keys()
    assert max((ours[name] - twin[name]).abs().max().item() for name in twin) <= tolerance
    start = make_model("gpt2").state_dict()
    assert max((twin[name] - start[name]).abs().max().item() for name in twin) > 1e3 * TOLERANCE


def as_under_ddp(layout: Layout, use: Callable[[Trainer], Any] = Trainer.train, **settings: Any) -> Trainer:
    """Does `use` to a Trainer with MiCS and to a stock one under DDP, compares weights, returns the first."""
    twin = trainer_of(None, **settings)
    use(twin)
    expected = weights(twin)
    ours = trainer_of(layout, **settings)
    use(ours)
    assert_same(weights(ours), expected)
    assert not is_under_mics(ours.model)
    return ours


@on_ranks(LAYOUT)
def test_max_steps_in_mid_epoch_and_no_accumulation_train_as_under_ddp(layout: Layout) -> None:
    as_under_ddp(layout, gradient_accumulation_steps=1)
    as_under_ddp(layout, gradient_accumulation_steps=4, max_steps=2)


@on_ranks(LAYOUT)
def test_a_second_train_and_evaluation_and_prediction_between_go_on_as_under_ddp(layout: Layout) -> None:
    seen: list[Any] = []

    def use(trainer: Trainer) -> None:
        trainer.train()
        seen.append([trainer.evaluate()["eval_loss"], trainer.predict(trainer.eval_dataset).predictions])
        gathered.append([name for name, p in trainer.model.named_parameters() if not isinstance(p, DTensor)])
        trainer.train()

    gathered: list[list[str]] = []
    counter = Hop2Calls()
    as_under_ddp(layout, use)
    (stock_loss, stock_logits), (loss, logits) = seen
    assert not gathered[1]
    assert loss == pytest.approx(stock_loss, rel=TOLERANCE)
    assert torch.as_tensor(logits).allclose(torch.as_tensor(stock_logits), atol=10 * TOLERANCE)
    trainer = trainer_of(layout, counter)
    trainer.train()
    trainer.train()
    # Each train() brings an engine of its own.
    assert counter.calls == [1, 2, 3, 1, 2, 3]


@on_ranks(LAYOUT)
def test_early_stopping_and_the_best_model_are_those_of_ddp(layout: Layout) -> None:
    settings = {
        "max_steps": 8, "learning_rate": 3.0, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
        "save_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2,
    }  # fmt: skip
    twin = trainer_of(None, EarlyStoppingCallback(1), **settings)
    twin.train()
    ours = trainer_of(layout, EarlyStoppingCallback(1), **settings)
    ours.train()
    assert ours.state.global_step == twin.state.global_step < 8
    assert ours.state.best_global_step == twin.state.best_global_step < ours.state.global_step
    # The rate that makes early stopping stop is 30 times the usual.
    assert_same(weights(ours), weights(twin), 30 * TOLERANCE)


@on_ranks(LAYOUT)
def test_a_model_is_evaluated_before_training_as_under_ddp_and_trains_as_if_it_had_not_been(layout: Layout) -> None:
    """Stock DDP is no twin for the training: evaluated first, a Trainer trains unsynchronized (accelerate 1.15)."""
    stock = trainer_of(None)
    expected = stock.evaluate()["eval_loss"], torch.as_tensor(stock.predict(stock.eval_dataset).predictions)
    for settings in ({}, {"bf16": True}, {"bf16_full_eval": True}):
        undisturbed = trainer_of(layout, **settings)
        undisturbed.train()
        trainer = trainer_of(layout, **settings)
        # Ranks that were seeded differently are evaluated as they will train, with rank 0's weights.
        trainer.model.transformer.wte.weight.data += dist.get_rank()
        before = set(vars(trainer.model))
        loss, logits = trainer.evaluate()["eval_loss"], torch.as_tensor(trainer.predict(stock.eval_dataset).predictions)
        assert set(vars(trainer.model)) == before
        assert not is_root(trainer.model)
        # bf16 keeps 8 bits.
        assert loss == pytest.approx(expected[0], rel=2**-8 if settings else TOLERANCE)
        assert settings or logits.allclose(expected[1], atol=10 * TOLERANCE)
        assert not settings or loss != expected[0]
        trainer.train()
        assert_same(weights(trainer), weights(undisturbed), 0.0)


@on_ranks(LAYOUT)
def test_weights_that_only_rank_0_has_are_evaluated_before_training_unless_an_optimizer_waits_for_them(
    layout: Layout,
) -> None:
    expected = trainer_of(None).evaluate()["eval_loss"]
    undisturbed = trainer_of(layout)
    undisturbed.train()
    trainer = trainer_of(layout)
    if dist.get_rank():
        trainer.model.to("meta").tie_weights()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=TOLERANCE)
    trainer.train()
    assert_same(weights(trainer), weights(undisturbed), 0.0)

    trainer = trainer_of(layout)
    if dist.get_rank():
        trainer.model.to("meta").tie_weights()
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters())
    with pytest.raises(ConfigError, match=r"on the meta device of rank 1.*eval_on_start=True"):
        trainer.evaluate()
    trainer = trainer_of(layout)
    trainer.model.register_buffer("late", torch.zeros(1, device="meta" if dist.get_rank() == 2 else "cpu"))
    if dist.get_rank() == 0:
        trainer.model.late.fill_(1.0)
    trainer.evaluate()
    assert trainer.model.late.item() == 1.0
    trainer = trainer_of(layout)
    trainer.model.register_buffer("wide", torch.empty(1 + dist.get_rank()))
    with pytest.raises(ConfigError, match="ranks hold different GPT2LMHeadModels"):
        trainer.evaluate()


@on_ranks(LAYOUT)
def test_a_second_trainer_of_a_model_that_was_just_evaluated_goes_on_as_under_ddp(layout: Layout) -> None:
    """The evaluation, after MiCS is off the model, leaves the root gathered where the new optimizer looks for it."""

    results = []
    for where in (None, layout):
        first = trainer_of(where)
        first.train()
        evaluated = first.evaluate()["eval_loss"]
        args = trainer_of(where, save_strategy="steps", save_steps=3).args
        mine = [] if where is None else [MiCSCallback(MiCSPlugin(partition_size=2, node_size=2))]
        second = Trainer(model=first.model, args=args, train_dataset=make_dataset(), callbacks=mine)
        if where:  # which stock DDP would not survive; see above
            assert second.evaluate(first.eval_dataset)["eval_loss"] == evaluated
        second.train()
        results.append(weights(second))
    assert_same(results[1], {name.removeprefix("module."): weight for name, weight in results[0].items()})
    assert check_folder(Path(args.output_dir) / "checkpoint-3")


@on_ranks(LAYOUT)
def test_a_second_trainer_of_an_evaluated_model_that_transformers_sharded_trains_as_under_ddp(layout: Layout) -> None:
    folder, results = shared_folder(), []
    if dist.get_rank() == 0:
        tiny.build("llama").save_pretrained(folder)
    dist.barrier()
    at_load_time = DistributedConfig(fsdp_size=2, dp_replicate_size=2)
    # The first Trainer has no callback that would leave the model sharded after its evaluation.
    for config, callbacks in ((None, []), (at_load_time, [MiCSCallback()])):
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
        data = {"train_dataset": make_dataset(), "eval_dataset": make_dataset()[8::9]}
        first = Trainer(model=model, args=trainer_of(None).args, **data)
        first.train()
        first.evaluate()
        second = Trainer(model=model, args=trainer_of(None).args, callbacks=callbacks, **data)
        second.train()
        results.append({n: p.full_tensor() if config else p.clone() for n, p in second.model.named_parameters()})
    assert max((results[1][name] - value).abs().max().item() for name, value in results[0].items()) <= TOLERANCE


@on_ranks(LAYOUT)
def test_a_loop_whose_optimizer_is_made_after_an_evaluation_trains_as_one_process(layout: Layout) -> None:
    """With Adagrad, which makes its state in its constructor, here for gathered parameters too."""

    def second_half(model: Any, rows: torch.Tensor, prepare: Callable[..., Any], backward: Callable[..., Any]) -> Any:
        with torch.no_grad():
            model.eval()(input_ids=rows)
        optimizer = torch.optim.Adagrad(model.train().parameters(), lr=0.1, initial_accumulator_value=0.1)
        model, optimizer = prepare(model, optimizer)
        for _ in range(2):
            backward(model(input_ids=rows, labels=rows).loss)
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    rows = torch.randint(61, (8, 12), generator=torch.Generator().manual_seed(1))
    with unchanged_fsdp_switch():
        accelerator = fresh_accelerator(mics_plugin=MiCSPlugin(partition_size=layout.partition))
    model = make_model("gpt2")
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    accelerator.free_memory()
    ours = second_half(model, rows.chunk(layout.world)[dist.get_rank()], accelerator.prepare, accelerator.backward)
    alone = make_model("gpt2")
    twin = second_half(alone, rows, lambda *args: args, torch.Tensor.backward)
    # The accumulator keeps steps proportional to gradients, so rounding is as under SGD.
    expected = dict(alone.named_parameters())
    assert_same({n: p.full_tensor() for n, p in model.named_parameters()}, expected)
    for name, param in model.named_parameters():
        assert ours.state[param]["sum"].full_tensor().allclose(twin.state[expected[name]]["sum"], atol=TOLERANCE), name
    accelerator.save_state(str(shared_folder() / "state"))


@on_ranks(LAYOUT)
def test_label_smoothing_shifts_the_labels_of_a_causal_language_model_as_under_ddp(layout: Layout) -> None:
    as_under_ddp(layout, label_smoothing_factor=0.1)
    # Also where transformers, or the user, has sharded the model.
    folder, smoothed = shared_folder(), []
    if dist.get_rank() == 0:
        tiny.build("llama").save_pretrained(folder)
    dist.barrier()
    at_load_time = DistributedConfig(fsdp_size=2, dp_replicate_size=2)
    for where, config in ((None, None), (layout, at_load_time), (layout, None)):
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
        if where and not config:
            for unit in (*model.model.layers, model):
                fully_shard(unit, mesh=layout.mesh)
        args = trainer_of(None if config else where, label_smoothing_factor=0.1).args
        mine = [] if where is None else [MiCSCallback(MiCSPlugin(partition_size=2, node_size=2))]
        trainer = Trainer(model=model, args=args, train_dataset=make_dataset(), callbacks=mine)
        trainer.train()
        smoothed.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert smoothed == [pytest.approx(smoothed[0], rel=TOLERANCE)] * 3


@on_ranks(LAYOUT)
def test_resuming_in_mid_epoch_gives_the_weights_of_an_undisturbed_run(layout: Layout) -> None:
    # Adagrad makes its state in its constructor. Where biases alone are trained, the first of the two groups that the
    # Trainer makes is empty.
    for optimizer, trained in (("sgd", ""), ("adagrad", ""), ("adamw_torch", "bias")):
        folder = shared_folder()
        settings = {
            "max_steps": 7, "save_strategy": "steps", "save_steps": 3, "output_dir": folder, "optim": optimizer,
        }  # fmt: skip
        runs = []
        for resume in (None, str(folder / "checkpoint-3")):
            trainer = trainer_of(layout, **settings)
            for name, param in trainer.model.named_parameters():
                param.requires_grad_(name.endswith(trained))
            trainer.train(resume_from_checkpoint=resume)
            runs.append(weights(trainer))
        assert_same(runs[1], runs[0], 0.0)


@after_an_error
@on_ranks(LAYOUT)
def test_auto_find_batch_size_starts_again_after_running_out_of_memory(layout: Layout) -> None:
    tried: list[list[int]] = []

    def use(trainer: Trainer) -> None:
        sizes: list[int] = []
        tried.append(sizes)

        def run_out(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
            if layer.training:
                sizes.append(len(args[0]))
                # In the second micro-step: the first has left a partial sum.
                if len(args[0]) > 2 and sizes.count(len(args[0])) == 2:
                    raise torch.OutOfMemoryError("CUDA out of memory. (a test)")

        trainer.model.transformer.h[1].register_forward_pre_hook(run_out)
        trainer.train()

    as_under_ddp(layout, use, auto_find_batch_size=True, batch_size=4)
    assert tried == 2 * [[4, 4, 3, 3, 2, 2, 2, 2, 2, 2]]


@on_ranks(LAYOUT)
def test_lora_adapters_train_as_under_ddp_and_leave_the_base_alone(layout: Layout) -> None:
    results = []
    for where in (None, layout):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        model = peft.get_peft_model(make_model("gpt2"), config)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        args = trainer_of(where).args
        mine = [] if where is None else [MiCSCallback(MiCSPlugin(partition_size=2, node_size=2))]
        trainer = Trainer(model=model, args=args, train_dataset=make_dataset(), callbacks=mine)
        trainer.train()
        results.append(weights(trainer))
    twin, ours = ({k.removeprefix("module."): v for k, v in result.items()} for result in results)
    assert max((ours[name] - twin[name]).abs().max().item() for name in twin) < TOLERANCE
    changed = {name for name, value in start.items() if not torch.equal(ours[name], value)}
    assert changed == {name for name in start if "lora" in name}


@on_ranks(LAYOUT)
def test_gradient_checkpointing_bf16_and_compilation_train_under_mics(layout: Layout) -> None:
    as_under_ddp(layout, gradient_checkpointing=True)
    plain = trainer_of(layout)
    plain.train()
    bf16 = trainer_of(layout, bf16=True)
    bf16.train()
    assert {p.dtype for p in bf16.model.parameters()} == {torch.float32}
    # bf16 keeps 8 bits: the losses, about 4, agree to 1/256 of that.
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, bf16)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2**-8)
    expected = weights(plain)
    before = dict(os.environ)
    compiled = trainer_of(layout, torch_compile=True, torch_compile_backend="aot_eager")
    compiled.train()
    for name in set(os.environ) - set(before):  # TrainingArguments leaves ACCELERATE_DYNAMO_* behind
        del os.environ[name]
    assert hasattr(compiled.model, "_orig_mod")
    assert_same(weights(compiled), expected)


class LastEngine(TrainerCallback):
    """Remembers the engine, which goes when training ends."""

    def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.engine = mics_engine(model)


@on_ranks(LAYOUT)
def test_the_log_and_tensorboard_show_tokens_and_the_traffic_that_was_predicted(layout: Layout) -> None:
    last, folder = LastEngine(), shared_folder()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    trainer = trainer_of(layout, last, max_steps=5, report_to="tensorboard", output_dir=folder, **settings)
    with mock.patch.object(TrainingMeter, "skip_pause", autospec=True, side_effect=TrainingMeter.skip_pause) as skipped:
        trainer.train()
    evaluations, saves = [entry for entry in trainer.state.log_history if "eval_loss" in entry], folder.glob("check*")
    assert skipped.call_count == len(evaluations) + len(list(saves)) >= 4
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 5
    # The first four windows are full. Evaluation after the second gathers parameters too, which the figures of training
    # leave out; nothing of it stays gathered, or the third step would gather less.
    predicted = last.engine.predict_step(2)
    for entry in log[:4]:
        assert entry["mics/hop1_sent_gb"] == pytest.approx(predicted.hop1_bytes / 1e9, rel=1e-3)
        assert entry["mics/hop2_sent_gb"] == pytest.approx(predicted.hop2_bytes / 1e9, rel=1e-3)
        assert entry["mics/crossed_nodes_gb"] == pytest.approx(sum(predicted.nic_bytes.values()) / 1e9, rel=1e-3)
        assert predicted.nic_bytes["hop2_all_reduce"] > 0
        assert 0 < entry["mics/hop1_time_s"] + entry["mics/hop2_time_s"] < entry["mics/step_time_s"]
        assert entry["mics/hop2_time_s"] > 0
    tokens = [entry["mics/tokens_per_s_per_device"] * entry["mics/step_time_s"] for entry in log]
    assert sum(tokens) == pytest.approx(sum(int(row["attention_mask"].sum()) for row in make_dataset()) / 4, rel=1e-3)
    assert "mics/model_flops_utilization_percent" not in log[0]  # no peak is known of a CPU
    if dist.get_rank() == 0:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        shown = EventAccumulator(os.environ["TENSORBOARD_LOGGING_DIR"]).Reload()
        sent = [event.value for event in shown.Scalars("train/mics/hop1_sent_gb")]
        assert sent == pytest.approx([entry["mics/hop1_sent_gb"] for entry in log])
    by_epoch = trainer_of(layout, max_steps=2, logging_strategy="epoch")
    by_epoch.train()
    (entry,) = [entry for entry in by_epoch.state.log_history if "loss" in entry]
    assert entry["mics/hop2_sent_gb"] == pytest.approx(predicted.hop2_bytes / 1e9, rel=1e-3)


@on_ranks(LAYOUT)
def test_step_times_leave_out_pauses_and_tokens_what_is_not_trained_on(layout: Layout) -> None:
    """On a clock of the test's: steps of 3 s and 1 s of waiting for data, but 150 s of evaluation and saving after."""
    now_s, pair, ids = 0.0, Pair(layout), torch.zeros(2, 8, dtype=torch.int64)
    pair.mics.config = SimpleNamespace(num_hidden_layers=2, hidden_size=4)
    hooks = len(pair.mics._forward_pre_hooks)
    with (
        mock.patch("hf_mics.training_meter.time", SimpleNamespace(perf_counter=lambda: now_s)),
        mock.patch("hf_mics.throughput.local_peak_flops_per_s", return_value=1e6),
    ):
        meter = TrainingMeter(pair.mics, pair.engine)
        figures = []
        for _ in range(2):
            for step in range(2):
                now_s += 1
                meter.begin_step()
                pair.window(step)
                meter._count_tokens(pair.mics, (ids,), {"attention_mask": torch.ones(2, 1, 8, 8)})
                with torch.no_grad():
                    meter._count_tokens(pair.mics, (ids,), {})
                meter._count_tokens(pair.mics.eval(), (ids,), {})
                meter._count_tokens(pair.mics.train(), (torch.zeros(2, 3, 8, 8, dtype=torch.int64),), {})
                now_s += 3
                meter.end_step()
                pair.step()
                for pause_s in (100, 50):
                    now_s += pause_s
                    meter.skip_pause()
            figures.append(meter.collect())
            assert meter.collect() == {}
        meter.begin_step()
        now_s += 1
        meter.end_step()
        assert "tokens_per_s_per_device" not in meter.collect(), "nothing was read that could be tokens"
        meter.close()
    assert len(pair.mics._forward_pre_hooks) == hooks
    assert pair.engine.meter.clock is None
    flops = flops_per_token(sum(p.numel() for p in pair.twin.parameters()), 2, 4, 8)
    for interval in figures:
        assert interval["step_time_s"] == 4
        assert interval["tokens_per_s_per_device"] == 2 * 8 / 4
        assert interval["model_flops_utilization_percent"] == pytest.approx(100 * flops * 2 * 8 / 4 / 1e6)
        assert "tokens_per_s" not in interval, "of all devices: it would look like throughput of one"


@on_ranks(LAYOUT, Layout(4, 2, 4))
def test_hop_times_are_those_of_the_collectives_of_training_and_bytes_what_crosses_nodes_over_gloo(
    layout: Layout,
) -> None:
    """On a clock that goes on by a second whenever it is looked at, so that every span takes one."""
    pair = Pair(layout, build=lambda: Net(unused=False), hierarchical=False)
    with mock.patch("hf_mics.clock.time", SimpleNamespace(perf_counter=itertools.count().__next__)):
        meter = TrainingMeter(pair.mics, pair.engine)
        pair.engine.meter.reset()
        meter.begin_step()
        pair.window(0)
        meter.end_step()
        calls = {phase: tally.calls for (phase, _), tally in pair.engine.meter.read().items()}
        with torch.no_grad():
            pair.mics(torch.zeros(2, 7))
        figures = meter.collect()
        meter.close()
    assert figures["hop1_time_s"] == calls["all_gather"] + calls["reduce_scatter"]
    # Each is issued, and awaited at the end of backward.
    assert figures["hop2_time_s"] == 2 * calls.get("all_reduce", 0)
    crossed = sum(pair.engine.predict_step(3).nic_bytes.values())
    assert figures["crossed_nodes_gb"] == pytest.approx(crossed / 1e9)


@on_ranks(LAYOUT)
def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_step_micro_step_and_rank(layout: Layout) -> None:
    seen = 0

    def spoil(model: Any, args: Any, output: Any) -> Any:
        nonlocal seen
        seen += model.training
        # The second micro-step of the third optimizer step, on two ranks.
        if model.training and seen == 6 and dist.get_rank() in (2, 3):
            output.loss = output.loss * float("nan")
        return output

    folder = shared_folder()
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "output_dir": folder}
    trainer = trainer_of(layout, **settings)
    trainer.model.register_forward_hook(spoil)
    with pytest.raises(LossError, match="step 3, micro-step 2, seen first by rank 2 on node") as caught:
        trainer.train()
    assert "those of step 2 and before" in str(caught.value)
    dist.barrier()
    # The third step was to save as well, and then to delete the second's checkpoint.
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    assert check_folder(folder / "checkpoint-2")

    class WeightsAfterTwoSteps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                self.weights = weights(undisturbed)

    half = WeightsAfterTwoSteps()
    undisturbed = trainer_of(layout, half, **{**settings, "save_strategy": "no", "output_dir": shared_folder()})
    undisturbed.train()
    assert_same(weights(trainer), half.weights, 0.0)
    resumed = trainer_of(layout, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed), weights(undisturbed), 0.0)


@on_ranks(LAYOUT)
def test_mistakes_are_told_before_anything_hangs(layout: Layout) -> None:
    def mics() -> MiCSCallback:
        return MiCSCallback(MiCSPlugin(partition_size=2))

    def make(*callbacks: Any, **settings: Any) -> Trainer:
        return trainer_of(None, *callbacks, **settings)

    with pytest.raises(ConfigError, match="no FSDP in the accelerate config"):
        make(MiCSCallback())
    with pytest.raises(ConfigError, match="handed 2 MiCSCallbacks"):
        make(mics(), mics())
    with pytest.raises(ConfigError, match="must be there when the Trainer is made"):
        make(MiCSCallback)
    late = make()
    late.add_callback(mics())
    with pytest.raises(ConfigError, match="must be there when the Trainer is made"):
        late.train()
    callback = mics()
    first = make(callback)
    second = make(callback)
    with pytest.raises(ConfigError, match="handed to another Trainer"):
        first.train()
    second.train()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        with pytest.raises(ConfigError, match="cannot train with DeepSpeed"):
            mics()
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
    args = make().args
    args.deepspeed = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ConfigError, match="cannot train with DeepSpeed"):
        Trainer(model=make_model("gpt2"), args=args, train_dataset=make_dataset(), callbacks=[mics()])
    model = make_model("gpt2")
    mesh = init_device_mesh("cpu", (4,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    args = make(mics()).args
    args._n_gpu = 2  # what TrainingArguments finds when no launcher started a process that sees two
    with pytest.raises(ConfigError, match="one process sees 2 GPUs"):
        Trainer(model=make_model("gpt2"), args=args, train_dataset=make_dataset(), callbacks=[mics()])
    args = make(mics()).args
    trainer = Trainer(model=fully_shard(model, mesh=mesh), args=args, train_dataset=make_dataset(), callbacks=[mics()])
    with pytest.raises(ConfigError, match="1-D mesh without replicas"):
        trainer.train()
