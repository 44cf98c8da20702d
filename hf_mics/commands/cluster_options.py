"""Which flags describe a cluster? The same ones for every command that needs one."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from hf_mics.commands.workload_options import flag, given_or
from hf_mics.errors import ConfigError
from hf_mics.planning.cluster import Cluster
from hf_mics.planning.cluster_file import load_cluster
from hf_mics.planning.instances import INSTANCES, custom_cluster, instance_cluster

_RATES = ("gpus_per_node", "gpu_memory", "nvlink", "nic", "peak")


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --instance, --cluster, and the flags of any other cluster."""
    group = parser.add_argument_group("cluster", "one of --instance, --cluster, or all rates")
    group.add_argument("--instance", help=f"instance type, one of {', '.join(INSTANCES)}")
    group.add_argument("--cluster", metavar="FILE", help="cluster file that hf-mics measure wrote")
    group.add_argument("--gpus-per-node", type=int, help="GPUs on each node")
    group.add_argument("--gpu-memory", type=_number_of("GB"), metavar="GB", help="memory of one GPU, in GB (1e9 bytes)")
    group.add_argument(
        "--nvlink", type=_number_of("GB/s"), metavar="GB/S", help="link between a node's GPUs, GB/s of one GPU"
    )
    group.add_argument(
        "--nic", type=_number_of("Gbit/s"), metavar="GBIT/S", help="network interface of one node, Gbit/s"
    )
    group.add_argument(
        "--peak", type=_number_of("TFLOP/s"), metavar="TFLOPS", help="dense peak of one GPU at --precision, TFLOP/s"
    )


def cluster_from_options(options: argparse.Namespace, nodes: int | None) -> Cluster:
    """The cluster that the flags of `add_cluster_arguments` describe, of `nodes` nodes.

    Args:
        nodes: how many; None takes those of the cluster file, or one.

    Raises:
        ConfigError: no cluster, two at once, a rate that is missing or not positive, an unknown instance, a bad file.
    """
    given = [name for name in _RATES if getattr(options, name) is not None]
    ways = [way for way, used in (("--instance", options.instance), ("--cluster", options.cluster)) if used]
    ways += [", ".join(map(flag, given))] if given else []
    if len(ways) != 1:
        raise ConfigError(
            "expected one description of the cluster: --instance NAME, --cluster FILE, or all of "
            f"{' '.join(map(flag, _RATES))}; got {' and '.join(ways) or 'none'}."
        )
    if options.cluster:
        cluster = load_cluster(options.cluster)
        return cluster if nodes is None else cluster.with_nodes(nodes)
    if options.instance:
        return instance_cluster(options.instance, 1 if nodes is None else nodes, given_or(options.precision, "bf16"))
    if len(given) < len(_RATES):
        missing = " ".join(flag(name) for name in _RATES if name not in given)
        raise ConfigError(f"a cluster by its rates needs all of {' '.join(map(flag, _RATES))}; missing: {missing}.")
    return custom_cluster(
        nodes=1 if nodes is None else nodes,
        gpus_per_node=options.gpus_per_node,
        gpu_memory_gb=options.gpu_memory,
        peak_tflops=options.peak,
        nvlink_gb_per_s=options.nvlink,
        nic_gbit_per_s=options.nic,
    )


def _number_of(unit: str) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, in {unit}, without its unit; got {text!r}") from None

    return number
