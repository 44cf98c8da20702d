"""Does an Accelerate loop under MiCSAccelerator train as one process does, and keep accelerate's features?"""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.utils.data import DataLoader, TensorDataset

from hf_mics import MiCSAccelerator, MiCSPlugin, mics_engine
from hf_mics.errors import ConfigError
from hf_mics.plugin import requested_sizes
from hf_mics.testing import run_ranks
from tests import tiny

WORLD_SIZE = 4
ACCUMULATION = 3
# 22 batches of 2 rows on 4 ranks leave each rank 10 micro-steps an epoch (the last of them filled up by accelerate):
# three full windows and a short one.
ROWS = 80
# Adam divides by the square root of a second moment: a gradient of nearly zero whose sign differs in the last bit
# moves a weight by a whole step. SGD with momentum keeps differences proportional to the fp32 rounding of sums over
# at most 4 ranks x 3 micro-steps x 24 tokens, about 1e-7 of gradients of order 1, times 8 steps of rate 0.1.
TOLERANCE = 2e-6


def fresh_accelerator(**kwargs: Any) -> MiCSAccelerator:
    """A MiCSAccelerator on the ranks of this spawn, whatever an earlier check left behind."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    kwargs.setdefault("mics_plugin", MiCSPlugin(partition_size=2))
    return MiCSAccelerator(**kwargs)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(tiny.token_rows(ROWS)), batch_size=2)


def loop(accelerator: Any, model: nn.Module, optimizer: Any, batches: Any, epochs: int = 2) -> list[float]:
    """The loop of accelerate's documentation; returns the gradient norms."""
    norms = []
    for _ in range(epochs):
        for (rows,) in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=rows, labels=rows).loss)
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
                optimizer.step()
                optimizer.zero_grad()
    return norms


def train_mics(name: str, accelerator: MiCSAccelerator, seed: int = 0) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Trains `name` and returns gradient norms and full weights."""
    model = tiny.build(name, seed)
    model, optimizer, batches = accelerator.prepare(model, make_optimizer(model), loader())
    mics_engine(model).meter.reset()
    norms = loop(accelerator, model, optimizer, batches)
    return norms, full_weights(model)


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor().clone() for name, p in model.named_parameters()}


def train_alone(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training in one process, on the global batch, with nothing but torch."""
    model = tiny.build(name)
    optimizer = make_optimizer(model)
    rows = tiny.token_rows(ROWS)
    per_micro_step = 2 * WORLD_SIZE
    norms = []
    for _ in range(2):
        micro_steps = rows.split(per_micro_step)
        for number, batch in enumerate(micro_steps, start=1):
            # Every rank's mean over its own rows, averaged, is the mean over the global batch: equal lengths.
            (model(input_ids=batch, labels=batch).loss / ACCUMULATION).backward()
            if number % ACCUMULATION == 0 or number == len(micro_steps):
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
                optimizer.step()
                optimizer.zero_grad()
    return norms, {name: p.detach() for name, p in model.named_parameters()}


