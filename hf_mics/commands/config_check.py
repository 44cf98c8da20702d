"""Which mistakes does an accelerate config hide until, or even after, launch, and what does it say otherwise?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hf_mics.commands.config_keys import (
    FALSE,
    PARALLEL,
    TRUE,
    Config,
    as_accelerate_reads,
    int_or_none,
    is_true,
    read_config,
    section,
    unknown_keys,
)
from hf_mics.commands.config_sizes import Sizes
from hf_mics.topology import Topology

# What only FSDP version 1 reads, and what takes its place.
_VERSION_1_ONLY = {
    "fsdp_sharding_strategy": "the groups follow from dp_shard_size and dp_replicate_size",
    "fsdp_backward_prefetch": "FSDP2 always prefetches",
    "fsdp_forward_prefetch": "FSDP2 prefetches by itself",
    "fsdp_use_orig_params": "FSDP2 always keeps the original parameters",
    "fsdp_sync_module_states": "MiCS always starts from rank 0's weights",
}
_SWITCHES = (
    "fsdp_activation_checkpointing",
    "fsdp_activation_checkpointing_offload",
    "fsdp_cpu_ram_efficient_loading",
    "fsdp_offload_params",
    "fsdp_reshard_after_forward",
)
# Parallelism that MiCS does not use, and the one value that accelerate takes for it.
_BACKENDS = {"cp_backend": "torch", "sp_backend": "deepspeed"}


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
    written = read_config(file)
    config = as_accelerate_reads(written)
    report = Report(mistakes=list(unknown_keys(written)))
    report.mistakes += _kind_of_job(config)
    report.mistakes += _values_of_the_launch(config)
    report.mistakes += _fsdp(section(config, "fsdp_config"))
    report.notes += _fsdp_notes(config, section(config, "fsdp_config"))
    sizes = Sizes(config)
    report.mistakes += sizes.mistakes
    report.notes += sizes.notes
    if sizes.topology is not None:
        report.explanation += _explain(config, sizes.topology)
    return report


def _kind_of_job(config: Config) -> Iterator[str]:
    from accelerate.utils import DistributedType

    kind = config.get("distributed_type")
    if config.get("deepspeed_config") or kind == "DEEPSPEED":
        yield "DeepSpeed brings its own sharding: leave out deepspeed_config and set distributed_type: FSDP"
    elif config.get("megatron_lm_config") or kind == "MEGATRON_LM":
        yield "Megatron-LM brings its own parallelism: leave out megatron_lm_config and set distributed_type: FSDP"
    elif kind is None:
        yield "no distributed_type: set distributed_type: FSDP"
    elif kind not in [*DistributedType]:
        yield f"distributed_type is {kind!r}, and accelerate knows no such type: set distributed_type: FSDP"
    elif kind != "FSDP":
        yield f"distributed_type is {kind}, which shards nothing: set distributed_type: FSDP"
    for name in ("fsdp_config", "parallelism_config", "dynamo_config"):
        if not isinstance(config.get(name, {}), dict | None):
            yield f"{name} must hold settings, got {config[name]!r}"
    if config.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        yield f"compute_environment is {config['compute_environment']}: MiCS needs LOCAL_MACHINE"


def _values_of_the_launch(config: Config) -> Iterator[str]:
    """What accelerate takes as it stands, and stops on with a traceback, in the launch or in its processes."""
    from accelerate.utils import DynamoBackend
    from accelerate.utils.constants import TORCH_DYNAMO_MODES

    precision = config.get("mixed_precision")
    if isinstance(precision, bool):
        yield (
            f"mixed_precision is {str(precision).lower()}, which is how YAML reads no or yes without quotes: set 'no' "
            "with them, fp16 or bf16"
        )
    elif precision is not None and str(precision).lower() not in ("no", "fp16", "bf16", "fp8"):
        yield f"mixed_precision must be 'no', fp16 or bf16, got {precision!r}"
    elif str(precision).lower() == "fp8":
        yield "mixed_precision fp8 is not supported under MiCS: set bf16"
    ids = config.get("gpu_ids")
    if ids is not None and not isinstance(ids, str):
        quoted = ",".join(map(str, ids)) if isinstance(ids, list) else ids
        yield f"gpu_ids must be text, got {ids!r}: set gpu_ids: all, or numbers in quotes, '{quoted}'"
    port = config.get("main_process_port")
    if port is not None and (type(port) is not int or port not in range(2**16)):
        yield f"main_process_port must be a number from 0 to 65535, without quotes, got {port!r}"
    if str(config.get("use_cpu", False)).lower() not in TRUE + FALSE:
        yield f"use_cpu must be true or false, got {config['use_cpu']!r}"
    dynamo = section(config, "dynamo_config")
    backend = dynamo.get("dynamo_backend")
    if backend is not None and (not isinstance(backend, str) or backend.upper() not in [*DynamoBackend]):
        names = ", ".join(name.lower() for name in [*DynamoBackend][1:])
        yield f"dynamo_config: dynamo_backend must be 'no' in quotes, or one of {names}; got {backend!r}"
    mode = dynamo.get("dynamo_mode", "default")
    if mode not in TORCH_DYNAMO_MODES:
        yield f"dynamo_config: dynamo_mode must be one of {', '.join(TORCH_DYNAMO_MODES)}, got {mode!r}"
    for key, value in dynamo.items():
        if key.startswith("dynamo_use_") and str(value).lower() not in TRUE + FALSE:
            yield f"dynamo_config: {key} must be true or false, got {value!r}"
    parallel = section(config, "parallelism_config")
    for name, only in _BACKENDS.items():
        key = PARALLEL + name
        if parallel.get(key, only) != only:
            yield f"parallelism_config: {key} must be {only}, or left out, got {parallel[key]!r}"


def _fsdp(fsdp: Config) -> Iterator[str]:
    if not fsdp:
        yield "no fsdp_config: add it with fsdp_version: 2"
    elif "fsdp_version" not in fsdp:
        yield "fsdp_config: no fsdp_version, and accelerate's default is 1: set fsdp_version: 2"
    elif str(fsdp["fsdp_version"]) != "2":
        yield f"fsdp_config: fsdp_version is {fsdp['fsdp_version']}, MiCS is built on 2: set fsdp_version: 2"
    state = str(fsdp.get("fsdp_state_dict_type", "SHARDED_STATE_DICT"))
    if state not in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        yield f"fsdp_config: fsdp_state_dict_type is {state}; version 2 knows SHARDED_STATE_DICT and FULL_STATE_DICT"
    for key, value in fsdp.items():
        if key in _SWITCHES and str(value).lower() not in TRUE + FALSE:
            yield f"fsdp_config: {key} must be true or false, got {value!r}"
    if is_true(fsdp.get("fsdp_activation_checkpointing_offload", False)) and not is_true(
        fsdp.get("fsdp_activation_checkpointing", False)
    ):
        yield "fsdp_config: fsdp_activation_checkpointing_offload needs fsdp_activation_checkpointing: true"
    # Both are true by default, and taken as Python takes them: a quoted "false" is true.
    if fsdp.get("fsdp_cpu_ram_efficient_loading", True) and not fsdp.get("fsdp_sync_module_states", True):
        yield (
            "fsdp_config: accelerate refuses fsdp_sync_module_states false with fsdp_cpu_ram_efficient_loading, which "
            "is true unless it is set: leave fsdp_sync_module_states out"
        )
    names = fsdp.get("fsdp_transformer_layer_cls_to_wrap")
    if names is not None and not isinstance(names, str):
        text = ",".join(map(str, names)) if isinstance(names, list) else "GPT2Block"
        yield (
            f"fsdp_config: fsdp_transformer_layer_cls_to_wrap must be names with commas between them, got {names!r}: "
            f"set {text}"
        )
    size = fsdp.get("fsdp_min_num_params", 0)
    number = int_or_none(size)
    if number is None or number < 0:
        yield f"fsdp_config: fsdp_min_num_params must be a whole number in digits, such as 100000000, got {size!r}"
    policy = str(fsdp.get("fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"))
    if policy not in ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"):
        yield (
            "fsdp_config: fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP, SIZE_BASED_WRAP or NO_WRAP, got "
            f"{policy}"
        )


def _fsdp_notes(config: Config, fsdp: Config) -> Iterator[str]:
    for key, instead in _VERSION_1_ONLY.items():
        if key in fsdp:
            yield f"{key} is read by FSDP version 1 only; {instead}"
    if str(fsdp.get("fsdp_sharding_strategy", "")).startswith("HYBRID"):
        yield "HYBRID_SHARD says nothing to version 2: without dp_shard_size a node is the partition group"
    if str(fsdp.get("fsdp_reshard_after_forward", "true")).lower() in FALSE:
        yield "fsdp_reshard_after_forward false: parameters stay gathered until backward, which saves a gather"
    if str(fsdp.get("fsdp_state_dict_type", "SHARDED_STATE_DICT")) == "SHARDED_STATE_DICT":
        yield "SHARDED_STATE_DICT checkpoints are no files that from_pretrained reads: `hf-mics export` makes them such"
    else:
        yield "FULL_STATE_DICT gathers the whole model on rank 0 at every checkpoint"
    if is_true(config.get("use_cpu", False)):
        yield "use_cpu does not reach FSDP's processes; MiCS finds out by itself whether there is a GPU"
    if str(config.get("mixed_precision") or "no").lower() == "no":
        yield "mixed_precision is 'no': fp32 computes and communicates in 4 bytes; on GPUs set bf16"
    if str(config.get("mixed_precision")).lower() == "fp16":
        yield "mixed_precision fp16: gradients travel in fp16 and are scaled; partial sums are kept in fp32"
    if int_or_none(config.get("num_machines")) not in (None, 1) and not config.get("main_process_ip"):
        yield "no main_process_ip: pass --main_process_ip and --machine_rank on every machine"


def _explain(config: Config, topology: Topology) -> Iterator[str]:
    fsdp = section(config, "fsdp_config")
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
    checkpointing = is_true(fsdp.get("fsdp_activation_checkpointing", False))
    yield f"activations: {'recomputed in backward' if checkpointing else 'kept'}"
    if is_true(fsdp.get("fsdp_offload_params", False)):
        yield "parameters and optimizer state live in host memory"


def _wrapping(fsdp: Config) -> str:
    names = fsdp.get("fsdp_transformer_layer_cls_to_wrap")
    policy = str(fsdp.get("fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"))
    size = fsdp.get("fsdp_min_num_params") or 0
    if policy == "NO_WRAP":
        return "found by hf_mics (NO_WRAP is read as no wish)"
    if policy == "SIZE_BASED_WRAP":
        return f"modules of more than {size} parameters" if size else "found by hf_mics"
    return f"every {names}" if names else "found by hf_mics"
