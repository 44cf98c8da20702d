"""Which settings does an accelerate config hold, by the names that accelerate reads them by, and which does it drop?

The keys that accelerate knows are asked of the installed accelerate. It copies the keys of a section over the flags of
`accelerate launch`, after it has completed the names in some sections, and drops what is no flag.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_mics.errors import ConfigError

Config = Mapping[str, Any]

# As accelerate's str_to_bool reads them; an empty value is neither.
TRUE, FALSE = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")
"""What accelerate takes for true and for false."""
PARALLEL = "parallelism_config_"
"""How every key of parallelism_config begins."""
# Section -> (how its keys begin, how accelerate completes one that begins otherwise; "" where it does not).
_SECTIONS = {
    "fsdp_config": ("fsdp", "fsdp_"),
    "dynamo_config": ("dynamo_", "dynamo_"),
    "parallelism_config": (PARALLEL, ""),
}
# Top-level keys of older accelerates, which the installed one still takes.
_LEGACY = ("fp16", "dynamo_backend")
# Read from a config alone: no flag has this name.
_WITHOUT_FLAG = "fsdp_ignored_modules"


def read_config(file: str) -> dict[str, Any]:
    """The settings in `file` as they stand there.

    Raises:
        ConfigError: the file cannot be read, or holds no settings at all.
    """
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


def as_accelerate_reads(config: Config) -> dict[str, Any]:
    """The same settings, each key of a section by its whole name; an older top-level dynamo_backend in its section."""
    read = dict(config)
    if "dynamo_backend" in read:
        backend = read.pop("dynamo_backend")
        read["dynamo_config"] = {} if backend == "NO" else {"dynamo_backend": backend}
    for name in _SECTIONS:
        if isinstance(read.get(name), dict):
            read[name] = {_whole_name(name, str(key)): value for key, value in read[name].items()}
    return read


def section(config: Config, name: str) -> dict[str, Any]:
    """A section's settings; none where it is missing or is no section."""
    found = config.get(name)
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def unknown_keys(config: Config) -> Iterator[str]:
    """The mistake of every key in `config`, as read from the file, that accelerate does not know."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    top = [*_LEGACY, *(entry.name for entry in dataclasses.fields(ClusterConfig))]
    for key in config:
        if key not in top:
            yield f"unknown key {key} (accelerate refuses it){_near(key, top)}"
    flags = {*vars(launch_command_parser().parse_known_args(["script.py"])[0]), _WITHOUT_FLAG}
    for name, (prefix, _) in _SECTIONS.items():
        known = sorted(flag for flag in flags if flag.startswith(prefix))
        for key in section(config, name):
            whole = _whole_name(name, key)
            if whole not in known:
                read_as = "" if whole == key else f", read as {whole}"
                why = "puts it in place of the flag" if whole in flags else "drops it without a word"
                yield f"{name}: unknown key {key}{read_as} (accelerate {why}){_near(whole, known, prefix)}"


def _whole_name(name: str, key: str) -> str:
    prefix, completion = _SECTIONS[name]
    return key if key.startswith(prefix) else completion + key


def _near(key: str, known: Collection[str], prefix: str = "") -> str:
    near = [prefix + key] if prefix + key in known else difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "; leave it out"


def int_or_none(value: Any) -> int | None:
    """An integer, also where the file quotes it."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        return int(value)
    except ValueError:
        return None


def is_true(value: Any) -> bool:
    """Whether accelerate takes a switch's value for true."""
    return str(value).lower() in TRUE
