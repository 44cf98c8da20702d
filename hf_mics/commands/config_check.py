"""Which mistakes does an accelerate config hide until, or even after, launch, and what does it say otherwise?

The keys that accelerate knows are asked of the installed accelerate, which refuses unknown ones at the top level with
a traceback, and drops those below `fsdp_config` and `parallelism_config` without a word.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_mics.errors import ConfigError, TopologyError
from hf_mics.topology import Topology

# As accelerate's str_to_bool reads them; an empty value is neither.
_TRUE, _FALSE = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")
# What only FSDP version 1 reads, and what takes its place.
_VERSION_1_ONLY = {
    "fsdp_sharding_strategy": "the groups follow from dp_shard_size and dp_replicate_size",
    "fsdp_backward_prefetch": "FSDP2 always prefetches",
    "fsdp_forward_prefetch": "FSDP2 prefetches by itself",
    "fsdp_use_orig_params": "FSDP2 always keeps the original parameters",
    "fsdp_sync_module_states": "MiCS always starts from rank 0's weights",
}
_PARALLEL = "parallelism_config_"
_OTHER_PARALLELISM = ("tp_size", "cp_size", "sp_size")


@dataclass
class Report:
    """What was found: what the config does, what to know about it, and what is wrong."""

    explanation: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)


def check_config(file: str) -> Report:
    """Reads and checks an accelerate config.

    Raises:
        ConfigError: the file cannot be read, or holds no settings at all.
    """
    config = _read(file)
    report = Report()
    known_top, known_flags = _known_keys()
    top = {"fp16": "", "dynamo_backend": "", **dict.fromkeys(known_top, "")}
    report.mistakes += _unknown(config, top, "", "accelerate refuses it")
    for section in ("fsdp_config", "parallelism_config"):
        report.mistakes += _unknown(
            _section(config, section), known_flags, f"{section}: ", "accelerate drops it without a word"
        )
    report.mistakes += _kind_of_job(config)
    report.mistakes += _fsdp(_section(config, "fsdp_config"))
    report.notes += _fsdp_notes(config, _section(config, "fsdp_config"))
    sizes = _Sizes(config)
    report.mistakes += sizes.mistakes
    report.notes += sizes.notes
    if sizes.topology is not None:
        report.explanation += _explain(config, sizes.topology)
    return report


def _read(file: str) -> dict[str, Any]:
    try:
        text = Path(file).read_text(encoding="utf-8")
        config = json.loads(text) if file.endswith(".json") else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read {file!r}: {error.strerror}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file!r} is not a config file: expected YAML or JSON, got an error: {error}") from None
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ConfigError(
            f"{file!r} is not an accelerate config: expected settings, one `key: value` a line, as `accelerate config` "
            f"or `hf-mics config` writes them; got {type(config).__name__}."
        )
    return config


def _known_keys() -> tuple[set[str], set[str]]:
    """Top-level keys, and flags of `accelerate launch`, which the keys of sections must be."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    parsed, _ = launch_command_parser().parse_known_args(["script.py"])
    return {entry.name for entry in dataclasses.fields(ClusterConfig)}, set(vars(parsed))


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return {str(key): value for key, value in section.items()} if isinstance(section, dict) else {}


