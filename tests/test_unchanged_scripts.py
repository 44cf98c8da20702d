"""Do the habits of scripts that were written for unsharded models work, or say what to do instead?"""

from __future__ import annotations

import functools
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from hf_mics import MiCSPlugin, model_methods, remove_mics
from hf_mics._torch_compat import find_units, gradient_hooks
from hf_mics.errors import ConfigError
from hf_mics.hints import explain_shards
from hf_mics.testing import run_ranks
from tests import tiny
from tests.test_accelerator import TOLERANCE, fresh_accelerator, full_weights, largest_difference, make_optimizer

WORLD_SIZE = 4


def make_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)), nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 1))


def duel(generator: nn.Module, critic: nn.Module, optimizers: Any, backward: Any, part: Any, clip: Any) -> None:
    """Two steps each of two models that train against each other, with one optimizer for each."""
    for step in range(2):
        torch.manual_seed(step)
        noise, real = part(torch.randn(8, 7)), part(torch.randn(8, 5))
        backward((critic(generator(noise).detach()) - critic(real)).square().mean())
        clip(critic.parameters(), 0.01)
        optimizers[1].step()
        optimizers[1].zero_grad()
        backward(-critic(generator(noise)).mean())
        optimizers[0].step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def check_two_models() -> list[dict[str, torch.Tensor]]:
    accelerator = fresh_accelerator()
    models = make_pair()
    loader = torch.utils.data.DataLoader(torch.zeros(8, 1), batch_size=1)
    g, batches, d, *optimizers = accelerator.prepare(models[0], loader, models[1], *map(make_optimizer, models))
    assert len(batches) == 2
    rank = dist.get_rank()
    # Between the ranks, clipping an average is not averaging what was clipped: gradients are averaged first.
    with mock.patch.object(accelerator, "unscale_gradients") as unscaled:
        duel(g, d, optimizers, accelerator.backward, lambda x: x.chunk(WORLD_SIZE)[rank], accelerator.clip_grad_value_)
    assert unscaled.call_count == 2, "under fp16 the scaled gradients would be clipped"
    return [full_weights(g), full_weights(d)]


def test_two_models_in_one_prepare_train_as_in_one_process() -> None:
    ours = run_ranks(check_two_models, WORLD_SIZE)[0]
    models = make_pair()
    optimizers = [make_optimizer(model) for model in models]
    duel(*models, optimizers, lambda loss: loss.backward(), lambda x: x, nn.utils.clip_grad_value_)
    for weights, model in zip(ours, models, strict=True):
        assert largest_difference(weights, dict(model.named_parameters())) < TOLERANCE


