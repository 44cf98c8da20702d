"""Where does a classifier start from: any Hugging Face folder, or nothing?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from hf_mics.checkpoint.mark import MARK_NAME
from hf_mics.errors import ConfigError
from hf_mics.presets import find_preset
from hf_mics.pretraining.blocks import build_model, context_length
from hf_mics.pretraining.tokenization import load_or_train_tokenizer

PRESET = "bert-tiny"
MAX_DEFAULT_TOKENS = 512


def load_classifier(
    name_or_path: str | None, texts: Iterable[str], names: list[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a pretrained model, whatever its kind, with a new head for the classes `names`, and its tokenizer.

    A collective call: every rank must make it. Weights are loaded in fp32.

    Args:
        name_or_path: a folder or a name on the hub; None builds a `bert-tiny` with fresh weights instead.
        texts: what to train a tokenizer on in that case.

    Raises:
        ConfigError: no such model or tokenizer, a model that has no head for classes, a tokenizer that cannot pad or
            knows more tokens than the model.
    """
    classes: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
    if name_or_path is None:
        config = find_preset(PRESET).config()
        tokenizer = load_or_train_tokenizer(None, texts, "wordpiece", config.vocab_size)
        config.update({**classes, "pad_token_id": tokenizer.pad_token_id})
        tokenizer.model_max_length = config.max_position_embeddings
        return build_model(AutoModelForSequenceClassification, config), tokenizer
    tokenizer = load_or_train_tokenizer(name_or_path, (), "wordpiece", 0)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"the tokenizer of {name_or_path!r} has neither a padding nor an end-of-text token, and batches need "
                "one. Set its pad_token and save it again, or take another model."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return _load_pretrained(name_or_path, tokenizer, classes), tokenizer


def _load_pretrained(
    name_or_path: str, tokenizer: PreTrainedTokenizerBase, classes: Mapping[str, Any]
) -> PreTrainedModel:
    try:
        # Without pad_token_id decoders refuse batches, and look for the last token of each row in vain.
        config = AutoConfig.from_pretrained(name_or_path, pad_token_id=tokenizer.pad_token_id, **classes)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            name_or_path, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        is_checkpoint = Path(name_or_path, MARK_NAME).is_file()
        hint = f"It is a training checkpoint: `hf-mics export {name_or_path} FOLDER`, then take FOLDER. "
        raise ConfigError(
            f"no model to fine-tune: expected a folder that save_pretrained wrote or a name on the Hugging Face hub, "
            f"got {name_or_path!r}. {hint if is_checkpoint else ''}Cause: {error}"
        ) from None
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"tokenizer and model of {name_or_path!r} do not belong together: expected at most {config.vocab_size} "
            f"tokens, got {len(tokenizer)}."
        )
    return model


def tokenize(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int | None
) -> Dataset:
    """Returns the rows as tokens, cut to `max_length`; by default to what the model takes, 512 at most.

    Raises:
        ConfigError: `max_length` is more than the model has positions for, or leaves no room.
    """
    context = context_length(model.config)
    limit = min(context or MAX_DEFAULT_TOKENS, tokenizer.model_max_length)
    if max_length is not None and not 3 <= max_length <= limit:
        raise ConfigError(f"--max_length must be from 3 to {limit}, the model's context, got {max_length}.")
    length = max_length or min(limit, MAX_DEFAULT_TOKENS)

    def encode(rows: dict[str, list[str | None]]) -> Any:
        return tokenizer([text or "" for text in rows["text"]], truncation=True, max_length=length)

    return dataset.map(encode, batched=True, remove_columns=["text"], desc=f"Tokenizing to {length} tokens at most")
