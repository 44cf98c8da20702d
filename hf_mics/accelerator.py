"""How is MiCS used from an Accelerate script? `MiCSAccelerator` is accelerate's Accelerator with MiCS inside."""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from accelerate import accelerator as accelerator_module
from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from torch.distributed.tensor import DTensor

from hf_mics._hf_compat import (
    StockAccelerator,
    accelerate_is_initialized,
    active_fsdp_plugin,
    give_parameters,
    is_switched_on,
    prepare_beside_sharded,
    prepared,
    replaced_preparation,
    run_checkpoint_functions_inside,
    start_process_state,
)
from hf_mics.absent_weights import allow_absent_weights, expect_weights, has_absent_weights
from hf_mics.admission import check_optimizer, check_state, preparation_turns, remember_replaced
from hf_mics.after_evaluation import free_after_evaluation
from hf_mics.checkpoint.accelerate_state import load_state, save_state
from hf_mics.checkpoint.contents import is_pretrained, share_tied
from hf_mics.checkpoint.resuming import around_checkpoint_function
from hf_mics.checkpoint.stop import StopRequest
from hf_mics.early_evaluation import make_whole
from hf_mics.engine import apply_mics, is_under_mics, mics_engine, say_node_size
from hf_mics.errors import ConfigError, TopologyError
from hf_mics.hints import explain_shards
from hf_mics.model_methods import open_to_methods
from hf_mics.plugin import MiCSParallelismConfig, MiCSPlugin, requested_sizes, resolve_topology, with_runner_flags
from hf_mics.process_groups import say_to_all
from hf_mics.rank_watch import watch_ranks
from hf_mics.sharding import check_everywhere, checkpoint_activations, restore_scalars, shard_model
from hf_mics.shards_saved import check_whole, refuse_to_save_shards
from hf_mics.summary import start_up_summary


