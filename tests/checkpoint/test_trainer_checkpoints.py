"""Are a stock Trainer's checkpoints complete or absent, resumable anywhere, and what its users expect besides?"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, PromptEncoderConfig, PromptTuningConfig, VeraConfig, get_peft_model
from safetensors import safe_open
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from hf_mics.checkpoint import trainer_state
from hf_mics.checkpoint.export import export_checkpoint
from hf_mics.checkpoint.mark import MARK_NAME, read_mark
from hf_mics.checkpoint.trainer_state import StopOnSigterm
from hf_mics.errors import CheckpointError
from hf_mics.testing import run_ranks
from tests import tiny
from tests.checkpoint.trainers import losses, make_trainer
from tests.test_accelerator import full_weights

# As in test_save_and_load.py: ten times fp32 rounding a step, over 8 steps.
TOLERANCE = 1e-5
# It draws from the random stream that dropout uses, so runs that are compared share it.
EVALUATION: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 2}


class Tokens:
    """A processing class, as far as a Trainer cares."""

    def save_pretrained(self, folder: str) -> None:
        Path(folder, "tokenizer_config.json").write_text("{}")


class KillAt(TrainerCallback):
    """Sends SIGTERM to one rank in the middle of an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class KillInEvaluation(TrainerCallback):
    """Sends SIGTERM to one rank while it evaluates."""

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def train_and_save(folder: str) -> dict[str, Any]:
    root, result = Path(folder), {}
    for form in ("sharded", "full"):
        trainer = make_trainer(
            root / form, state_format=form, dropout=0.1, save_total_limit=2, load_best_model_at_end=True,
            metric_for_best_model="loss", **EVALUATION,
        )  # fmt: skip
        trainer.processing_class = Tokens()
        trainer.train()
        trainer.save_model(str(root / f"{form}_model"))
        result[form] = {
            "losses": losses(trainer),
            "best": trainer.state.best_model_checkpoint,
            "weights": trainer.accelerator.get_state_dict(trainer.model),
            "kept": sorted(path.name for path in (root / form).iterdir()),
        }
    # Dropout would make the losses of other layouts differ, so runs that move do without.
    moving = make_trainer(root / "moving")
    moving.args.push_to_hub = True
    with mock.patch.object(Trainer, "_push_from_checkpoint") as push:
        moving.train()
    pushed = [Path(call.args[0]) for call in push.call_args_list]
    result["moving"] = {"losses": losses(moving), "weights": full_weights(moving.model), "pushed": pushed}

    stopped = make_trainer(root / "stopped", dropout=0.1, callbacks=[KillAt(4)], save_strategy="no", **EVALUATION)
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        stopped.train()
    assert signal.getsignal(signal.SIGTERM) is former
    result["stopped"] = {"code": caught.value.code, "losses": losses(stopped), "step": stopped.state.global_step}
    evaluating = make_trainer(root / "evaluating", callbacks=[KillInEvaluation()], save_strategy="no", **EVALUATION)
    with pytest.raises(SystemExit):
        evaluating.train()
    starting = make_trainer(root / "starting", callbacks=[KillInEvaluation()], eval_on_start=True, **EVALUATION)
    with pytest.raises(SystemExit) as caught:
        starting.train()
    result["starting"] = caught.value.code, starting.state.global_step, list((root / "starting").iterdir())
    result["evaluating"] = evaluating.state.global_step, sorted(path.name for path in (root / "evaluating").iterdir())
    return result


def resume_on_4(folder: str) -> dict[str, Any]:
    root, result = Path(folder), {}
    for form in ("sharded", "full"):
        trainer = make_trainer(root / f"{form}_again", state_format=form, dropout=0.1, **EVALUATION)
        trainer.train(resume_from_checkpoint=str(root / form / "checkpoint-8"))
        result[form] = {"losses": losses(trainer), "weights": full_weights(trainer.model)}
    trainer = make_trainer(root / "stopped", dropout=0.1, save_strategy="no", **EVALUATION)
    trainer.train(resume_from_checkpoint=True)
    result["stopped"] = losses(trainer)
    trainer = make_trainer(root / "moved", partition=4, state_format="full")
    trainer.train(resume_from_checkpoint=str(root / "moving" / "checkpoint-4"))
    result["moved"] = losses(trainer)[4:]
    result["refused"] = refusals(root)
    return result