def _unknown(found: Iterable[str], known: Iterable[str], where: str, consequence: str) -> Iterator[str]:
    choices = list(known)
    for key in found:
        if key not in choices:
            near = difflib.get_close_matches(key, choices, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else "; leave it out"
            yield f"{where}unknown key {key} ({consequence}){hint}"


def _kind_of_job(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("distributed_type")
    if config.get("deepspeed_config") or kind == "DEEPSPEED":
        yield "DeepSpeed brings its own sharding: leave out deepspeed_config and set distributed_type: FSDP"
    elif kind is None:
        yield "no distributed_type: set distributed_type: FSDP"
    elif kind != "FSDP":
        yield f"distributed_type is {kind}, which shards nothing: set distributed_type: FSDP"
    for name in ("fsdp_config", "parallelism_config"):
        if not isinstance(config.get(name, {}), dict | None):
            yield f"{name} must hold settings, got {config[name]!r}"
    if config.get("megatron_lm_config"):
        yield "Megatron-LM brings its own parallelism: leave out megatron_lm_config"
    if config.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        yield f"compute_environment is {config['compute_environment']}: MiCS needs LOCAL_MACHINE"
    if str(config.get("mixed_precision") or "no").lower() not in ("no", "fp16", "bf16", "fp8"):
        yield f"mixed_precision must be 'no', fp16 or bf16, got {config['mixed_precision']!r}"
    if str(config.get("mixed_precision")).lower() == "fp8":
        yield "mixed_precision fp8 is not supported under MiCS: set bf16"


def _fsdp(fsdp: Mapping[str, Any]) -> Iterator[str]:
    if not fsdp:
        yield "no fsdp_config: add it with fsdp_version: 2"
    elif "fsdp_version" not in fsdp:
        yield "fsdp_config: no fsdp_version, and accelerate's default is 1: set fsdp_version: 2"
    elif str(fsdp["fsdp_version"]) != "2":
        yield f"fsdp_config: fsdp_version is {fsdp['fsdp_version']}, MiCS is built on 2: set fsdp_version: 2"
    state = str(fsdp.get("fsdp_state_dict_type", "SHARDED_STATE_DICT"))
    if state not in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        yield (f"fsdp_config: fsdp_state_dict_type is {state}; version 2 knows SHARDED_STATE_DICT and FULL_STATE_DICT")
    for key, value in fsdp.items():
        if _is_switch(key) and str(value).lower() not in _TRUE + _FALSE:
            yield f"fsdp_config: {key} must be true or false, got {value!r}"
    if _is_true(fsdp.get("fsdp_activation_checkpointing_offload", False)) and not _is_true(
        fsdp.get("fsdp_activation_checkpointing", False)
    ):
        yield "fsdp_config: fsdp_activation_checkpointing_offload needs fsdp_activation_checkpointing: true"
    # Both are true by default, and taken as Python takes them: a quoted "false" is true.
    if fsdp.get("fsdp_cpu_ram_efficient_loading", True) and not fsdp.get("fsdp_sync_module_states", True):
        yield (
            "fsdp_config: accelerate refuses fsdp_sync_module_states false with fsdp_cpu_ram_efficient_loading, which "
            "is true unless it is set: leave fsdp_sync_module_states out"
        )
    policy = str(fsdp.get("fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"))
    if policy not in ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"):
        yield (
            "fsdp_config: fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP, SIZE_BASED_WRAP or NO_WRAP, got "
            f"{policy}"
        )


def _is_switch(key: str) -> bool:
    names = ("activation_checkpointing", "activation_checkpointing_offload", "cpu_ram_efficient_loading")
    return key.removeprefix("fsdp_") in (*names, "offload_params", "reshard_after_forward")


def _is_true(value: Any) -> bool:
    return str(value).lower() in _TRUE


def _fsdp_notes(config: Mapping[str, Any], fsdp: Mapping[str, Any]) -> Iterator[str]:
    for key, instead in _VERSION_1_ONLY.items():
        if key in fsdp:
            yield f"{key} is read by FSDP version 1 only; {instead}"
    if str(fsdp.get("fsdp_sharding_strategy", "")).startswith("HYBRID"):
        yield "HYBRID_SHARD says nothing to version 2: without dp_shard_size a node is the partition group"
    if str(fsdp.get("fsdp_reshard_after_forward", "true")).lower() in _FALSE:
        yield "fsdp_reshard_after_forward false: parameters stay gathered until backward, which saves a gather"
    if str(fsdp.get("fsdp_state_dict_type", "SHARDED_STATE_DICT")) == "SHARDED_STATE_DICT":
        yield "SHARDED_STATE_DICT checkpoints are no files that from_pretrained reads: `hf-mics export` makes them such"
    else:
        yield "FULL_STATE_DICT gathers the whole model on rank 0 at every checkpoint"
    if _is_true(config.get("use_cpu", False)):
        yield "use_cpu does not reach FSDP's processes; MiCS finds out by itself whether there is a GPU"
    if str(config.get("mixed_precision") or "no").lower() == "no":
        yield "mixed_precision is 'no': fp32 computes and communicates in 4 bytes; on GPUs set bf16"
    if str(config.get("mixed_precision")).lower() == "fp16":
        yield "mixed_precision fp16: gradients travel in fp16 and are scaled; partial sums are kept in fp32"
    if int_or_none(config.get("num_machines")) not in (None, 1) and not config.get("main_process_ip"):
        yield "no main_process_ip: pass --main_process_ip and --machine_rank on every machine"


class _Sizes:
    """The groups that the config asks for, if they form."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.mistakes: list[str] = []
        self.notes: list[str] = []
        self.topology: Topology | None = None
        section = _section(config, "parallelism_config")
        self._check_other_parallelism(section)
        machines = self._count("num_machines", config.get("num_machines", 1))
        processes = self._count("num_processes", config.get("num_processes"), missing="the number of all GPUs")
        shard = self._optional_count(section, "dp_shard_size")
        replicate = self._optional_count(section, "dp_replicate_size")
        if self.mistakes or machines is None or processes is None:
            return
        if processes % machines:
            self.mistakes.append(
                f"num_processes counts the GPUs of all machines together, and must be a multiple of num_machines: got "
                f"{processes} and {machines}"
            )
            return
        self._check_machine(config, machines, processes // machines)
        self._form_groups(machines, processes, shard, replicate)

    def _check_machine(self, config: Mapping[str, Any], machines: int, node_size: int) -> None:
        rank = config.get("machine_rank")
        if rank is not None and int_or_none(rank) not in range(machines):
            self.mistakes.append(f"machine_rank must be 0 to {machines - 1} with num_machines {machines}, got {rank!r}")
        ids = config.get("gpu_ids")
        if ids is not None and str(ids) != "all" and len(str(ids).split(",")) < node_size:
            self.mistakes.append(
                f"gpu_ids names {len(str(ids).split(','))} GPUs, and num_processes over num_machines puts {node_size} "
                "ranks on a node: set gpu_ids: all, or fewer processes"
            )

    def _form_groups(self, machines: int, processes: int, shard: int | None, replicate: int | None) -> None:
        if shard == 1:
            self.mistakes.append(
                "dp_shard_size is 1, which accelerate refuses: leave parallelism_config out and launch with -m hf_mics "
                "--partition-size 1"
            )
            return
        node_size = processes // machines
        if shard is None and replicate is not None:
            if processes % replicate:
                self.mistakes.append(f"dp_replicate_size {replicate} does not divide num_processes {processes}")
                return
            self.mistakes.append(
                f"dp_replicate_size without dp_shard_size: set dp_shard_size to {processes // replicate}"
            )
            return
        if shard is None:
            shard = node_size
            self.notes.append(f"no dp_shard_size: a node of {node_size} is the partition group")
        elif shard * (replicate or 1) != processes:
            fitting = f"{processes // shard}" if processes % shard == 0 else "another"
            self.mistakes.append(
                f"dp_shard_size x dp_replicate_size must be num_processes: got {shard} x {replicate or 1} = "
                f"{shard * (replicate or 1)}, expected {processes}; set dp_replicate_size to {fitting}"
            )
            return
        try:
            self.topology = Topology(world_size=processes, node_size=node_size, partition_size=shard)
        except TopologyError as error:
            self.mistakes.append(str(error))

    def _check_other_parallelism(self, section: Mapping[str, Any]) -> None:
        for name in _OTHER_PARALLELISM:
            value = section.get(_PARALLEL + name, 1)
            if int_or_none(value) != 1:
                self.mistakes.append(f"{_PARALLEL}{name} is {value!r}: MiCS shards data parallelism only, leave it out")

    def _optional_count(self, section: Mapping[str, Any], name: str) -> int | None:
        key = _PARALLEL + name
        return self._count(key, section[key]) if key in section else None

    def _count(self, name: str, value: Any, missing: str = "") -> int | None:
        if value is None and missing:
            self.mistakes.append(f"no {name}: set it to {missing}")
            return None
        found = int_or_none(value)
        if found is None or found < 1:
            self.mistakes.append(f"{name} must be a positive integer, got {value!r}")
            return None
        return found


def int_or_none(value: Any) -> int | None:
    """An integer, also where the file quotes it."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        return int(value)
    except ValueError:
        return None


def _explain(config: Mapping[str, Any], topology: Topology) -> Iterator[str]:
    fsdp = _section(config, "fsdp_config")
    p, r = topology.partition_size, topology.replication_size
    spans = f", each over {topology.nodes_per_partition} nodes" if topology.nodes_per_partition > 1 else ""
    yield (
        f"{topology.world_size} ranks, {topology.node_size} on each node (nodes: {topology.node_count}); partition "
        f"groups: {r}, of {p} ranks{spans}"
    )
    yield topology.draw()
    staged = "in two stages, between nodes and then inside them" if topology.is_hierarchical else "in one stage"
    yield f"hop 1, every micro-step: parameters gathered and gradients scattered in groups of {p}, {staged}"
    yield (
        f"hop 2, every optimizer step: gradient shards all-reduced over {r} groups"
        if r > 1
        else "no hop 2: one group holds all ranks"
    )
    yield f"layers: {_wrapping(fsdp)}"
    yield f"each GPU holds 1/{p} of parameters, gradients and optimizer state, in fp32"
    checkpointing = _is_true(fsdp.get("fsdp_activation_checkpointing", False))
    yield f"activations: {'recomputed in backward' if checkpointing else 'kept'}"
    if _is_true(fsdp.get("fsdp_offload_params", False)):
        yield "parameters and optimizer state live in host memory"


def _wrapping(fsdp: Mapping[str, Any]) -> str:
    names = fsdp.get("fsdp_transformer_layer_cls_to_wrap")
    policy = str(fsdp.get("fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"))
    size = fsdp.get("fsdp_min_num_params") or 0
    rules: dict[str, Callable[[], str]] = {
        "SIZE_BASED_WRAP": lambda: f"modules of more than {size} parameters" if size else "found by hf_mics",
        "NO_WRAP": lambda: "found by hf_mics (NO_WRAP is read as no wish)",
        "TRANSFORMER_BASED_WRAP": lambda: f"every {names}" if names else "found by hf_mics",
    }
    return rules.get(policy, rules["TRANSFORMER_BASED_WRAP"])()