def check_methods(folder: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for generates in (False, True):
        accelerator = fresh_accelerator(gradient_accumulation_steps=2)
        model = tiny.build("t5")
        model, optimizer = accelerator.prepare(model, make_optimizer(model))
        rows, texts = tiny.token_rows(2, seed=dist.get_rank()), []

        def generate(texts: list[Any] = texts, on: bool = generates, model: Any = model) -> None:
            if on:
                model.eval()
                texts.append(accelerator.unwrap_model(model).generate(tiny.token_rows(2), max_new_tokens=4))
                model.train()

        generate()
        for _ in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=rows, labels=rows).loss)
                generate()  # in mid-window too
                optimizer.step()
                optimizer.zero_grad()
        seen[f"trained, generate {generates}"] = full_weights(model)
    seen["texts"] = texts
    accelerator.unwrap_model(model).save_pretrained(
        folder, is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    if accelerator.is_main_process:
        match = "rank 0 waited 0.1 s for rank 1.*is_main_process=accelerator.is_main_process"
        with mock.patch.object(model_methods, "_WAIT_FOR_CALLERS_S", 0.1), pytest.raises(ConfigError, match=match):
            model.save_pretrained(f"{folder}/alone")
    accelerator.wait_for_everyone()
    for _ in range(2):
        model.save_pretrained(f"{folder}/by_all")
        assert Path(folder, "by_all", "model.safetensors").is_file(), "every rank goes on when the folder is there"
    states = [model.state_dict(), {"step": 1, "models": [model.state_dict()]}, optimizer.state_dict()]
    for state in (*states, model, [optimizer]):
        for save in (accelerator.save, torch.save):
            with pytest.raises(ConfigError, match="get_state_dict"):
                save(state, f"{folder}/weights.pt")

    accelerator = fresh_accelerator()
    # PEFT trains the whole head of a classifier beside the adapter.
    model = peft.get_peft_model(tiny_classifier(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    accelerator.backward(model(input_ids=rows, labels=torch.tensor([0, 1])).loss)
    optimizer.step()
    accelerator.unwrap_model(model).save_pretrained(f"{folder}/adapter", is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    seen["adapter"] = {name: weight for name, weight in full_weights(model).items() if "default" in name}

    accelerator = fresh_accelerator()
    # PEFT stores what the prompt's encoder computes.
    model = peft.get_peft_model(
        tiny.build("gpt2"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(input_ids=rows, labels=rows).loss)
    optimizer.step()
    accelerator.unwrap_model(model).save_pretrained(f"{folder}/prompt", is_main_process=accelerator.is_main_process)
    seen["prompted text"] = accelerator.unwrap_model(model).eval().generate(input_ids=rows[:, :6], max_new_tokens=4)
    seen["prompt"] = {n: w for n, w in full_weights(model).items() if "prompt_encoder" in n}
    return seen


def tiny_classifier() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=61, num_labels=2, **shape))


def test_generate_and_save_pretrained_of_a_sharded_model_do_what_they_do_of_a_whole_one(tmp_path: Path) -> None:
    seen = run_ranks(check_methods, WORLD_SIZE, str(tmp_path))
    trained = seen[0]["trained, generate True"]
    assert largest_difference(trained, seen[0]["trained, generate False"]) == 0.0
    whole = tiny.build("t5").eval()
    assert torch.equal(seen[0]["texts"][0], whole.generate(tiny.token_rows(2), max_new_tokens=4))
    assert all(
        torch.equal(mine, others) for rank in seen for mine, others in zip(seen[0]["texts"], rank["texts"], strict=True)
    )
    for folder in (tmp_path / "by_all", tmp_path):
        loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
        assert largest_difference(dict(loaded.named_parameters()), trained) == 0.0
        assert load_file(folder / "model.safetensors").keys() == trained.keys(), "tied weights are stored once"
    assert not (tmp_path / "alone").exists()
    assert torch.equal(seen[0]["texts"][-1], loaded.generate(tiny.token_rows(2), max_new_tokens=4))
    assert not (tmp_path / "weights.pt").exists()
    adapted = peft.PeftModel.from_pretrained(tiny_classifier(), tmp_path / "adapter")
    trained = {name: weight for name, weight in adapted.named_parameters() if "default" in name}
    assert len(trained) == 4
    assert largest_difference(trained, seen[0]["adapter"]) == 0.0
    prompted = peft.PeftModel.from_pretrained(tiny.build("gpt2"), tmp_path / "prompt")
    trained = {name: weight for name, weight in prompted.named_parameters() if "prompt_encoder" in name}
    assert trained
    assert largest_difference(trained, seen[0]["prompt"]) == 0.0
    for rank, of_rank in enumerate(seen):
        text = prompted.eval().generate(input_ids=tiny.token_rows(2, seed=rank)[:, :6], max_new_tokens=4)
        assert torch.equal(of_rank["prompted text"], text)


def evaluate_on_an_average(model: nn.Module, optimizer: Any, backward: Any, part: Any) -> list[float]:
    """A loop that evaluates with averaged weights, puts its own back, and clips what is too large."""
    losses = []
    average = {name: param.detach().clone() for name, param in model.named_parameters()}
    for step in range(2):
        rows = part(tiny.token_rows(8, seed=step))
        backward(model(input_ids=rows, labels=rows).loss)
        optimizer.step()
        optimizer.zero_grad()
        own = {name: param.detach().clone() for name, param in model.named_parameters()}
        for name, param in model.named_parameters():
            average[name].lerp_(param.detach(), 0.5)
            param.data.copy_(average[name])
        with torch.no_grad():
            rows = tiny.token_rows(4, seed=9)
            losses.append(model(input_ids=rows, labels=rows).loss.item())
        for name, param in model.named_parameters():
            param.data.copy_(own[name])
        with torch.no_grad():
            model(input_ids=rows)
        if not dist.is_initialized() or dist.get_rank() == 0:
            # A rank that looks at its parameters alone: the next forward gathers on all ranks all the same.
            assert sum(param.numel() for param in model.parameters()) > 0
        with torch.no_grad():
            losses.append(model(input_ids=rows, labels=rows).loss.item())
        for param in model.parameters():
            param.data.clamp_(-0.03, 0.03)
    return losses


class CallsItself(nn.Module):
    """Refines what it has found in a second forward, or returns parameters of its own beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(7, 7) for _ in range(2)])
        self.bias = nn.Parameter(torch.randn(3, 7))

    def forward(self, x: torch.Tensor, again: bool = True) -> dict[str, Any]:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        if again:
            x = x + self(x, again=False)["x"]
        return {"x": x + self.bias[0], "own": (self.bias, [self.bias[1:]])}

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x) * self.bias[2]


def evaluate_with_own_weights(model: Any, optimizer: Any, backward: Any) -> list[torch.Tensor]:
    """What evaluations return, whose bias is clipped after each."""
    returned = []
    for _ in range(2):
        backward(model(torch.ones(2, 7), again=False)["x"].square().mean())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            refined, output = model(torch.ones(2, 7)), model(torch.ones(2, 7), again=False)
        returned += [refined["x"], output["own"][0].clone(), output["own"][1][0].clone()]
        for bound in (0.3, 0.2):
            for param in model.parameters():
                param.data.clamp_(-bound, bound)
            returned.append(model.encode(torch.ones(2, 7)))
    return returned


def check_changes_after_evaluation() -> dict[str, Any]:
    accelerator = fresh_accelerator()
    model = tiny.build("gpt2")
    whole = model.transformer.wpe.weight.detach().clone()
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    part = functools.partial(torch.Tensor.chunk, chunks=WORLD_SIZE)
    losses = evaluate_on_an_average(model, optimizer, accelerator.backward, lambda x: part(x)[dist.get_rank()])
    errors = []
    with pytest.raises(RuntimeError) as mixed:
        whole.add_(model.transformer.wpe.weight)
    errors.append(str(mixed.value))
    unused = tiny.build("llama")
    unused, _ = accelerator.prepare(unused, make_optimizer(unused))
    with pytest.raises(AttributeError) as too_early:
        unused.model(tiny.token_rows(2))
    errors.append(str(too_early.value))
    weights = full_weights(model)
    model = CallsItself()
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    register_fsdp_forward_method(model, "encode")
    returned = evaluate_with_own_weights(model, optimizer, accelerator.backward)
    return {"losses": losses, "weights": weights, "errors": errors, "returned": returned, "own": full_weights(model)}


def test_weights_that_change_after_an_evaluation_change_as_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = run_ranks(check_changes_after_evaluation, WORLD_SIZE)
    model = tiny.build("gpt2")
    losses = evaluate_on_an_average(model, make_optimizer(model), torch.Tensor.backward, lambda x: x)
    own = CallsItself()
    returned = evaluate_with_own_weights(own, make_optimizer(own), torch.Tensor.backward)
    for of_rank in seen:
        torch.testing.assert_close(of_rank["returned"], returned)
        assert largest_difference(of_rank["own"], dict(own.named_parameters())) < TOLERANCE
        assert of_rank["losses"] == pytest.approx(losses, rel=1e-6)
        assert largest_difference(of_rank["weights"], dict(model.named_parameters())) < TOLERANCE
    monkeypatch.setattr("sys.excepthook", sys.__excepthook__)
    explain_shards.__wrapped__()
    for said in [*seen[0]["errors"], "something else"]:
        sys.excepthook(RuntimeError, RuntimeError(said), None)
        assert ("docs/scripts.md" in capsys.readouterr().err) == (said != "something else"), said


def check_buffers(folder: str) -> list[dict[str, torch.Tensor]]:
    accelerator = fresh_accelerator()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 7), nn.BatchNorm1d(7), nn.BatchNorm1d(7))
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    torch.manual_seed(dist.get_rank())
    for _ in range(2):
        accelerator.backward(model(torch.randn(4, 5)).square().mean())
        optimizer.step()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    accelerator.save_state(folder)
    accelerator.load_state(folder)
    return [before, dict(model.named_buffers())]


def test_a_checkpoint_has_the_buffers_of_rank_0(tmp_path: Path) -> None:
    """Statistics differ between ranks, and a mixture belongs to nobody."""
    seen = run_ranks(check_buffers, WORLD_SIZE, str(tmp_path))
    first = seen[0][0]
    assert all((first["1.running_mean"] != before["1.running_mean"]).all() for before, _ in seen[1:])
    for _, after in seen:
        assert all(torch.equal(first[name], buffer) for name, buffer in after.items())


def check_refusals() -> None:
    accelerator = fresh_accelerator()

    def refused(match: str, *items: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            accelerator.prepare(*items)

    first, second = make_pair()
    refused("Sequential without its optimizer.*evaluation_mode=True", first)
    refused("Sequential without its optimizer", first, second, make_optimizer(first))
    refused("an optimizer without its model", make_optimizer(first))
    refused("holds parameters of 2 of them", first, second, make_optimizer(nn.ModuleList([first, second])))
    refused("Adafactor cannot work on sharded parameters", first, transformers.Adafactor(first.parameters()))
    adapted = peft.get_peft_model(
        tiny_classifier(), peft.AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"], total_step=9)
    )
    refused("AdaLoRA cannot work on sharded parameters", adapted, make_optimizer(adapted))
    refused("LBFGS cannot work on sharded parameters", first, torch.optim.LBFGS(first.parameters()))
    for kind in (nn.Embedding, nn.EmbeddingBag):
        for name in ("max_norm", "sparse"):
            embedding = nn.Sequential(kind(4, 4, **{name: True}))
            refused(f"^0 has {name}=", embedding, make_optimizer(embedding))
    hook = first[2].weight.register_hook(lambda grad: grad.clamp(-1, 1))
    refused("2.weight has a hook of register_hook", first, make_optimizer(first))
    hook.remove()

    width = 3 + dist.get_rank()
    uneven = nn.Sequential(nn.Linear(width, 2))
    refused("ranks hold different Sequentials: rank 0 has 2.*tie_weights", uneven, make_optimizer(uneven))

    stepped = make_optimizer(first)
    first(torch.ones(2, 7)).sum().backward()
    stepped.step()
    refused("SGD has state from before prepare", first, stepped)
    first.zero_grad()
    adagrad = torch.optim.Adagrad(second.parameters())
    assert accelerator.prepare(second, adagrad)
    assert len(accelerator._models) == 1, "what was refused has left nothing behind"

    forgotten = torch.optim.SGD(first[2].parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(first, make_optimizer(first))
    for param in forgotten.param_groups[0]["params"]:
        param.grad = torch.zeros_like(param)
    with pytest.raises(ConfigError, match="holds the parameters that the model had before"):
        forgotten.step()
    accelerator.backward(model(torch.ones(2, 7)).sum())
    optimizer.step()
    torch.optim.SGD(model.parameters(), lr=0.1).step()

    hook = model[2].weight.register_hook(lambda grad: grad.clamp(-1, 1))
    with pytest.raises(ConfigError, match="has a hook of register_hook"):
        model(torch.ones(2, 7))
    hook.remove()
    model(torch.ones(2, 7))
    with accelerator.join_uneven_inputs([model]):
        pass
    with pytest.raises(ConfigError, match="join_uneven_inputs"), accelerator.join_uneven_inputs([model], False):
        pass


def test_what_sharded_parameters_cannot_do_is_refused_before_it_trains_wrongly() -> None:
    run_ranks(check_refusals, 2)


def check_absent_weights(folder: str) -> dict[str, Any]:
    """Under the default of a launcher, with which transformers makes a new head on one rank of each node."""
    accelerator = fresh_accelerator(mics_plugin=MiCSPlugin(partition_size=2, cpu_ram_efficient_loading=True))
    rank, rows, labels = dist.get_rank(), tiny.token_rows(4), torch.tensor([0, 1, 2, 0])
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "LOCAL_RANK": str(rank)}
    with mock.patch.dict("os.environ", launched):
        load = functools.partial(transformers.AutoModelForSequenceClassification.from_pretrained, folder, num_labels=3)
        model, teacher = load(), load()
    assert model.score.weight.is_meta == bool(rank)
    model.to(accelerator.device)
    optimizer = make_optimizer(model)
    teacher.to(accelerator.device, torch.float64)
    assert {param.dtype for param in teacher.parameters()} == {torch.float64}
    if rank:
        with pytest.raises(ConfigError, match=f"lacks weights on rank {rank}.*prepare_model"):
            teacher(input_ids=rows)
    teacher = accelerator.prepare_model(teacher.float(), evaluation_mode=True)
    seen: dict[str, Any] = {"teacher": dict(teacher.named_parameters()), "logits": teacher(input_ids=rows).logits}
    model, optimizer = accelerator.prepare(model, optimizer)
    seen["before"] = full_weights(model)
    accelerator.backward(model(input_ids=rows, labels=labels).loss)
    optimizer.step()
    return seen | {"after": full_weights(model)}


def test_a_model_whose_new_head_only_rank_0_has_is_moved_and_trained_or_read(tmp_path: Path) -> None:
    tiny.build("gpt2").save_pretrained(tmp_path)
    seen = run_ranks(check_absent_weights, WORLD_SIZE, str(tmp_path))
    load = functools.partial(transformers.AutoModelForSequenceClassification.from_pretrained, tmp_path, num_labels=3)
    rows, labels = tiny.token_rows(4), torch.tensor([0, 1, 2, 0])
    for of_rank in seen:
        for case in ("teacher", "before", "after"):
            assert largest_difference(of_rank[case], seen[0][case]) == 0.0, case
        teacher = load()
        teacher.load_state_dict(of_rank["teacher"])
        assert torch.equal(of_rank["logits"], teacher.eval()(input_ids=rows).logits)
    alone = load()
    alone.load_state_dict(seen[0]["before"])
    alone.train()(input_ids=rows, labels=labels).loss.backward()
    make_optimizer(alone).step()
    assert largest_difference(seen[0]["after"], dict(alone.named_parameters())) < TOLERANCE
    assert largest_difference(seen[0]["after"], seen[0]["before"]) > TOLERANCE


def fused_loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """A forward as TRL's, which computes the loss from the head's weight and calls the head never."""
    hidden = model.model(input_ids=rows).last_hidden_state[:, :-1]
    weight = model.lm_head.weight
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    return nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), rows[:, 1:].flatten())


def train_fused(model: nn.Module, optimizer: Any, backward: Any, part: Any) -> None:
    for step in range(3):
        loss = model(part(tiny.token_rows(8, seed=step)))
        with torch.no_grad():  # as of a reference, between the policy's forward and its backward
            reference = model(tiny.token_rows(4, seed=9))
        backward(loss * reference if step else loss)
        optimizer.step()
        optimizer.zero_grad()


def check_head_past_its_forward() -> list[dict[str, torch.Tensor]]:
    trained = []
    for checkpointing in (False, True):
        plugin = MiCSPlugin(partition_size=2, activation_checkpointing=checkpointing)
        accelerator = fresh_accelerator(mics_plugin=plugin)
        model = tiny.build("llama")
        model.forward = types.MethodType(fused_loss, model)
        model, optimizer = accelerator.prepare(model, make_optimizer(model))
        train_fused(model, optimizer, accelerator.backward, lambda x: x.chunk(WORLD_SIZE)[dist.get_rank()])
        trained.append(full_weights(model))
    # Of any other weight the shard would be trained on this rank's rows alone.
    loss = model(tiny.token_rows(2))
    with pytest.raises(ConfigError, match=r"loss was computed from shards of model\.layers\.0"):
        accelerator.backward(loss + model.model.layers[0].mlp.up_proj.weight.full_tensor().mean())
    params = [param for unit in find_units(model) for param in unit.sharded_params]
    assert all(gradient_hooks(param) for param in params)
    remove_mics(model)
    assert not any(gradient_hooks(param) for param in params)
    return trained


def test_a_head_whose_weight_is_used_past_its_forward_trains_as_in_one_process() -> None:
    model = tiny.build("llama")
    model.forward = types.MethodType(fused_loss, model)
    train_fused(model, make_optimizer(model), lambda loss: loss.backward(), lambda x: x)
    for trained in run_ranks(check_head_past_its_forward, WORLD_SIZE):
        for weights in trained:
            names = {name.replace("_checkpoint_wrapped_module.", ""): weight for name, weight in weights.items()}
            assert largest_difference(names, dict(model.named_parameters())) < TOLERANCE
