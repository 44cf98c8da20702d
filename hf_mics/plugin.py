"""What can be set about MiCS under Accelerate, and which sizes follow from the launcher's config?"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from accelerate import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin

from hf_mics._hf_compat import called_from_stock_init, is_switched_on
from hf_mics.engine import WireDtype, check_wire_dtype
from hf_mics.errors import ConfigError, TopologyError
from hf_mics.topology import Topology


@dataclass
class MiCSPlugin(FullyShardedDataParallelPlugin):
    """Accelerate's FSDP plugin with MiCS's settings; every field of the base class keeps its meaning.

    Hand it to `MiCSAccelerator(mics_plugin=...)`, or to `Accelerator(fsdp_plugin=...)` under `python -m hf_mics`. The
    stock `Accelerator` refuses it, because it would train plain FSDP2 without a word.

    Args:
        partition_size: ranks in a partition group; default the config's `dp_shard_size`, else one node.
        node_size: ranks per node; default `LOCAL_WORLD_SIZE` from the launcher.
        hierarchical: two-stage collectives where a partition group spans nodes.
        gradient_wire_dtype: what travels in hops 1 and 2: "auto" (what stock accelerate would send), "float32" or
            "bfloat16". Partial sums are added up in fp32 in any case.

    Raises:
        ConfigError: FSDP version 1, or a value that is not one of the above.
    """

    knows_mics: ClassVar[bool] = True

    partition_size: int | None = None
    node_size: int | None = None
    hierarchical: bool = True
    gradient_wire_dtype: WireDtype = "auto"

    def __post_init__(self) -> None:
        self._check_version()
        super().__post_init__()
        for name in ("partition_size", "node_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a positive integer or None, got {value!r}.")
        check_wire_dtype(self.gradient_wire_dtype)

    def _check_version(self) -> None:
        version: int | None = self.__dict__.get("fsdp_version")
        if version is None:
            version = int(os.environ.get("FSDP_VERSION", "2"))
        if version != 2:
            raise ConfigError(
                f"MiCS needs FSDP version 2, got version {version}. Set `fsdp_version: 2` under `fsdp_config` in the "
                "accelerate config, or leave fsdp_version out of the plugin."
            )
        self.fsdp_version = 2

    def __getattribute__(self, name: str) -> Any:
        if name == "fsdp_version" and called_from_stock_init(1):
            raise ConfigError(
                "a MiCSPlugin was given to accelerate's own Accelerator, which would train plain FSDP2 (or, on CPU, "
                "DistributedDataParallel). Expected MiCSAccelerator(mics_plugin=...), or the unchanged script under "
                "`accelerate launch ... -m hf_mics script.py`."
            )
        return super().__getattribute__(name)

    def set_auto_wrap_policy(self, model: Any) -> None:
        """Leaves the policy as it was given: `hf_mics.sharding` reads it, and accelerate's reading is for FSDP1."""

    def settings(self) -> dict[str, Any]:
        """What MiCS adds to accelerate's plugin, by name."""
        stock = {field.name for field in dataclasses.fields(FullyShardedDataParallelPlugin)}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in stock}

    @classmethod
    def from_stock(cls, plugin: FullyShardedDataParallelPlugin, **settings: Any) -> MiCSPlugin:
        """A MiCSPlugin with everything that accelerate's own plugin says, and `settings` for MiCS.

        Raises:
            ConfigError: the plugin is of FSDP version 1, or a setting is wrong.
        """
        mics = cls(fsdp_version=plugin.fsdp_version, **settings)
        for field in dataclasses.fields(FullyShardedDataParallelPlugin):
            setattr(mics, field.name, getattr(plugin, field.name))
        return mics


# What the flags of `python -m hf_mics` say, by the plugin's names. Kept here so that they reach every accelerator of
# the script, also a MiCSAccelerator that it makes itself.
_RUNNER_FLAGS: dict[str, Any] = {}
_FLAG_NAMES = {
    "partition_size": "--partition-size",
    "node_size": "--node-size",
    "hierarchical": "--flat",
    "gradient_wire_dtype": "--gradient-wire-dtype",
}


def keep_runner_flags(flags: dict[str, Any]) -> None:
    """From now on `flags`, settings by name, hold for every accelerator of this process.

    Raises:
        ConfigError: a value that a MiCSPlugin does not take.
    """
    MiCSPlugin(**flags)
    _RUNNER_FLAGS.clear()
    _RUNNER_FLAGS.update(flags)


