"""How is a cluster written down? The JSON or YAML file that `hf-mics measure` writes and that plans take.

name, nodes, gpus_per_node, backend
accelerator: {name, memory_bytes, peak_flops_per_s}
compute_efficiency: [low, high] or, where one value was found most often, [low, typical, high], as all ranges
head_efficiency, update_bytes_per_s, update_s_per_tensor: range or null
intra_node, inter_node: {bandwidth_bytes_per_s: range, latency_s: range}, inter_node null on one node
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
from hf_mics.planning.new_file import write_new
from hf_mics.traffic import Backend

_REQUIRED = {"name", "nodes", "gpus_per_node", "accelerator", "intra_node", "inter_node", "compute_efficiency"}
_MAYBE_KNOWN = ("head_efficiency", "update_bytes_per_s", "update_s_per_tensor")
_OPTIONAL = {*_MAYBE_KNOWN, "ring_lockstep", "backend", "collectives", "sources", "measurements"}


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
        raise ConfigError(f"no cluster file: cannot read {str(path)!r}: {error}") from None
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: expected a cluster as hf-mics measure writes it (JSON or YAML): {error}") from None
    try:
        return _cluster(_fields("", content, _REQUIRED, _OPTIONAL))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


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
    write_new(path, text, force=force)


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
        **{name: None if (found := getattr(cluster, name)) is None else _ends(found) for name in _MAYBE_KNOWN},
        "ring_lockstep": _ends(cluster.ring_lockstep),
        "intra_node": _link_content(cluster.intra_node),
        "inter_node": None if cluster.inter_node is None else _link_content(cluster.inter_node),
        "collectives": {f"{phase}/{lane}": _link_content(link) for (phase, lane), link in cluster.collectives.items()},
        "sources": dict(cluster.sources),
    }


def _link_content(link: Link) -> dict[str, list[float]]:
    return {"bandwidth_bytes_per_s": _ends(link.bandwidth_bytes_per_s), "latency_s": _ends(link.latency_s)}


def _ends(found: Range) -> list[float]:
    return [found.low, found.high] if found.typical is None else [found.low, found.typical, found.high]


def _cluster(content: Mapping[str, Any]) -> Cluster:
    device = _fields("accelerator", content["accelerator"], {"name", "memory_bytes", "peak_flops_per_s"})
    inter = content["inter_node"]
    collectives, sources = (_entries(name, content.get(name)) for name in ("collectives", "sources"))
    return Cluster(
        name=str(content["name"]),
        nodes=content["nodes"],
        gpus_per_node=content["gpus_per_node"],
        backend=cast(Backend, content.get("backend", "nccl")),
        accelerator=Accelerator(**{**device, "name": str(device["name"])}),
        compute_efficiency=_range("compute_efficiency", content["compute_efficiency"]),
        **{name: _range(name, content[name]) for name in _MAYBE_KNOWN if content.get(name) is not None},
        ring_lockstep=_range("ring_lockstep", content.get("ring_lockstep", [0.0, 1.0])),
        intra_node=_link("intra_node", content["intra_node"]),
        inter_node=None if inter is None else _link("inter_node", inter),
        collectives={_phase_and_lane(name): _link(name, link) for name, link in collectives.items()},
        sources={str(name): str(source) for name, source in sources.items()},
    )


def _entries(where: str, content: Any) -> Mapping[str, Any]:
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{where}: expected entries by name, got {content!r}.")
    return content or {}


def _phase_and_lane(name: str) -> tuple[Phase, Lane]:
    phase, _, lane = str(name).partition("/")
    if phase not in get_args(Phase) or lane not in get_args(Lane):
        raise ConfigError(
            f"collectives are named PHASE/LANE, PHASE one of {', '.join(get_args(Phase))} and LANE one of "
            f"{', '.join(get_args(Lane))}; got {name!r}."
        )
    return cast(Phase, phase), cast(Lane, lane)


def _link(where: str, content: Any) -> Link:
    fields = _fields(where, content, {"bandwidth_bytes_per_s", "latency_s"})
    return Link(**{name: _range(f"{where}: {name}", value) for name, value in fields.items()})


def _range(where: str, value: Any) -> Range:
    ends = value if isinstance(value, list) else [value, value]
    if len(ends) not in (2, 3) or any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        raise ConfigError(f"{where}: expected a number, [low, high] or [low, typical, high], got {value!r}.")
    try:
        return Range(ends[0], ends[-1], *ends[1:-1])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _fields(where: str, content: Any, required: set[str], optional: set[str] | None = None) -> Mapping[str, Any]:
    at = f"{where}: " if where else ""
    if not isinstance(content, dict):
        raise ConfigError(f"{at}expected a cluster as hf-mics measure writes it, got {type(content).__name__}.")
    missing, unknown = required - content.keys(), content.keys() - required - (optional or set())
    if missing or unknown:
        wrong = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        wrong += [f"has unknown {', '.join(sorted(map(str, unknown)))}"] if unknown else []
        raise ConfigError(f"{at}not a cluster as hf-mics measure writes it: it {' and '.join(wrong)}.")
    return content
