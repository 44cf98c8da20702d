"""Which model does a name, a config.json, a folder or a hub repository stand for?

Reads config.json itself, so that neither torch nor transformers is loaded.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_mics.errors import ConfigError, did_you_mean
from hf_mics.planning.workload import ModelShape, require_count
from hf_mics.presets import PRESETS, BERTPreset, LlamaPreset, Preset

Config = Mapping[str, Any]


def find_model(text: str) -> ModelShape:
    """The model that `text` names: a preset, else a file, a folder with a config.json, or a repository on the hub.

    Raises:
        ConfigError: it is none of these, or a model of a kind that is not planned for.
    """
    if not text.strip():
        raise ConfigError(f"no model: expected a preset, config.json, folder or hub name, got {text!r}.")
    if text in PRESETS:
        return _from_preset(text, PRESETS[text])
    return shape_of_config(_read(_local_file(text) or _download(text)), text)


def shape_of_config(config: Config, name: str) -> ModelShape:
    """The shape of the model that a transformers configuration describes, read and checked size by size.

    Args:
        config: config.json's contents. Layers, widths, heads and the vocabulary must be there, as they are in what
            save_pretrained writes; of the rest, what is left out has transformers' default.
        name: for messages and reports.

    Raises:
        ConfigError: a model type or a part of a model that is not planned for, a size that is missing, or values that
            no model has.
    """
    kind = config.get("model_type")
    reader = _READERS.get(str(kind))
    if reader is None:
        raise ConfigError(
            f"{name}: plans are made for models of type {', '.join(_READERS)}, got model_type {kind!r}. Give a preset "
            "or a configuration of similar width and depth to plan for it roughly."
        )
    return reader(config, name)


def _local_file(text: str) -> Path | None:
    """The config.json that `text` names on this machine; None where nothing has that name."""
    try:
        path = Path(text).expanduser()
        if path.is_file():
            return path
        if not path.is_dir():
            return None
    # No such user before a slash; a name that no file can have, or a folder that may not be looked into.
    except (RuntimeError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"no model {reprlib.repr(text)}: expected a preset, config.json, folder or hub name, and looking for it "
            f"here failed: {why}"
        ) from None
    if not (path / "config.json").is_file():
        raise ConfigError(f"no config.json in the folder {text!r}: expected what save_pretrained writes there.")
    return path / "config.json"


def _from_preset(name: str, preset: Preset) -> ModelShape:
    llama = isinstance(preset, LlamaPreset)
    return ModelShape(
        name=name,
        family="llama" if llama else "bert" if isinstance(preset, BERTPreset) else "gpt",
        num_layers=preset.num_layers,
        hidden_size=preset.hidden_size,
        ffn_size=preset.ffn_size,
        num_heads=preset.num_heads,
        num_kv_heads=preset.num_kv_heads if isinstance(preset, LlamaPreset) else 0,
        vocab_size=preset.vocab_size,
        context_length=preset.context_length,
        spare_positions=preset.spare_positions if isinstance(preset, BERTPreset) else 0,
        type_vocab_size=preset.token_types if isinstance(preset, BERTPreset) else 2,
        tied_embeddings=not llama,
    )


def _read(path: Path) -> Config:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {str(path)!r} as a model configuration (config.json): {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(
            f"{str(path)!r} is no transformers model configuration: expected an object with a model_type, as in "
            "config.json."
        )
    return config


def _download(name: str) -> Path:
    # Presets have no capitals and no owner.
    near = did_you_mean(name.rpartition("/")[2].casefold(), PRESETS)
    choices = f"{near} Presets: {', '.join(PRESETS)}."
    if name.endswith(".json") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"no such file or folder: {name!r}.{choices}")
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json"))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"no model {name!r}: neither a preset, nor a file or folder here, nor a configuration that could be had "
            f"from the Hugging Face hub ({type(error).__name__}: {first}).{choices} Without network, pass a local "
            "config.json."
        ) from None


def _size(config: Config, key: str, name: str, default: int | None = None) -> int:
    value = config.get(key, default)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{name}: the configuration holds no {key}, which a {config['model_type']} model needs.")
    require_count(f"{name}: {key}", value)
    return int(value)


def _switch(config: Config, key: str, name: str, default: bool) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: {key} must be true or false, got {value!r}.")
    return value


def _refuse_parts(config: Config, name: str, *keys: str) -> None:
    """Raises ConfigError where a switch turns on tensors that the shape has no place for."""
    found = [key for key in keys if _switch(config, key, name, False)]
    if found:
        raise ConfigError(f"{name}: {config['model_type']} models with {' and '.join(found)} are not planned for.")


def _gpt2(config: Config, name: str) -> ModelShape:
    _refuse_parts(config, name, "add_cross_attention")
    hidden = _size(config, "n_embd", name)
    return ModelShape(
        name=name,
        family="gpt",
        num_layers=_size(config, "n_layer", name),
        hidden_size=hidden,
        ffn_size=_size(config, "n_inner", name, 4 * hidden),
        num_heads=_size(config, "n_head", name),
        vocab_size=_size(config, "vocab_size", name),
        context_length=_size(config, "n_positions", name, 1024),
        tied_embeddings=_switch(config, "tie_word_embeddings", name, True),
    )


def _bert(config: Config, name: str) -> ModelShape:
    _refuse_parts(config, name, "add_cross_attention")
    spare = 0 if config["model_type"] == "bert" else 2
    return ModelShape(
        name=name,
        family="bert",
        num_layers=_size(config, "num_hidden_layers", name),
        hidden_size=_size(config, "hidden_size", name),
        ffn_size=_size(config, "intermediate_size", name),
        num_heads=_size(config, "num_attention_heads", name),
        vocab_size=_size(config, "vocab_size", name),
        context_length=_size(config, "max_position_embeddings", name, 512) - spare,
        spare_positions=spare,
        type_vocab_size=_size(config, "type_vocab_size", name, 2),
        tied_embeddings=_switch(config, "tie_word_embeddings", name, True),
    )


def _llama(config: Config, name: str) -> ModelShape:
    kind = config["model_type"]
    heads = _size(config, "num_attention_heads", name)
    if kind != "qwen2":
        _refuse_parts(config, name, "attention_bias", "mlp_bias")
    return ModelShape(
        name=name,
        family="llama",
        num_layers=_size(config, "num_hidden_layers", name),
        hidden_size=_size(config, "hidden_size", name),
        ffn_size=_size(config, "intermediate_size", name),
        num_heads=heads,
        num_kv_heads=_size(config, "num_key_value_heads", name, heads),
        # Qwen 3's default; of the others hidden_size / heads, which ModelShape sees to.
        head_dim=_size(config, "head_dim", name, 128) if kind == "qwen3" else config.get("head_dim") or 0,
        vocab_size=_size(config, "vocab_size", name),
        context_length=_size(config, "max_position_embeddings", name),
        tied_embeddings=_switch(config, "tie_word_embeddings", name, False),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )


def _t5(config: Config, name: str) -> ModelShape:
    layers = _size(config, "num_layers", name)
    return ModelShape(
        name=name,
        family="t5",
        num_layers=layers,
        num_decoder_layers=_size(config, "num_decoder_layers", name, layers),
        hidden_size=_size(config, "d_model", name),
        ffn_size=_size(config, "d_ff", name),
        num_heads=_size(config, "num_heads", name),
        head_dim=_size(config, "d_kv", name),
        vocab_size=_size(config, "vocab_size", name),
        context_length=_size(config, "n_positions", name, 512),
        # transformers 5 ties the head whatever the configuration says.
        tied_embeddings=True,
        gated_ffn=str(config.get("feed_forward_proj", "relu")).startswith("gated-"),
        relative_buckets=_size(config, "relative_attention_num_buckets", name, 32),
    )


_READERS: dict[str, Callable[[Config, str], ModelShape]] = {
    "gpt2": _gpt2,
    "bert": _bert,
    "roberta": _bert,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "t5": _t5,
}