def with_runner_flags(plugin: FullyShardedDataParallelPlugin | None) -> MiCSPlugin:
    """The settings of `plugin`, or of the accelerate config, with the runner's flags where it leaves the default.

    A MiCSPlugin is changed in place, as accelerate itself changes the plugins that it is given.

    Raises:
        ConfigError: `plugin` is a MiCSPlugin that contradicts a flag, or is of FSDP version 1.
    """
    if plugin is None:
        return MiCSPlugin(**_RUNNER_FLAGS)
    if not isinstance(plugin, MiCSPlugin):
        return MiCSPlugin.from_stock(plugin, **_RUNNER_FLAGS)
    own = plugin.settings()
    defaults = {field.name: field.default for field in dataclasses.fields(MiCSPlugin)}
    wrong = [name for name, value in _RUNNER_FLAGS.items() if own[name] not in (defaults[name], value)]
    if wrong:
        raise ConfigError(
            "the script's MiCSPlugin contradicts the flags of `-m hf_mics`: "
            + ", ".join(f"{name}={own[name]!r} against {_FLAG_NAMES[name]} ({_RUNNER_FLAGS[name]!r})" for name in wrong)
            + ". Leave the flag out, or the setting of the plugin."
        )
    for name, value in _RUNNER_FLAGS.items():
        setattr(plugin, name, value)
    return plugin


class MiCSParallelismConfig(ParallelismConfig):
    """Accelerate's ParallelismConfig with both data-parallel axes always in the mesh.

    A size-1 axis must stay: FSDP2 keeps sharded fp32 partial sums only on a mesh of (replicate, shard), and accelerate
    rejects `dp_shard_size=1`, which is MiCS with partition groups of one rank.
    """

    @property
    def dp_replicate_enabled(self) -> bool:
        """Always: see the class."""
        return True

    @property
    def dp_shard_enabled(self) -> bool:
        """Always: see the class."""
        return True


@dataclass(frozen=True, kw_only=True)
class RequestedSizes:
    """Data-parallel sizes as the user or the launcher's config gave them; None where nothing was said."""

    shard: int | None
    replicate: int | None


def requested_sizes(config: ParallelismConfig | None) -> RequestedSizes:
    """The data-parallel sizes of a ParallelismConfig, else of the launcher's environment.

    Raises:
        ConfigError: tensor, context or sequence parallelism is asked for.
    """
    if config is None and is_switched_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        config = ParallelismConfig()
    if config is None:
        return RequestedSizes(shard=None, replicate=None)
    others = {name: getattr(config, name) for name in ("tp_size", "cp_size", "sp_size") if getattr(config, name) > 1}
    if others:
        raise ConfigError(
            "MiCS shards over data-parallel ranks only; expected tp_size, cp_size and sp_size of 1, got "
            + ", ".join(f"{name}={value}" for name, value in others.items())
            + ". Remove them from parallelism_config."
        )
    if config.dp_shard_size == config.dp_replicate_size == 1:
        return RequestedSizes(shard=None, replicate=None)
    return RequestedSizes(shard=config.dp_shard_size, replicate=config.dp_replicate_size)


def resolve_topology(plugin: MiCSPlugin, sizes: RequestedSizes, *, world_size: int, node_size: int) -> Topology:
    """The topology: partition size from the plugin, else from the config, else one node.

    Raises:
        ConfigError: the config's sizes do not multiply to the number of processes.
        TopologyError: the sizes form no valid groups.
    """
    if plugin.partition_size is not None:
        partition_size, source = plugin.partition_size, "MiCSPlugin.partition_size"
    elif sizes.shard is not None:
        replicate = sizes.replicate or 1
        if sizes.shard * replicate != world_size:
            fitting = f"parallelism_config_dp_replicate_size to {world_size // sizes.shard}"
            if world_size % sizes.shard:
                fitting = f"parallelism_config_dp_shard_size to {world_size} and dp_replicate_size to 1"
            raise ConfigError(
                "dp_shard_size x dp_replicate_size must equal num_processes: got "
                f"{sizes.shard} x {replicate} = {sizes.shard * replicate}, expected {world_size}. In the accelerate "
                f"config set {fitting}, or num_processes to {sizes.shard * replicate}."
            )
        partition_size, source = sizes.shard, "dp_shard_size of the config"
    else:
        partition_size, source = node_size, "the node size, which is the default"
    try:
        return Topology(world_size=world_size, node_size=node_size, partition_size=partition_size)
    except TopologyError as error:
        raise TopologyError(f"{error} (partition_size came from {source}.)") from None
