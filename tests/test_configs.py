"""Does accelerate accept the configs in recipes/configs, and do their sizes form partition groups?"""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

from hf_mics import Topology

CONFIGS = Path(__file__).resolve().parents[1] / "recipes" / "configs"
# machines, processes in all, ranks in a partition group
EXPECTED = {
    "cpu_2x2": (1, 4, 2),
    "gpu_1x8": (1, 8, 8),
    "gpu_4x8": (4, 32, 8),
    "gpu_16x8_span2": (16, 128, 16),
}


def test_every_config_is_checked_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_launch_reads_the_sizes_that_the_name_promises(name: str):
    """Through accelerate's own parser and defaults, as `accelerate launch --config_file` would."""
    file = str(CONFIGS / f"{name}.yaml")
    arguments, config, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", file, "x.py"]))
    num_machines, num_processes, partition_size = EXPECTED[name]
    assert config.distributed_type == DistributedType.FSDP
    assert (arguments.use_fsdp, arguments.use_parallelism_config, int(arguments.fsdp_version)) == (True, True, 2)
    assert (arguments.num_machines, arguments.num_processes) == (num_machines, num_processes)
    assert arguments.parallelism_config_dp_shard_size == partition_size
    assert arguments.parallelism_config_dp_replicate_size == num_processes // partition_size
    Topology(world_size=num_processes, node_size=num_processes // num_machines, partition_size=partition_size)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_fsdp_key_is_one_that_accelerate_launch_knows(name: str):
    """Unknown keys inside fsdp_config are dropped without a word, so that a typo would turn a setting off."""
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    known = {action.dest for action in launch_command_parser()._actions}
    assert not (set(config.fsdp_config) | set(config.parallelism_config)) - known
