"""What does every pretraining recipe prepare before it trains: which model, which tokenizer, which blocks of tokens?"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_mics.errors import ConfigError
from hf_mics.presets import Task, find_preset, load_model_config
from hf_mics.pretraining.arguments import require_at_least
from hf_mics.pretraining.ranks import main_process_first
from hf_mics.pretraining.sources import AnyDataset
from hf_mics.pretraining.text import TextArguments, iterate_documents, load_text, pack
from hf_mics.pretraining.tokenization import load_or_train_tokenizer

TOKENIZER_KINDS: dict[Task, Literal["bpe", "wordpiece"]] = {"causal": "bpe", "masked": "wordpiece"}
OTHER_LEARNING_RATES: dict[Task, float] = {"causal": 3e-4, "masked": 1e-4}
SHUFFLE_BUFFER_BLOCKS = 1000
# These and all with RoBERTa in their name number positions from that of padding onwards.
LIKE_ROBERTA = {"camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "xmod"}


@dataclass(kw_only=True)
class BlockArguments:
    """Which model to pretrain, on which tokens; the same flags for every pretraining recipe."""

    preset: str = field(metadata={"help": "A named model shape, see hf_mics/presets.py."})
    model_config: str | None = field(
        default=None,
        metadata={"help": "Instead: config.json, a folder with one, or a hub name; any such model."},
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or hub name; default: train one."})
    vocab_size: int | None = field(default=None, metadata={"help": "Of the trained one; default: the model's."})
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens per sequence; default: the model's context."}
    )
    max_eval_blocks: int = field(default=256, metadata={"help": "Sequences to evaluate on, all processes together."})

    def __post_init__(self) -> None:
        if self.tokenizer and self.vocab_size is not None:
            raise ConfigError(
                f"--vocab_size is of a tokenizer that is trained: expected it or --tokenizer, got both "
                f"({self.vocab_size} and {self.tokenizer!r}). Leave one out."
            )
        require_at_least(1, max_eval_blocks=self.max_eval_blocks)
        require_at_least(2, block_size=self.block_size)


class Blocks(NamedTuple):
    """What `prepare_blocks` returns."""

    config: PretrainedConfig
    """Of the model; its special tokens are the tokenizer's, and its vocabulary has room for all of the tokenizer's."""
    tokenizer: PreTrainedTokenizerBase
    block_size: int
    learning_rate: float
    """The peak that suits the model."""
    train: AnyDataset
    validation: Dataset


def prepare_blocks(
    arguments: BlockArguments, text_arguments: TextArguments, task: Task, seed: int, with_offsets: bool = False
) -> Blocks:
    """Loads the text, loads or trains the tokenizer, fits the model's configuration to it, packs the text into blocks.

    A collective call: every rank must make it, and gets the same.

    Args:
        task: what is trained for, and so which presets there are and which tokenizer is trained.
        seed: of the order of a stream.
        with_offsets: see `pack`.

    Raises:
        ConfigError: on every rank: unknown names, bad files, blocks that fit neither the model nor the corpus.
    """
    if arguments.model_config:
        config, learning_rate = load_model_config(arguments.model_config), OTHER_LEARNING_RATES[task]
    else:
        preset = find_preset(arguments.preset, task)
        config, learning_rate = preset.config(), preset.learning_rate
    if task == "causal" and type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        config.is_decoder = True  # BERT and its kin would see the tokens that they are to predict
    text = main_process_first(partial(load_text, text_arguments))
    documents = iterate_documents(text["train"], text_arguments.text_column)
    vocab_size = config.vocab_size if arguments.vocab_size is None else arguments.vocab_size
    tokenizer = load_or_train_tokenizer(arguments.tokenizer, documents, TOKENIZER_KINDS[task], vocab_size)
    if task == "masked" and (tokenizer.mask_token is None or tokenizer.pad_token is None):
        missing = "mask" if tokenizer.mask_token is None else "padding"
        raise ConfigError(
            f"no {missing} token: expected a tokenizer of BERT's kind, got one with the special tokens "
            f"{', '.join(tokenizer.all_special_tokens) or 'none'}. Leave --tokenizer out to train one on the corpus."
        )
    _fit_to_tokenizer(config, tokenizer)
    block_size = _block_size(arguments.block_size, config)

    packing = partial(
        pack,
        tokenizer=tokenizer,
        block_size=block_size,
        text_column=text_arguments.text_column,
        with_offsets=with_offsets,
    )
    train, validation = (main_process_first(partial(packing, text[split])) for split in ("train", "validation"))
    if isinstance(train, IterableDataset):
        train = train.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER_BLOCKS)
        # Read once and kept: it is small, and evaluations shall not open the stream again.
        validation = Dataset.from_list(list(validation.take(arguments.max_eval_blocks)))
    else:
        validation = validation.take(arguments.max_eval_blocks)
    # What reads the folder later, cuts its texts to what the model was trained on.
    tokenizer.model_max_length = block_size
    return Blocks(config, tokenizer, block_size, learning_rate, train, validation)


def build_model(auto_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """Builds `auto_class.from_config(config)`: with weights on the main process, on the meta device elsewhere.

    MiCS starts every rank from the main process's weights, so that a machine holds one whole model and not one a rank.

    Raises:
        ConfigError: the configuration is of a model without the head that `auto_class` stands for.
    """
    device = contextlib.nullcontext() if PartialState().is_main_process else torch.device("meta")
    try:
        with device:
            return auto_class.from_config(config)
    except ValueError as error:
        raise ConfigError(
            f"a {config.model_type!r} model has no head for {auto_class.__name__}. Take a preset or another "
            f"--model_config. Cause: {str(error).splitlines()[0]}"
        ) from None


def _fit_to_tokenizer(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        # Not where end of text doubles as padding: many models never train the embedding of padding.
        config.pad_token_id = tokenizer.pad_token_id


def _block_size(wanted: int | None, config: PretrainedConfig) -> int:
    """Returns the tokens per block: `wanted`, or all that the model has positions for."""
    context = context_length(config)
    if wanted is None:
        if context is None:
            raise ConfigError(f"a {config.model_type!r} model has no longest sequence: say how long with --block_size.")
        return context
    if context is not None and wanted > context:
        raise ConfigError(
            f"blocks longer than the model's context: expected a --block_size of at most {context}, got {wanted}."
        )
    return wanted


def context_length(config: PretrainedConfig) -> int | None:
    """Returns the longest sequence that the model has positions for, or None if its configuration does not say."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if not positions or not ("roberta" in config.model_type or config.model_type in LIKE_ROBERTA):
        return positions
    # To MPNet token 1 is padding, whatever its configuration says.
    padding = 1 if config.model_type == "mpnet" else config.pad_token_id or 0
    return positions - padding - 1
