"""How does text become blocks of tokens of one length, wherever it comes from?

Text is loaded into two splits with one column of documents, `text_column`, then tokenized and packed: documents are
joined, a separator between them, and cut into blocks, so that no token is padding and every block weighs the same in
the loss. All of it works alike on `datasets.Dataset` and on `datasets.IterableDataset` (streaming).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from hf_mics.errors import ConfigError
from hf_mics.pretraining.corpus import load_embedded_corpus

AnyDataset: TypeAlias = Dataset | IterableDataset

BUILDERS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
MAX_VALIDATION_FRACTION = 0.1
TOKENIZER_TRAINING_DOCUMENTS = 100_000
PACKED_AT_ONCE = 1000
PROBE_BYTES = 1 << 20


@dataclass(kw_only=True)
class TextArguments:
    """Where the text comes from; the same flags for every recipe. Without any of them: the embedded corpus."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hugging Face hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, for example wikitext-2-v1."})
    train_file: list[str] | None = field(
        default=None, metadata={"help": f"Local files instead, all of one kind ({' '.join(BUILDERS)})."}
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Local files to validate on."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the documents."})
    validation_documents: int = field(
        default=500,
        metadata={"help": "Documents to hold out where there is no validation split (a tenth of them at most)."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read while training, never the whole into the cache."})

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_file:
            raise ConfigError(
                f"Two sources of text: expected --dataset_name or --train_file, got both ({self.dataset_name!r} and "
                f"{self.train_file}). Leave one out."
            )
        if self.validation_file and not self.train_file:
            raise ConfigError("--validation_file needs --train_file: got files to validate on but none to train on.")
        if self.validation_documents < 1:
            raise ConfigError(f"--validation_documents must be at least 1, got {self.validation_documents}.")


def load_text(arguments: TextArguments) -> dict[str, AnyDataset]:
    """Loads the text that `arguments` name.

    Returns:
        Splits "train" and "validation", each with at least the column `text_column`. Where the source has no validation
        split, documents are held out of the training split: random ones of a fixed seed, or the first of a stream.

    Raises:
        ConfigError: missing, empty or mixed files; unknown data set; no such column; too few documents to hold any out.
    """
    if arguments.dataset_name:
        splits = _load_from_hub(arguments)
    elif arguments.train_file:
        splits = {"train": _load_files(arguments.train_file, arguments.streaming)}
        if arguments.validation_file:
            splits["validation"] = _load_files(arguments.validation_file, arguments.streaming)
    else:
        splits = dict(load_embedded_corpus())
        if arguments.streaming:
            splits = {name: split.to_iterable_dataset() for name, split in splits.items()}
    for name, split in splits.items():
        _check_column(split, name, arguments.text_column)
    if "validation" not in splits:
        splits = _hold_out(splits["train"], arguments.validation_documents)
    return {name: split.select_columns([arguments.text_column]) for name, split in splits.items()}


def iterate_documents(dataset: AnyDataset, text_column: str) -> Iterable[str]:
    """Returns the first 100,000 documents, which is what tokenizers are trained on; can be gone through repeatedly."""

    class Documents:
        def __iter__(self) -> Iterator[str]:
            return (row[text_column] or "" for row in islice(dataset, TOKENIZER_TRAINING_DOCUMENTS))

    return Documents()


def pack(
    dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, block_size: int, text_column: str = "text"
) -> AnyDataset:
    """Tokenizes the documents and packs them into blocks; column "input_ids", `block_size` tokens in each row.

    With a tokenizer that has an end-of-text token, every document is followed by it. With one of BERT's kind, every
    document is followed by [SEP], and a block is [CLS], tokens, [SEP]. Documents are packed a thousand at a time, what
    is left of each thousand (less than a block) is dropped.

    Raises:
        ConfigError: `block_size` leaves room for nothing, or the documents do not fill a single block.
    """
    packer = _Packer(tokenizer, block_size, text_column)
    if packer.room < 1:
        raise ConfigError(f"block_size must be at least 3 for this tokenizer, got {block_size}.")
    columns = list(dataset.column_names or next(iter(dataset)))
    options = {} if isinstance(dataset, IterableDataset) else {"desc": f"Packing into blocks of {block_size} tokens"}
    blocks = dataset.map(packer, batched=True, batch_size=PACKED_AT_ONCE, remove_columns=columns, **options)
    if next(iter(blocks), None) is None:
        num_tokens = len(packer.stream([row[text_column] for row in islice(dataset, PACKED_AT_ONCE)]))
        raise ConfigError(
            f"Blocks longer than the corpus: expected at least one block of {block_size} tokens, got {num_tokens} "
            "tokens in all. Use more text or a smaller --block_size."
        )
    return blocks


class _Packer:
    """The function that `Dataset.map` calls; a class of the module, so that `datasets` can hash it for its cache."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_size: int, text_column: str) -> None:
        is_bert_like = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
        separator = tokenizer.sep_token_id if is_bert_like else tokenizer.eos_token_id
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.separator = [] if separator is None else [separator]
        self.head = [tokenizer.cls_token_id] if is_bert_like else []
        self.tail = [tokenizer.sep_token_id] if is_bert_like else []
        self.room = block_size - len(self.head) - len(self.tail)

    def __call__(self, rows: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        stream = self.stream(rows[self.text_column])
        starts = range(0, len(stream) - self.room + 1, self.room)
        return {"input_ids": [self.head + stream[start : start + self.room] + self.tail for start in starts]}

    def stream(self, documents: list[str | None]) -> list[int]:
        """Returns the tokens of the documents, one after the other; nothing of those without text."""
        texts = [text for text in documents if text and not text.isspace()]
        # verbose=False: a document longer than the model's context is no mistake here, it will be cut.
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return [token for document in encoded for token in [*document, *self.separator]]


def _load_from_hub(arguments: TextArguments) -> dict[str, AnyDataset]:
    name = arguments.dataset_name
    try:
        loaded = load_dataset(name, arguments.dataset_config, streaming=arguments.streaming)
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError(
            f"Cannot load the data set {name!r} (configuration {arguments.dataset_config!r}): {error} "
            "Check the name and the network, or leave --dataset_name out to train on the embedded corpus."
        ) from None
    if "train" not in loaded:
        raise ConfigError(f"The data set {name!r} must have a split 'train', got {', '.join(map(str, loaded))}.")
    return {split: loaded[split] for split in ("train", "validation") if split in loaded}


def _load_files(files: list[str], streaming: bool) -> AnyDataset:
    """Loads local files of one kind. A text file with blank lines is read by paragraphs, one without by lines."""
    suffixes = {Path(file).suffix.lower() for file in files}
    if len(suffixes) != 1 or not suffixes <= BUILDERS.keys():
        raise ConfigError(f"Text files must be of one kind of {', '.join(BUILDERS)}; got {', '.join(files)}.")
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f"No such text file: {file} (absolute path {Path(file).resolve()}).")
        if not Path(file).stat().st_size:
            raise ConfigError(f"The text file {file} is empty: expected documents, got 0 bytes.")
    builder = BUILDERS[suffixes.pop()]
    options = {"sample_by": _sample_by(files[0])} if builder == "text" else {}
    try:
        dataset = load_dataset(builder, data_files={"train": files}, split="train", streaming=streaming, **options)
        if next(iter(dataset), None) is None:
            raise ConfigError(f"No documents in {', '.join(files)}: expected at least one, got none.")
    except ConfigError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError(f"Cannot read {', '.join(files)} as {builder}: {error.__cause__ or error}") from None
    return dataset


def _sample_by(file: str) -> str:
    with open(file, "rb") as opened:
        return "paragraph" if b"\n\n" in opened.read(PROBE_BYTES).strip() else "line"


def _check_column(dataset: AnyDataset, split: str, text_column: str) -> None:
    columns = list(dataset.column_names or next(iter(dataset), {}))
    if text_column not in columns:
        raise ConfigError(
            f"No text column in the {split} split: expected a column {text_column!r}, got "
            f"{', '.join(columns) or 'none'}. Name the right one with --text_column."
        )


def _hold_out(dataset: AnyDataset, num_documents: int) -> dict[str, AnyDataset]:
    if isinstance(dataset, IterableDataset):
        splits: dict[str, AnyDataset] = {
            "train": dataset.skip(num_documents),
            "validation": dataset.take(num_documents),
        }
        if next(iter(splits["train"]), None) is None:
            raise ConfigError(
                f"Nothing left to train on: the stream ends within the {num_documents} documents that are held out for "
                "validation. Pass --validation_file, or a smaller --validation_documents."
            )
        return splits
    size = min(num_documents, max(1, int(MAX_VALIDATION_FRACTION * len(dataset))))
    if len(dataset) < 2:
        raise ConfigError(
            f"Too few documents to hold one out for validation: expected at least 2, got {len(dataset)}. Pass "
            "--validation_file, or text with more paragraphs or lines."
        )
    held_out = dataset.train_test_split(test_size=size, seed=0)
    return {"train": held_out["train"], "validation": held_out["test"]}