def refusals(root: Path) -> dict[str, str]:
    said = {}
    if dist.get_rank() == 0:
        (root / "empty" / "checkpoint-3").mkdir(parents=True)
        for case in ("missing", "short", "unmarked", "loop"):
            folder = shutil.copytree(root / "moving" / "checkpoint-4", root / case / "checkpoint-4")
            if case == "missing":
                next((folder / "optimizer_0").glob("__2_*")).unlink()
            if case in ("short", "unmarked"):
                with next((folder / "pytorch_model_fsdp_0").glob("__1_*")).open("r+b") as file:
                    file.truncate(100)
            if case in ("unmarked", "loop"):
                (folder / MARK_NAME).unlink()
            if case == "loop":
                (folder / "trainer_state.json").unlink()
    dist.barrier()
    wider = tiny.gpt2()
    wider.resize_token_embeddings(tiny.VOCABULARY + 2, mean_resizing=False)
    attempts: dict[str, tuple[Path, str | bool, Any]] = {
        "empty": (root / "empty", True, None),
        "empty path": (root / "empty", str(root / "empty" / "checkpoint-3"), None),
        "nowhere": (root / "empty", str(root / "empty" / "checkpoint-9"), None),
        **{case: (root / case, str(root / case / "checkpoint-4"), None) for case in ("missing", "unmarked", "loop")},
        "short": (root / "short", True, None),
        "model": (root / "moving", str(root / "moving" / "checkpoint-4"), tiny.build("llama")),
        "width": (root / "moving", str(root / "moving" / "checkpoint-4"), wider),
    }
    for case, (output_dir, resume, model) in attempts.items():
        with pytest.raises(CheckpointError) as caught:
            make_trainer(output_dir, model=model).train(resume_from_checkpoint=resume)
        said[case] = str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        make_trainer(root / "moving", optim="sgd").train(resume_from_checkpoint=True)
    said["optimizer"] = str(caught.value)
    return said


