"""Where does the tokenizer come from: trained on the corpus at hand, or loaded?

Training takes a second for a megabyte and needs no download. The same text gives the same tokenizer, but ranks do not
rely on it: the main process trains and broadcasts, so every rank holds the identical one, and nobody races for a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_mics.errors import ConfigError
from hf_mics.pretraining.ranks import broadcast_from_main

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257
MAX_ALPHABET_SIZE = 1000
BERT_SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a GPT-2 style tokenizer: any text survives the round trip, `<|endoftext|>` is its one special token.

    Args:
        texts: what to train on; gone through once, never held in memory as a whole.
        vocab_size: at most so many tokens, at least the 256 bytes and the special token; fewer if the text runs out of
            pairs that occur twice.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a BERT style tokenizer with [PAD] [UNK] [CLS] [SEP] [MASK], which adds [CLS] and [SEP] by itself.

    It folds case and strips accents, as those of "uncased" models do.

    Args:
        texts: what to train on; gone through twice (a list or a data set column, not a generator).
        vocab_size: at most so many tokens.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    counts = Counter(char for text in texts for char in normalizer.normalize_str(text) if not char.isspace())
    alphabet = sorted(sorted(counts, key=lambda char: (-counts[char], char))[:MAX_ALPHABET_SIZE])
    # The trainer numbers "##a", "##b" ... in the order of a hash map, which differs from run to run (tokenizers 0.23);
    # named beforehand they keep their place. It takes names only as special tokens, so the model is built anew below.
    continuations = [f"##{char}" for char in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*BERT_SPECIAL_TOKENS.values(), *continuations],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    scratch = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    scratch.normalizer = normalizer
    scratch.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    scratch.train_from_iterator(texts, trainer)

    tokenizer = Tokenizer(models.WordPiece(scratch.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **BERT_SPECIAL_TOKENS)


def load_or_train_tokenizer(
    name_or_path: str | None, texts: Iterable[str], kind: Literal["bpe", "wordpiece"], vocab_size: int
) -> PreTrainedTokenizerBase:
    """Returns the tokenizer `name_or_path`, or, if that is None, one trained on `texts`; the same one on every rank.

    A collective call: every rank must make it. `texts` is gone through on the main process only.

    Args:
        name_or_path: a hub name or a folder with a tokenizer; None trains.
        texts, vocab_size: see `train_byte_level_bpe` and `train_wordpiece`.
        kind: what to train.

    Raises:
        ConfigError: on every rank, if the tokenizer cannot be loaded or `vocab_size` is less than 257.
    """

    def build() -> PreTrainedTokenizerBase:
        if name_or_path is None:
            if vocab_size < MIN_VOCAB_SIZE:
                raise ConfigError(
                    f"vocabulary too small: expected at least {MIN_VOCAB_SIZE} tokens (one a byte, one special), "
                    f"got {vocab_size}."
                )
            return train_byte_level_bpe(texts, vocab_size) if kind == "bpe" else train_wordpiece(texts, vocab_size)
        try:
            return AutoTokenizer.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"no tokenizer: expected a folder with tokenizer files or a name on the Hugging Face hub, got "
                f"{name_or_path!r}. Without one it is trained on the corpus. Cause: {error}"
            ) from None

    return broadcast_from_main(build)