def largest_difference(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == reference.keys()
    return max((ours[name] - reference[name]).abs().max().item() for name in reference)


def check_models_and_sizes() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, partition in [("gpt2", 2), ("bert", 2), ("llama", 4), ("t5", 2), ("gpt2", 1), ("bart", None)]:
        plugin = MiCSPlugin(partition_size=partition, cpu_ram_efficient_loading=name == "bart")
        accelerator = fresh_accelerator(gradient_accumulation_steps=ACCUMULATION, mics_plugin=plugin)
        # Only rank 0 starts from the twin's weights: the others must get them from it.
        norms, weights = train_mics(name, accelerator, seed=dist.get_rank())
        results[f"{name}, partition_size {partition}"] = name, norms, weights, accelerator.topology.partition_size
    return results


def test_accelerate_loop_trains_as_one_process_for_every_model_and_partition_size() -> None:
    results = run_ranks(check_models_and_sizes, WORLD_SIZE)[0]
    assert [partition for *_, partition in results.values()] == [2, 2, 4, 2, 1, 4]
    for case, (name, norms, weights, _) in results.items():
        reference_norms, reference_weights = train_alone(name)
        assert len(norms) == len(reference_norms) == 8, case
        assert norms == pytest.approx(reference_norms, rel=1e-5), case
        assert largest_difference(weights, reference_weights) < TOLERANCE, case


def check_counts() -> dict[str, Any]:
    seen: dict[str, Any] = {}
    accelerator = fresh_accelerator(gradient_accumulation_steps=ACCUMULATION)
    model = tiny.build("gpt2")
    model, optimizer, batches = accelerator.prepare(model, make_optimizer(model), loader())
    engine = mics_engine(model)
    engine.meter.reset()
    loop(accelerator, model, optimizer, batches, epochs=1)
    seen["units"] = len(engine.units)
    seen["accumulate"] = engine.meter.read()["all_reduce", "replication"].calls

    engine.meter.reset()
    rows = tiny.token_rows(2)
    for _ in range(2):
        with accelerator.no_sync(model):
            accelerator.backward(model(input_ids=rows, labels=rows).loss)
    seen["inside no_sync"] = ("all_reduce", "replication") in engine.meter.read()
    seen["local gradient elements"] = sum(p.grad.to_local().numel() for p in model.parameters())
    seen["elements"] = sum(p.numel() for p in model.parameters())
    accelerator.backward(model(input_ids=rows, labels=rows).loss)
    seen["after no_sync"] = engine.meter.read()["all_reduce", "replication"].calls
    return seen


def test_hop_2_runs_once_per_unit_and_optimizer_step_and_gradients_stay_sharded_before_it() -> None:
    for seen in run_ranks(check_counts, WORLD_SIZE):
        assert seen["accumulate"] == 4 * seen["units"]
        assert not seen["inside no_sync"]
        assert seen["after no_sync"] == seen["units"]
        # Rows of odd counts split over 2 ranks: at most one row more than half on one of them.
        assert seen["local gradient elements"] == pytest.approx(seen["elements"] / 2, rel=0.06)


def check_mixed_precision() -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for wire in ("auto", "float32"):
        accelerator = fresh_accelerator(
            mixed_precision="bf16", mics_plugin=MiCSPlugin(partition_size=2, gradient_wire_dtype=wire)
        )
        model = tiny.build("gpt2")
        if wire == "float32":
            model.bfloat16()  # as loaded with dtype="auto"; the weights that are trained are fp32 all the same
        model, optimizer, _ = accelerator.prepare(model, make_optimizer(model), loader())
        dtypes = []
        model.transformer.h[1].mlp.c_fc.register_forward_hook(
            lambda m, args, out, dtypes=dtypes: dtypes.append((m.weight.dtype, out.dtype))
        )
        rows = tiny.token_rows(2)
        with accelerator.no_sync(model):
            accelerator.backward(model(input_ids=rows, labels=rows).loss)
        seen[f"{wire} partial sums"] = {unit.partial_sum.dtype for unit in mics_engine(model).units}
        accelerator.backward(model(input_ids=rows, labels=rows).loss)
        optimizer.step()
        seen[f"{wire} compute"] = set(dtypes)
        seen[f"{wire} weights"] = {p.dtype for p in model.parameters()}
        traffic = mics_engine(model).meter.read()
        seen[f"{wire} bytes"] = traffic["reduce_scatter", "partition"].bytes_sent
        seen[f"{wire} hop 2"] = traffic["all_reduce", "replication"].bytes_sent
    return seen


def test_bf16_computes_and_travels_in_bf16_and_adds_up_in_fp32() -> None:
    seen = run_ranks(check_mixed_precision, WORLD_SIZE)[0]
    for wire in ("auto", "float32"):
        assert seen[f"{wire} compute"] == {(torch.bfloat16, torch.bfloat16)}
        assert seen[f"{wire} weights"] == {torch.float32}
        assert seen[f"{wire} partial sums"] == {torch.float32}
    assert seen["float32 bytes"] == 2 * seen["auto bytes"]
    assert seen["float32 hop 2"] == 2 * seen["auto hop 2"]


def check_features(folder: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    accelerator = fresh_accelerator(gradient_accumulation_steps=ACCUMULATION)
    seen["plain"] = train_mics("gpt2", accelerator)[1]
    plugin = MiCSPlugin(partition_size=2, activation_checkpointing=True)
    accelerator = fresh_accelerator(gradient_accumulation_steps=ACCUMULATION, mics_plugin=plugin)
    model = tiny.build("gpt2")
    model, optimizer, batches = accelerator.prepare(model, make_optimizer(model), loader())
    seen["checkpointed layers"] = sum(type(m).__name__.endswith("CheckpointWrapper") for m in model.modules())
    loop(accelerator, model, optimizer, batches)
    seen["checkpointed"] = {
        name.replace("_checkpoint_wrapped_module.", ""): weight for name, weight in full_weights(model).items()
    }
    offload = CPUOffloadPolicy(pin_memory=False)
    accelerator = fresh_accelerator(mics_plugin=MiCSPlugin(partition_size=2, cpu_offload=offload))
    with torch.device("cpu" if accelerator.is_main_process else "meta"):
        model = tiny.build("gpt2")
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    seen["offloaded"] = [p.offload_to_cpu for unit in mics_engine(model).units for p in unit._params]
    accelerator = fresh_accelerator(gradient_accumulation_steps=ACCUMULATION, dynamo_backend="aot_eager")
    model = tiny.build("gpt2")
    model, optimizer, batches = accelerator.prepare(model, make_optimizer(model), loader())
    seen["compiled"] = hasattr(model, "_orig_mod")
    loop(accelerator, model, optimizer, batches)
    seen["compiled weights"] = {n.replace("_orig_mod.", ""): weight for n, weight in full_weights(model).items()}

    # Saved after an epoch, then spoilt by another epoch and an unfinished window, then loaded: as if nothing happened.
    accelerator = fresh_accelerator(gradient_accumulation_steps=ACCUMULATION)
    model = tiny.build("gpt2")
    model, optimizer, batches = accelerator.prepare(model, make_optimizer(model), loader())
    loop(accelerator, model, optimizer, batches, epochs=1)
    accelerator.save_state(folder)
    loop(accelerator, model, optimizer, batches, epochs=1)
    rows = tiny.token_rows(2)
    with accelerator.no_sync(model):
        accelerator.backward(model(input_ids=rows, labels=rows).loss)
    accelerator.load_state(folder)
    seen["open windows after load_state"] = mics_engine(model).schedule.open_names()
    loop(accelerator, model, optimizer, batches, epochs=1)
    seen["resumed"] = full_weights(model)
    return seen


def test_checkpointing_compilation_and_resuming_give_the_weights_of_plain_training(tmp_path: Path) -> None:
    seen = run_ranks(check_features, WORLD_SIZE, str(tmp_path))[0]
    assert seen["checkpointed layers"] == 3
    # Recomputation repeats the same operations on the same inputs.
    assert largest_difference(seen["checkpointed"], seen["plain"]) == 0.0
    assert all(seen["offloaded"])
    assert seen["compiled"]
    assert largest_difference(seen["compiled weights"], seen["plain"]) < TOLERANCE
    assert not seen["open windows after load_state"]
    assert largest_difference(seen["resumed"], seen["plain"]) == 0.0


def check_dropout_under_checkpointing() -> list[dict[str, torch.Tensor]]:
    weights = []
    for checkpointing in (False, True):
        plugin = MiCSPlugin(partition_size=2, activation_checkpointing=checkpointing)
        accelerator = fresh_accelerator(mics_plugin=plugin)
        torch.manual_seed(0)
        model = tiny.gpt2(dropout=0.3)
        model, optimizer, batches = accelerator.prepare(model, make_optimizer(model), loader())
        torch.manual_seed(dist.get_rank())
        loop(accelerator, model, optimizer, batches, epochs=1)
        weights.append({n.replace("_checkpoint_wrapped_module.", ""): w for n, w in full_weights(model).items()})
    return weights


def test_dropout_is_the_same_in_the_recomputation_of_checkpointed_layers() -> None:
    plain, checkpointed = run_ranks(check_dropout_under_checkpointing, WORLD_SIZE)[0]
    # Same masks, and on some machines the same bits; on others the last one differs (2.2e-8 seen).
    assert largest_difference(checkpointed, plain) < TOLERANCE


def check_meta_and_refusals() -> dict[str, Any]:
    seen: dict[str, Any] = {}
    accelerator = fresh_accelerator()
    with torch.device("cpu" if accelerator.is_main_process else "meta"):
        model = tiny.build("llama")
    model, optimizer, batches = accelerator.prepare(model, make_optimizer(model), loader())
    seen["from meta"] = full_weights(model)
    seen["freed"] = {unit.name: unit.frees_after_forward for unit in mics_engine(model).units}
    seen["rotary"] = model.model.rotary_emb.inv_freq.clone()
    loop(accelerator, model, optimizer, batches, epochs=1)
    seen["trained from meta"] = full_weights(model)

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = fresh_accelerator()
    model = tiny.build("llama")
    model, optimizer, batches = accelerator.prepare(model, make_optimizer(model), loader())
    loop(accelerator, model, optimizer, batches, epochs=1)
    seen["trained"] = full_weights(model)

    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ConfigError, match="given to accelerate's own Accelerator"):
        Accelerator(fsdp_plugin=MiCSPlugin(partition_size=2), cpu=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from accelerate.utils import GradientAccumulationPlugin

        plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
        accelerator = fresh_accelerator(gradient_accumulation_plugin=plugin)
    seen["warned"] = [str(w.message) for w in caught if "two-hop" in str(w.message)]
    model = tiny.build("gpt2")
    model, optimizer, batches = accelerator.prepare(model, make_optimizer(model), loader())
    loop(accelerator, model, optimizer, batches, epochs=1)
    engine = mics_engine(model)
    seen["hop 2 per micro-step"] = engine.meter.read()["all_reduce", "replication"].calls / len(engine.units)
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    seen["second"] = MiCSAccelerator().topology == accelerator.topology
    with pytest.raises(ConfigError, match="settings of the first Accelerator"):
        MiCSAccelerator(mics_plugin=MiCSPlugin(partition_size=2, hierarchical=False))
    return seen


def test_ranks_on_meta_get_rank_0s_weights_and_misuse_is_told() -> None:
    seen = run_ranks(check_meta_and_refusals, WORLD_SIZE)
    reference = tiny.build("llama")
    for rank, result in enumerate(seen):
        assert largest_difference(result["from meta"], dict(reference.named_parameters())) == 0.0
        assert torch.equal(result["rotary"], reference.model.rotary_emb.inv_freq)
        assert result["freed"]["model.layers.0"]
        assert not result["freed"]["lm_head"], "its backward follows its forward"
        assert largest_difference(result["trained from meta"], result["trained"]) == 0.0
        assert largest_difference(result["trained"], result["from meta"]) > 0.0
        assert result["hop 2 per micro-step"] == 10
        assert len(result["warned"]) == (rank == 0)
        assert result["second"]


def check_launch_environment(expected: str) -> str:
    with pytest.raises(ConfigError) as caught:
        MiCSAccelerator()
    assert expected in str(caught.value), str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "no FSDP in the accelerate config"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "MiCS needs FSDP version 2, got version 1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "enables DeepSpeed"),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
                "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
                "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "3",
            },
            "2 x 3 = 6, expected 2",
        ),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
                "PARALLELISM_CONFIG_TP_SIZE": "2",
            },
            "tp_size=2",
        ),
    ],
)
def test_a_launch_config_that_cannot_work_is_refused_alike_on_all_ranks(
    environment: dict[str, str], expected: str
) -> None:
    messages = run_ranks(check_launch_environment, 2, expected, environment=environment, timeout_s=60)
    assert len(set(messages)) == 1


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_other_parallelism_is_refused_by_name(name: str) -> None:
    sizes = {"tp_size": 1, "cp_size": 1, "sp_size": 1, "dp_shard_size": 2, "dp_replicate_size": 1}
    with pytest.raises(ConfigError, match=f"expected tp_size, cp_size and sp_size of 1, got {name}=2"):
        requested_sizes(SimpleNamespace(**{**sizes, name: 2}))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [0, True, 2.0, "2"])
