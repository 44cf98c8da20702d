"""How does text become blocks of tokens of one length, wherever it comes from?

Documents are tokenized and packed: joined, a separator between them, and cut into blocks, so that no token is padding
and every block weighs the same in the loss. All of it works alike on `datasets.Dataset` and on
`datasets.IterableDataset` (streaming).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from hf_mics.errors import ConfigError
from hf_mics.pretraining.corpus import load_embedded_corpus
from hf_mics.pretraining.sources import AnyDataset, SourceArguments, load_splits

TOKENIZER_TRAINING_DOCUMENTS = 100_000
PACKED_AT_ONCE = 1000


@dataclass(kw_only=True)
class TextArguments(SourceArguments):
    """Where the text to pretrain on comes from. Without any of these flags: the embedded corpus."""

    streaming: bool = field(default=False, metadata={"help": "Read while training, never the whole into the cache."})


def load_text(arguments: TextArguments) -> dict[str, AnyDataset]:
    """Loads the text that `arguments` name: splits "train" and "validation" with the one column `text_column`.

    Raises:
        ConfigError: see `load_splits`.
    """
    columns = {arguments.text_column: "--text_column"}
    return load_splits(arguments, load_embedded_corpus, columns, arguments.streaming)


def iterate_documents(dataset: AnyDataset, text_column: str) -> Iterable[str]:
    """Returns the first 100,000 documents, which is what tokenizers are trained on; can be gone through repeatedly."""

    class Documents:
        def __iter__(self) -> Iterator[str]:
            return (row[text_column] or "" for row in islice(dataset, TOKENIZER_TRAINING_DOCUMENTS))

    return Documents()


def pack(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    text_column: str = "text",
    with_offsets: bool = False,
) -> AnyDataset:
    """Tokenizes the documents and packs them into blocks; column "input_ids", `block_size` tokens in each row.

    With a tokenizer that has an end-of-text token, every document is followed by it. With one of BERT's kind, every
    document is followed by [SEP], and a block is [CLS], tokens, [SEP]. Documents are packed a thousand at a time, what
    is left of each thousand (less than a block) is dropped.

    Args:
        with_offsets: add the column "offset_mapping", where each token starts and ends in its document, in characters;
            it tells which tokens make a word.

    Raises:
        ConfigError: `block_size` leaves room for nothing, the documents do not fill a single block, or offsets are
            wanted of a tokenizer that does not know them.
    """
    packer = _Packer(tokenizer, block_size, text_column, with_offsets)
    if packer.room < 1:
        raise ConfigError(f"block_size must be at least 3 for this tokenizer, got {block_size}.")
    if with_offsets and not tokenizer.is_fast:
        raise ConfigError(
            f"whole words need a fast tokenizer, which knows where tokens start and end; got a slow one, "
            f"{type(tokenizer).__name__}. Mask single tokens, or take another tokenizer."
        )
    columns = list(dataset.column_names or next(iter(dataset)))
    options = {} if isinstance(dataset, IterableDataset) else {"desc": f"Packing into blocks of {block_size} tokens"}
    blocks = dataset.map(packer, batched=True, batch_size=PACKED_AT_ONCE, remove_columns=columns, **options)
    if next(iter(blocks), None) is None:
        num_tokens = len(packer.stream([row[text_column] for row in islice(dataset, PACKED_AT_ONCE)])[0])
        raise ConfigError(
            f"blocks longer than the corpus: expected at least one block of {block_size} tokens, got {num_tokens} "
            "tokens in all. Use more text or a smaller --block_size."
        )
    return blocks


class _Packer:
    """The function that `Dataset.map` calls; a class of the module, so that `datasets` can hash it for its cache."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, block_size: int, text_column: str, with_offsets: bool
    ) -> None:
        is_bert_like = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
        separator = tokenizer.sep_token_id if is_bert_like else tokenizer.eos_token_id
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.with_offsets = with_offsets
        self.separator = [] if separator is None else [separator]
        self.head = [tokenizer.cls_token_id] if is_bert_like else []
        self.tail = [tokenizer.sep_token_id] if is_bert_like else []
        self.room = block_size - len(self.head) - len(self.tail)

    def __call__(self, rows: dict[str, list[str | None]]) -> dict[str, list[list[Any]]]:
        tokens, offsets = self.stream(rows[self.text_column])
        starts = range(0, len(tokens) - self.room + 1, self.room)
        blocks = {"input_ids": [self.head + tokens[start : start + self.room] + self.tail for start in starts]}
        if self.with_offsets:
            head, tail = ([(0, 0)] * len(frame) for frame in (self.head, self.tail))
            blocks["offset_mapping"] = [head + offsets[start : start + self.room] + tail for start in starts]
        return blocks

    def stream(self, documents: list[str | None]) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the tokens of the documents, one after the other, and where they are in their documents, if wanted.

        Nothing of documents without text.
        """
        texts = [text for text in documents if text and not text.isspace()]
        if not texts:
            return [], []
        # verbose=False: a document longer than the model's context is no mistake here, it will be cut.
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=self.with_offsets, verbose=False
        )
        tokens = [token for document in encoded["input_ids"] for token in [*document, *self.separator]]
        nowhere = [(0, 0)] * len(self.separator)
        found = zip(texts, encoded.get("offset_mapping", ()), strict=False)
        offsets = [pair for text, document in found for pair in [*_without_spaces(text, document), *nowhere]]
        return tokens, offsets


def _without_spaces(text: str, offsets: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yields where the tokens of `text` are without the spaces around them, each from where the last ended at least.

    To most byte-level and SentencePiece tokenizers a space belongs to the word after it, so that no token would begin a
    word; and all tokens of one character span the whole of it, so that each would.
    """
    reached = 0
    for start, end in offsets:
        end -= len(text[start:end]) - len(text[start:end].rstrip())
        start += len(text[start:end]) - len(text[start:end].lstrip())
        start = max(start, reached)
        reached = max(start, end)
        yield start, reached