class MiCSAccelerator(StockAccelerator):
    """Accelerate's `Accelerator`, training under MiCS; its API and every argument are unchanged.

    On construction, in this order: finds the settings (`mics_plugin`, else a plugin passed as `fsdp_plugin`, else the
    launcher's FSDP config; with the flags of `-m hf_mics`, if it runs the script), checks them, joins the job, agrees
    with all ranks on the node size, resolves the partition size, and lets accelerate build its mesh of (dp_replicate,
    dp_shard). `prepare` then shards the model, installs MiCS and prints the start-up summary on rank 0. Works on CPUs
    over gloo and on GPUs over NCCL alike.

    Args:
        mics_plugin: MiCS settings; default those of the accelerate config.
        args, kwargs: as for `Accelerator`.

    Raises:
        ConfigError: no FSDP config and no plugin, FSDP version 1, sizes that do not multiply to the number of
            processes, other parallelism, DeepSpeed, or an Accelerator of another kind created before.
        TopologyError: a partition size that forms no groups, or nodes of different sizes.
    """

    knows_mics = True
    # Micro-steps per optimizer step where a Trainer accumulates and the Accelerator knows of one; for the summary.
    micro_steps: int | None = None

    def __init__(self, *args: Any, mics_plugin: MiCSPlugin | None = None, **kwargs: Any) -> None:
        bound = inspect.signature(StockAccelerator.__init__).bind_partial(self, *args, **kwargs)
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        plugin = _choose_plugin(mics_plugin, given.get("fsdp_plugin"))
        sizes = requested_sizes(given.get("parallelism_config"))
        init_kwargs = _init_process_group_kwargs(given.get("kwargs_handlers"))
        state = start_process_state(bool(given.get("cpu", False)), **init_kwargs)
        hosts, node_size = _agree_on_nodes(plugin)
        self._node_names = list(dict.fromkeys(hosts))
        self.topology = resolve_topology(plugin, sizes, world_size=state.num_processes, node_size=node_size)
        given["fsdp_plugin"] = plugin
        given["parallelism_config"] = MiCSParallelismConfig(
            dp_replicate_size=self.topology.replication_size, dp_shard_size=self.topology.partition_size
        )
        super().__init__(**given)
        self._companions: list[Any] = []
        self._stop_request = StopRequest()
        run_checkpoint_functions_inside(around_checkpoint_function, accelerator_module)
        if "transformers.trainer" in sys.modules:
            # Whoever makes a Trainer has loaded it; others need not wait for it.
            import_module("hf_mics.checkpoint.trainer_state").make_trainers_safe()
        if self.mics_plugin.cpu_ram_efficient_loading:
            allow_absent_weights()
        refuse_to_save_shards()
        explain_shards()
        _leave_job_at_exit()
        watch_ranks(hosts)
        self._warn_if_two_hop_is_off()

    @property
    def mics_plugin(self) -> MiCSPlugin:
        """The settings in force."""
        return self.state.fsdp_plugin

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: int = 2) -> torch.Tensor:
        """Clips as `Accelerator.clip_grad_norm_` and returns the norm over all shards, the same on every rank.

        Stock accelerate returns a DTensor whose `.item()` is this rank's part of the norm only.
        """
        norm = super().clip_grad_norm_(parameters, max_norm, norm_type=norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clips every element of the gradients, which accelerate refuses under FSDP and shards allow."""
        self.unscale_gradients()
        torch.nn.utils.clip_grad_value_(parameters, clip_value)

    @contextlib.contextmanager
    def join_uneven_inputs(self, joinables: Any, even_batches: bool | None = None) -> Iterator[None]:
        """As `Accelerator.join_uneven_inputs` where every rank has as many batches.

        Raises:
            ConfigError: ranks may have different numbers of them. Join works for DistributedDataParallel alone: under
                FSDP ranks with batches left would wait for ever for those without.
        """
        if self.num_processes > 1 and (not self.even_batches or even_batches is False):
            raise ConfigError(
                "join_uneven_inputs cannot help sharded training: every rank takes part in every gather. Expected "
                "even_batches=True, accelerate's default, with which all ranks have as many batches; got False."
            )
        yield

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Prepares as `Accelerator.prepare`, several models too, one after the other with the optimizers of each.

        Raises:
            ConfigError: a model without its optimizer or the other way round, or something that cannot be sharded.
        """
        for optimizer in (arg for arg in args if isinstance(arg, torch.optim.Optimizer)):
            check_optimizer(optimizer)
        turns = preparation_turns(args)
        if len(turns) == 1:
            return super().prepare(*args, device_placement=device_placement)
        prepared = list(args)
        for turn in turns:
            # Without device_placement, which accelerate's FSDP2 ignores.
            result = super().prepare(*(args[place] for place in turn))
            for place, item in zip(turn, result if len(turn) > 1 else [result], strict=True):
                prepared[place] = item
        return tuple(prepared)

    def prepare_model(
        self, model: torch.nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> torch.nn.Module:
        """Prepares as `Accelerator.prepare_model`; a model that is only read is whole, and is so on every rank.

        Where one rank of each node loads the weights, the others get them here: to be called on every rank.
        """
        may_lack = evaluation_mode and self.mics_plugin.cpu_ram_efficient_loading
        if may_lack and any(say_to_all(lambda: has_absent_weights(model))):
            make_whole(model, self.device)
        return super().prepare_model(model, device_placement=device_placement, evaluation_mode=evaluation_mode)

    def save(self, obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        """Saves as `Accelerator.save`.

        Raises:
            ConfigError: the object holds shards, which no other program could load.
        """
        check_whole(obj)
        super().save(obj, f, *args, **kwargs)

    def save_state(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Path:
        """Saves as `Accelerator.save_state`; the folder appears when it is complete, else not at all.

        Each shard is written by one of the ranks that hold it. The folder also gets the model's configuration and what
        `save_with_checkpoints` was given. `total_limit` counts complete checkpoints and never deletes the newest.

        Raises:
            CheckpointError: some rank could not write; on every rank alike.
        """
        stock_save = super().save_state
        return save_state(self, lambda folder: stock_save(folder, *args, **kwargs), output_dir, self._companions)

    def load_state(self, input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Loads as `Accelerator.load_state`, also what other ranks in other groups saved, in either format.

        Without `input_dir`, under automatic naming, it takes the newest complete checkpoint and says what it skipped.
        An unfinished accumulation window is dropped.

        Raises:
            CheckpointError: no checkpoint, a damaged one, or one of another model or optimizer; before anything is
                loaded and on every rank alike.
        """
        stock_load = super().load_state
        load_state(self, lambda folder: stock_load(folder, *args, **kwargs), input_dir)
        for model in filter(is_under_mics, prepared(self).models):
            mics_engine(model).schedule.drop_window()

    def should_stop(self) -> bool:
        """Whether SIGTERM has reached any rank; if so, save and end.

        To be asked once before the first optimizer step and at the end of each, on every rank. From the first call on
        SIGTERM no longer ends the process by itself, until `end_training()`. All ranks get the same answer, from an
        all-reduce of one number.
        """
        self._stop_request.listen()
        return self._stop_request.agreed(self.device)

    def end_training(self) -> None:
        """Ends as `Accelerator.end_training`; SIGTERM ends the process again."""
        self._stop_request.ignore()
        super().end_training()

    def save_with_checkpoints(self, *companions: Any) -> None:
        """From now on every checkpoint folder gets these too: tokenizers, processors, what has `save_pretrained`."""
        self._companions.extend(companions)

    def get_state_dict(self, model: torch.nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """The full state as `Accelerator.get_state_dict`, in the shapes from before sharding.

        Tied weights of transformers' models are one tensor, so that `save_pretrained` stores them once.
        """
        state = restore_scalars(model, super().get_state_dict(model, unwrap=unwrap))
        return share_tied(model, state) if is_pretrained(model) else state

    def _prepare_fsdp2(self, *args: Any) -> Any:
        # A second time: a Trainer's second train(), or its retry with a smaller batch.
        again = next((arg for arg in args if isinstance(arg, torch.nn.Module) and arg in _SHARDED), None)
        if again is None:
            # Before accelerate takes hold of anything, so that a refused prepare leaves nothing behind.
            for item in args:
                if isinstance(item, torch.optim.Optimizer):
                    check_state(item)
                elif isinstance(item, torch.nn.Module):
                    check_everywhere(item)
                    expect_weights(item)
            return_parameters = _remember_parameters(args)
            models = [arg for arg in args if isinstance(arg, torch.nn.Module)]
            with remember_replaced(models), replaced_preparation(shard_model, checkpoint_activations):
                result = super()._prepare_fsdp2(*args)
            return_parameters(result)
        else:
            result = prepare_beside_sharded(self, again, *args)
        for item in result:
            if isinstance(item, torch.nn.Module):
                _SHARDED.add(item)
                self._start_mics(item)
        return result

    def _start_mics(self, model: torch.nn.Module) -> None:
        if is_under_mics(model):
            mics_engine(model).schedule.drop_window()
            return
        plugin = self.mics_plugin
        apply_mics(
            model,
            node_size=self.topology.node_size,
            hierarchical=plugin.hierarchical,
            gradient_wire_dtype=plugin.gradient_wire_dtype,
        )
        free_after_evaluation(model)
        open_to_methods(model)
        if self.is_main_process:
            summary = start_up_summary(
                mics_engine(model),
                getattr(plugin, "wrap_report", ()),
                micro_steps=self.micro_steps or self.gradient_accumulation_steps,
                node_names=self._node_names,
            )
            print(summary, file=sys.stderr, flush=True)

    def _warn_if_two_hop_is_off(self) -> None:
        if self.gradient_state.plugin_kwargs.get("sync_each_batch", False) and self.is_main_process:
            warnings.warn(
                "sync_each_batch=True makes every micro-step end in hop 2, so two-hop synchronization is off and "
                "gradients cross nodes gradient_accumulation_steps times per optimizer step. MiCS keeps gradients "
                "sharded without it: leave sync_each_batch out.",
                UserWarning,
                stacklevel=3,
            )


# Models that a MiCSAccelerator has prepared.
_SHARDED: WeakSet[torch.nn.Module] = WeakSet()


def _remember_parameters(args: Sequence[Any]) -> Callable[[Sequence[Any]], None]:
    """Returns what gives the optimizers among `args` the model's parameters again, by their place in the model.

    Accelerate tells old parameters apart by `data_ptr`, which is 0 for all on the meta device: there it hands every
    optimizer one parameter many times over (accelerate 1.15), and the others are never trained.
    """
    places = {id(param): place for place, param in enumerate(_parameters(args))}
    optimizers = [item for item in args if isinstance(item, torch.optim.Optimizer)]
    wanted = [[[places.get(id(param)) for param in group["params"]] for group in o.param_groups] for o in optimizers]

    def give_back(result: Sequence[Any]) -> None:
        params = _parameters(result)
        for optimizer, of_groups in zip(optimizers, wanted, strict=True):
            found = [zip(g["params"], of, strict=True) for g, of in zip(optimizer.param_groups, of_groups, strict=True)]
            give_parameters(optimizer, [[p if at is None else params[at] for p, at in group] for group in found])

    return give_back


def _parameters(items: Sequence[Any]) -> list[torch.nn.Parameter]:
    return [param for item in items if isinstance(item, torch.nn.Module) for param in item.parameters()]


def _choose_plugin(mics_plugin: MiCSPlugin | None, fsdp_plugin: FullyShardedDataParallelPlugin | None) -> MiCSPlugin:
    if mics_plugin is not None and fsdp_plugin is not None:
        raise ConfigError("both mics_plugin and fsdp_plugin were given; a MiCSPlugin is both, so pass one of them.")
    if is_switched_on("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "the accelerate config enables DeepSpeed, which brings its own sharding. MiCS needs `distributed_type: "
            "FSDP` with `fsdp_version: 2`; see recipes/configs."
        )
    plugin = mics_plugin or fsdp_plugin
    if accelerate_is_initialized():
        return _active_plugin(with_runner_flags(plugin) if isinstance(plugin, MiCSPlugin) else plugin)
    if plugin is None and not is_switched_on("ACCELERATE_USE_FSDP"):
        raise ConfigError(
            "no FSDP in the accelerate config: MiCS needs `distributed_type: FSDP` with `fsdp_version: 2`, got "
            "neither that nor a MiCSPlugin. Launch with `accelerate launch --config_file "
            "recipes/configs/cpu_2x2.yaml ...` (or a config of yours), or pass mics_plugin=MiCSPlugin(...)."
        )
    return with_runner_flags(plugin)


def _active_plugin(wanted: FullyShardedDataParallelPlugin | None) -> MiCSPlugin:
    """The plugin of the Accelerator created before: accelerate keeps its state for the whole process."""
    active = active_fsdp_plugin()
    if not isinstance(active, MiCSPlugin):
        raise ConfigError(
            "accelerate was already initialized by an Accelerator that is not under MiCS, and keeps its state for the "
            "whole process. Create the MiCSAccelerator first, give a second Trainer its own TrainingArguments, or run "
            "the script with `-m hf_mics`."
        )
    if isinstance(wanted, MiCSPlugin) and wanted.settings() != active.settings():
        raise ConfigError(
            "accelerate keeps the settings of the first Accelerator for the whole process: it has "
            f"{active.settings()}, and a later one asks for {wanted.settings()}. Give every "
            "Accelerator the same MiCSPlugin settings."
        )
    return active


def _init_process_group_kwargs(handlers: list[Any] | None) -> dict[str, Any]:
    return next((h.to_kwargs() for h in handlers or () if isinstance(h, InitProcessGroupKwargs)), {})


def _agree_on_nodes(plugin: MiCSPlugin) -> tuple[list[str], int]:
    """Every rank's node name and the ranks per node, from what every rank says; so all ranks raise or none does."""
    everyone = say_node_size(plugin.node_size, (socket.gethostname(), plugin.partition_size))
    sizes = {size for size, _ in everyone}
    if len(sizes) > 1:
        differing = sorted({(host, size) for size, (host, _) in everyone})
        table = ", ".join(f"ranks on {host}: {size}" for host, size in differing)
        raise TopologyError(
            f"every node must run as many ranks: LOCAL_WORLD_SIZE differs between nodes ({table}). Launch the same "
            "number of processes on every node, or set MiCSPlugin(node_size=...)."
        )
    partitions = {partition for _, (_, partition) in everyone}
    if len(partitions) > 1:
        raise TopologyError(
            f"every rank must ask for the same partition_size, got {' and '.join(sorted(map(str, partitions)))}. Give "
            "all the same MiCSPlugin and flags."
        )
    return [host for _, (host, _) in everyone], sizes.pop()


@functools.cache  # once
def _leave_job_at_exit() -> None:
    """Destroys the process group when a script ends without `end_training`: else some launches abort (signal 6)."""
    atexit.register(_leave_job)


def _leave_job() -> None:
    # After an uncaught exception the other ranks may be inside a collective that we would wait for.
    if getattr(sys, "last_value", None) is not None:
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    # The model still holds its groups, so destroying them joins no gloo thread. One that frees the tensors of its last
    # gather once Python finalizes is ended by force as it takes the GIL, through a C++ destructor, which aborts the
    # process (torch 2.13, Python 3.11: ProcessGroupGloo::runLoop in the core file; 3 of 46 launches of one script).
    # Sleeping gives up the GIL while the thread can still have it (0 of 33).
    time.sleep(0.2)
