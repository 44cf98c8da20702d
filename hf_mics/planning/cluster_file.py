"""How is a cluster written down? The JSON or YAML file that `hf-mics measure` writes and that plans take.

name, nodes, gpus_per_node, backend
accelerator: {name, memory_bytes, peak_flops_per_s}
compute_efficiency: [low, high]
update_bytes_per_s: [low, high] or null
intra_node, inter_node: {bandwidth_bytes_per_s: [low, high], latency_s: [low, high]}, inter_node null on one node
collectives: {"all_gather/intra_node": link, ...}, where phases differ
sources: {field: where it comes from}
measurements: what was measured, point by point; not read
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import yaml

from hf_mics.errors import ConfigError
from hf_mics.meter import Phase
from hf_mics.planning.cluster import Accelerator, Cluster, Lane, Link, Range
from hf_mics.traffic import Backend

_REQUIRED = {"name", "nodes", "gpus_per_node", "accelerator", "intra_node", "inter_node", "compute_efficiency"}
_OPTIONAL = {"update_bytes_per_s", "ring_lockstep", "backend", "collectives", "sources", "measurements"}


def load_cluster(path: str | Path) -> Cluster:
    """Reads a cluster file.

    Raises:
        ConfigError: it cannot be read, is neither JSON nor YAML, or is not a cluster; the message names the entry.
    """
    try:
        # YAML 1.1 reads JSON too, but takes 1e-05 for a string.
        text = Path(path).read_text()
        content = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"No cluster file: cannot read {str(path)!r}: {error}") from None
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: expected a cluster as hf-mics measure writes it (JSON or YAML): {error}") from None
    return _cluster(str(path), _fields(str(path), content, _REQUIRED, _OPTIONAL))


def save_cluster(
    cluster: Cluster, path: str | Path, *, measurements: Mapping[str, Any] | None = None, force: bool = False
) -> None:
    """Writes `cluster`, and `measurements` beside it: YAML if `path` ends in .yaml or .yml, else JSON.

    Raises:
        ConfigError: the file exists and `force` is False, or it cannot be written.
    """
    path = Path(path)
    content = _content(cluster) | ({"measurements": dict(measurements)} if measurements else {})
    is_yaml = path.suffix in (".yaml", ".yml")
    text = yaml.safe_dump(content, sort_keys=False) if is_yaml else json.dumps(content, indent=2) + "\n"
    try:
        with path.open("w" if force else "x") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists and is not overwritten; choose another name or add --force.") from None
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error}") from None


def _content(cluster: Cluster) -> dict[str, Any]:
    device = cluster.accelerator
    return {
        "name": cluster.name,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "backend": cluster.backend,
        "accelerator": {
            "name": device.name,
            "memory_bytes": device.memory_bytes,
            "peak_flops_per_s": device.peak_flops_per_s,
        },
        "compute_efficiency": _ends(cluster.compute_efficiency),
        "update_bytes_per_s": None if cluster.update_bytes_per_s is None else _ends(cluster.update_bytes_per_s),
        "ring_lockstep": _ends(cluster.ring_lockstep),
        "intra_node": _link_content(cluster.intra_node),
        "inter_node": None if cluster.inter_node is None else _link_content(cluster.inter_node),
        "collectives": {f"{phase}/{lane}": _link_content(link) for (phase, lane), link in cluster.collectives.items()},
        "sources": dict(cluster.sources),
    }


def _link_content(link: Link) -> dict[str, list[float]]:
    return {"bandwidth_bytes_per_s": _ends(link.bandwidth_bytes_per_s), "latency_s": _ends(link.latency_s)}


def _ends(found: Range) -> list[float]:
    return [found.low, found.high]


def _cluster(where: str, content: Mapping[str, Any]) -> Cluster:
    device = _fields(f"{where}: accelerator", content["accelerator"], {"name", "memory_bytes", "peak_flops_per_s"})
    update, inter = content.get("update_bytes_per_s"), content["inter_node"]
    collectives = content.get("collectives") or {}
    return Cluster(
        name=str(content["name"]),
        nodes=content["nodes"],
        gpus_per_node=content["gpus_per_node"],
        backend=cast(Backend, content.get("backend", "nccl")),
        accelerator=Accelerator(**{**device, "name": str(device["name"])}),
        compute_efficiency=_range(f"{where}: compute_efficiency", content["compute_efficiency"]),
        update_bytes_per_s=None if update is None else _range(f"{where}: update_bytes_per_s", update),
        ring_lockstep=_range(f"{where}: ring_lockstep", content.get("ring_lockstep", [0.0, 1.0])),
        intra_node=_link(f"{where}: intra_node", content["intra_node"]),
        inter_node=None if inter is None else _link(f"{where}: inter_node", inter),
        collectives={
            _phase_and_lane(where, name): _link(f"{where}: {name}", link) for name, link in dict(collectives).items()
        },
        sources={str(name): str(source) for name, source in dict(content.get("sources") or {}).items()},
    )


def _phase_and_lane(where: str, name: str) -> tuple[Phase, Lane]:
    phase, _, lane = str(name).partition("/")
    if phase not in get_args(Phase) or lane not in get_args(Lane):
        raise ConfigError(
            f"{where}: collectives are named PHASE/LANE, PHASE one of {', '.join(get_args(Phase))} and LANE one of "
            f"{', '.join(get_args(Lane))}; got {name!r}."
        )
    return cast(Phase, phase), cast(Lane, lane)


def _link(where: str, content: Any) -> Link:
    fields = _fields(where, content, {"bandwidth_bytes_per_s", "latency_s"})
    return Link(**{name: _range(f"{where}: {name}", value) for name, value in fields.items()})


def _range(where: str, value: Any) -> Range:
    ends = value if isinstance(value, list) else [value, value]
    if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        raise ConfigError(f"{where}: expected a number or [low, high], got {value!r}.")
    try:
        return Range(*ends)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _fields(where: str, content: Any, required: set[str], optional: set[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected a cluster as hf-mics measure writes it, got {type(content).__name__}.")
    missing, unknown = required - content.keys(), content.keys() - required - (optional or set())
    if missing or unknown:
        wrong = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        wrong += [f"has unknown {', '.join(sorted(map(str, unknown)))}"] if unknown else []
        raise ConfigError(f"{where}: not a cluster as hf-mics measure writes it: it {' and '.join(wrong)}.")
    return content