@pytest.mark.parametrize("name", ["partition_size", "node_size"])
def test_a_plugins_sizes_are_positive_integers(name: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer or None, got {wrong!r}"):
        MiCSPlugin(**{name: wrong})


def check_bad_sizes() -> list[str]:
    messages = []

    class Started(Exception):
        pass

    with mock.patch("hf_mics.accelerator.start_process_state", side_effect=Started) as start, pytest.raises(Started):
        fresh_accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=77))])
    assert start.call_args.kwargs["timeout"] == timedelta(seconds=77)
    with pytest.raises(ValueError, match="every rank must ask for the same partition_size, got ") as caught:
        fresh_accelerator(mics_plugin=MiCSPlugin(partition_size=2 if dist.get_rank() < 2 else 4))
    messages.append(str(caught.value))
    for plugin in (MiCSPlugin(partition_size=3), MiCSPlugin(partition_size=2, node_size=3)):
        with pytest.raises(ValueError, match="must divide") as caught:
            fresh_accelerator(mics_plugin=plugin)
        messages.append(str(caught.value))
    os.environ["LOCAL_WORLD_SIZE"] = "4" if dist.get_rank() < 2 else "1"
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE differs between nodes") as caught:
        fresh_accelerator()
    return [*messages, str(caught.value)]


def test_sizes_that_form_no_groups_are_refused_alike_on_all_ranks() -> None:
    messages = run_ranks(check_bad_sizes, WORLD_SIZE, timeout_s=60)
    assert all(told == messages[0] for told in messages)