def resume_moved(folder: str) -> list[float]:
    trainer = make_trainer(Path(folder) / "moved", partition=dist.get_world_size())
    trainer.train(resume_from_checkpoint=str(Path(folder) / "moving" / "checkpoint-4"))
    return losses(trainer)[4:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A folder, what rank 0 said of the runs that saved there, and of those that resumed on as many ranks."""
    folder = tmp_path_factory.mktemp("trainer")
    saved = run_ranks(train_and_save, 4, str(folder))
    resumed = run_ranks(resume_on_4, 4, str(folder))
    assert all(other["refused"] == resumed[0]["refused"] for other in resumed)
    assert all(other["stopped"]["step"] == 5 for other in saved)
    return folder, saved[0], resumed[0]


@pytest.mark.parametrize("form", ["sharded", "full"])
def test_trainer_resumes_bit_equal_with_dropout_in_mid_epoch(trained: Any, form: str) -> None:
    _, saved, resumed = trained
    assert resumed[form]["losses"][8:] == saved[form]["losses"][8:]


@pytest.mark.parametrize("form", ["sharded", "full"])
def test_limit_keeps_the_best_and_the_newest_and_the_best_is_loaded_at_the_end(trained: Any, form: str) -> None:
    folder, saved, _ = trained
    best = Path(saved[form]["best"])
    assert best.parent == folder / form
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    assert len(saved[form]["kept"]) == 2
    assert {best.name, "checkpoint-12"} <= {*saved[form]["kept"]}


@pytest.mark.parametrize("form", ["sharded", "full"])
def test_checkpoint_and_saved_model_hold_what_from_pretrained_needs(trained: Any, form: str) -> None:
    folder, saved, _ = trained
    checkpoint = folder / form / "checkpoint-12"
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "training_args.bin"):
        assert (checkpoint / name).is_file(), name
    mark = read_mark(checkpoint)
    assert mark is not None
    assert mark.state_format == form
    model = GPT2LMHeadModel.from_pretrained(folder / f"{form}_model").state_dict()
    assert all(torch.equal(model[name], value) for name, value in saved[form]["weights"].items())


def test_full_state_holds_the_weights_once_and_loads_with_from_pretrained(trained: Any) -> None:
    _, saved, _ = trained
    best = Path(saved["full"]["best"])
    assert not list(best.glob("*.safetensors"))
    state = torch.load(best / "pytorch_model_fsdp.bin")
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    model, said = GPT2LMHeadModel.from_pretrained(best, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in saved["full"]["weights"].items())


@pytest.mark.parametrize("form", ["sharded", "full"])
def test_saved_model_holds_tied_weights_once(trained: Any, form: str) -> None:
    with safe_open(trained[0] / f"{form}_model" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("world", [1, 2, 4])
def test_trainer_checkpoint_moves_to_other_layouts(trained: Any, world: int) -> None:
    folder, saved, resumed = trained
    moved = resumed["moved"] if world == 4 else run_ranks(resume_moved, world, str(folder))[0]
    assert len(moved) == 8
    assert moved == pytest.approx(saved["moving"]["losses"][4:], abs=TOLERANCE)


def test_the_best_of_a_run_whose_folder_was_moved_is_found_again(tmp_path: Path) -> None:
    """The Trainer forgets the former path when it resumes, and looks beside the checkpoint that it saves."""
    (tmp_path / "checkpoint-1").mkdir()
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(global_step=4, best_global_step=1, best_model_checkpoint=None),
        args=SimpleNamespace(should_save=False, push_to_hub=False),
        accelerator=None, model=None, optimizer=None, _get_output_dir=lambda trial: str(tmp_path),
    )  # fmt: skip

    def save(accelerator: Any, target: Path, write: Any, **_: Any) -> None:
        write(tmp_path / ".checkpoint-4.saving" / "checkpoint-4")

    with mock.patch.multiple(trainer_state, is_main=lambda: False, save_checkpoint=save):
        trainer_state._save_checkpoint(lambda model, trial: None, trainer, None, None)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


def test_complete_checkpoints_are_pushed_to_the_hub_and_no_others(trained: Any) -> None:
    folder, saved, _ = trained
    assert saved["moving"]["pushed"] == [folder / "moving" / f"checkpoint-{step}" for step in (4, 8, 12)]


def test_at_sigterm_no_evaluation_uses_up_the_time_that_is_left_and_the_best_decides_alone() -> None:
    callback = StopOnSigterm(SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu"))))
    args: Any = SimpleNamespace(save_strategy="best")
    with contextlib.closing(callback), mock.patch.object(callback._request, "agreed", return_value=True):
        control = TrainerControl(should_evaluate=True)
        callback.on_step_end(args, TrainerState(), control)
        assert (control.should_save, control.should_training_stop, control.should_evaluate) == (True, True, False)
        for args.save_strategy, saves in ((SaveStrategy.BEST, False), (SaveStrategy.STEPS, True)):
            control = TrainerControl()
            callback.on_evaluate(args, TrainerState(), control)
            assert control.should_save == control.should_training_stop == saves


def test_sigterm_on_one_rank_saves_at_the_end_of_the_step_on_all_and_exits_with_0(trained: Any) -> None:
    folder, saved, resumed = trained
    assert saved["stopped"]["code"] == 0
    assert sorted(path.name for path in (folder / "stopped").iterdir()) == ["checkpoint-5"]
    # The other run with dropout 0.1 saw the same numbers and was not stopped.
    assert saved["stopped"]["losses"] == saved["sharded"]["losses"][:5]
    assert resumed["stopped"][5:] == saved["sharded"]["losses"][5:]


def test_sigterm_during_an_evaluation_saves_at_its_end_and_takes_no_other_step(trained: Any) -> None:
    assert trained[1]["evaluating"] == (4, ["checkpoint-4"])


def test_sigterm_during_an_evaluation_before_the_first_step_ends_with_0_and_not_as_if_trained(trained: Any) -> None:
    assert trained[1]["starting"] == (0, 0, [])


def test_trainer_refuses_what_it_cannot_resume(trained: Any) -> None:
    said = trained[2]["refused"]
    assert "no complete checkpoint checkpoint-*" in said["empty"]
    assert "it has no completion mark" in said["empty"]
    assert "can be resumed by its path" in said["empty"]
    assert "is empty" in said["empty path"]
    assert "no checkpoint at" in said["nowhere"]
    assert "optimizer_0/__2_0.distcp is missing" in said["missing"]
    assert "pytorch_model_fsdp_0/__1_0.distcp has 100 of" in said["short"]
    assert "pytorch_model_fsdp_0/__1_0.distcp ends at 100 of" in said["unmarked"]
    assert "is not a Trainer's checkpoint: expected trainer_state.json" in said["loop"]
    assert f"transformer.wte.weight: [{tiny.VOCABULARY}, 15] there, [{tiny.VOCABULARY + 2}, 15] here" in said["width"]
    assert "a GPT2LMHeadModel was saved, this run has a LlamaForCausalLM" in said["model"]
    assert "of another optimizer: expected SGD, as this run uses, got AdamW" in said["optimizer"]


LORA = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
VERA = VeraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
# Base model, adapter, and how it is saved. VeRA's layers share buffers. Of an adapter of the head a Trainer saves the
# base's head too.
ADAPTERS: dict[str, tuple[str, Any, str]] = {
    "lora": ("gpt2", LORA, "sharded"),
    "lora, full state": ("gpt2", LORA, "full"),
    "head": ("llama", LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"), "sharded"),
    "vera": ("gpt2", VERA, "sharded"),
    "vera, full state": ("gpt2", VERA, "full"),
}


# p-tuning computes the prompt with an encoder of its own, which PEFT does not store.
PROMPTS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=7),
}


def train_prompts(folder: str) -> dict[str, dict[str, Any]]:
    results = {}
    for case, config in PROMPTS.items():
        for form in ("sharded", "full"):

            def make(output_dir: str, config: Any = config, form: str = form) -> Any:
                model = tiny.build("gpt2")
                torch.manual_seed(1)
                settings = {"state_format": form, "bf16": form == "full"}
                return make_trainer(output_dir, model=get_peft_model(model, config), max_steps=6, **settings)

            whole = make(f"{folder}/{case} {form}")
            whole.train()
            resumed = make(f"{folder}/{case} {form} again")
            resumed.train(resume_from_checkpoint=f"{folder}/{case} {form}/checkpoint-4")
            prompt = {name: p.full_tensor() for name, p in resumed.model.prompt_encoder.named_parameters()}
            loss = resumed.evaluate()["eval_loss"]
            resumed.save_model(f"{folder}/{case} {form} saved")
            results[f"{case} {form}"] = {
                "whole": losses(whole),
                "resumed": losses(resumed),
                "loss": loss,
                "data": [row["input_ids"] for row in resumed.eval_dataset],
                "prompt": prompt,
            }
    return results


def test_trained_prompts_resume_and_are_saved_for_peft(tmp_path: Path) -> None:
    for case, result in run_ranks(train_prompts, 2, str(tmp_path))[0].items():
        assert result["resumed"][4:] == result["whole"][4:], case
        model = PeftModel.from_pretrained(tiny.build("gpt2"), tmp_path / f"{case} saved").eval()
        if case.startswith("prompt"):
            assert model.prompt_encoder.default.embedding.weight.equal(result["prompt"]["default.embedding.weight"])
        rows = torch.tensor(result["data"])
        # bf16, in which the runs with full state compute, keeps 8 bits; what is stored is exact.
        tolerance = 2**-8 if case.endswith("full") else TOLERANCE
        assert model(input_ids=rows, labels=rows).loss.item() == pytest.approx(result["loss"], rel=tolerance), case
        refused = "call save_model" if case.endswith("sharded") else "holds an adapter beside its base model"
        with pytest.raises(CheckpointError, match=refused):
            export_checkpoint(tmp_path / case / "checkpoint-4", tmp_path / "out")


def train_adapters(folder: str) -> dict[str, dict[str, Any]]:
    results = {}
    for case, (name, config, form) in ADAPTERS.items():

        def make(output_dir: str, name: str = name, config: Any = config, form: str = form) -> Any:
            model = tiny.build(name)
            torch.manual_seed(1)
            return make_trainer(output_dir, model=get_peft_model(model, config), max_steps=8, state_format=form)

        whole = make(f"{folder}/{case}")
        whole.train()
        adapters = {name: p.full_tensor() for name, p in whole.model.named_parameters() if p.requires_grad}
        resumed = make(f"{folder}/{case} again")
        resumed.train(resume_from_checkpoint=f"{folder}/{case}/checkpoint-4")
        results[case] = {"whole": losses(whole), "resumed": losses(resumed), "adapters": adapters}
    return results


def test_adapters_resume_and_export(tmp_path: Path) -> None:
    for case, result in run_ranks(train_adapters, 2, str(tmp_path))[0].items():
        assert result["resumed"][4:] == result["whole"][4:], case
        export_checkpoint(tmp_path / case / "checkpoint-8", tmp_path / f"{case} out")
        base = tiny.build(ADAPTERS[case][0])
        state = PeftModel.from_pretrained(base, tmp_path / f"{case} out").state_dict()
        assert result["adapters"]
        assert all(torch.equal(state[name], value) for name, value in result["adapters"].items()), case
        mark = read_mark(tmp_path / case / "checkpoint-8")
        assert mark is not None
        assert any("vera_A" in name for name in mark.models[0].tied) == case.startswith("vera"), "layers share buffers"


def fill_disk(folder: str, form: str) -> dict[str, Any]:
    """Trains with a checkpoint that fits and a later one that does not."""
    trainer = make_trainer(folder, state_format=form, save_steps=4)
    trainer.add_callback(_FillDisk(folder))
    with pytest.raises(CheckpointError) as caught:
        trainer.train()
    return {"said": str(caught.value), "step": trainer.state.global_step}


class _FillDisk(TrainerCallback):
    """Leaves 200 kB of the disk free after the first checkpoint, less than half of what the next one needs."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_save(self, *_: Any, **__: Any) -> None:
        if dist.get_rank() == 0:
            free = shutil.disk_usage(self.folder).free
            (self.folder / "ballast").write_bytes(bytes(free - 200_000))
        dist.barrier()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root")
@pytest.mark.parametrize("form", ["sharded", "full"])
def test_full_disk_is_a_clear_error_on_every_rank_and_the_former_checkpoint_stays(tmp_path: Path, form: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], check=True)
    try:
        everyone = run_ranks(fill_disk, 2, str(tmp_path), form, timeout_s=120)
        assert all(result["step"] == 8 for result in everyone)
        assert all(result["said"] == everyone[0]["said"] for result in everyone)
        said = everyone[0]["said"]
        assert f"could not write the checkpoint {tmp_path}/checkpoint-8" in said
        assert "MB free then; what had been written is removed" in said
        assert f"Intact: {tmp_path}/checkpoint-4" in said
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ballast", "checkpoint-4"]
        assert read_mark(tmp_path / "checkpoint-4") is not None
    finally:
        subprocess.run(["umount", tmp_path], check=True)
