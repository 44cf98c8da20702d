"""Are trained tokenizers deterministic, lossless, and loadable the ordinary way, and are ranks given the same one?"""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import PartialState
from transformers import AutoTokenizer

from hf_mics.errors import ConfigError
from hf_mics.pretraining.corpus import load_embedded_corpus
from hf_mics.pretraining.tokenization import (
    END_OF_TEXT,
    load_or_train_tokenizer,
    train_byte_level_bpe,
    train_wordpiece,
)
from hf_mics.testing import run_ranks

HARD = "Tabs\tand\nnewlines, accents é, 漢字, emoji 🙂 and <angle> brackets.  Two  spaces."


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return load_embedded_corpus()["validation"]["text"]


@pytest.mark.parametrize("train", [train_byte_level_bpe, train_wordpiece])
def test_training_twice_gives_the_same_tokenizer(texts: list[str], train):
    first, second = (train(texts, 1000) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 1000


def test_byte_level_bpe_joins_only_what_occurs_twice():
    assert len(train_byte_level_bpe(["abcdefgh"], 1000)) == 257
    assert len(train_byte_level_bpe(["ab cd ab"], 1000)) == 258


def test_byte_level_bpe_survives_any_text(texts: list[str]):
    tokenizer = train_byte_level_bpe(texts, 500)
    assert tokenizer.decode(tokenizer.encode(HARD)) == HARD
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END_OF_TEXT


def test_wordpiece_frames_folds_and_masks_like_bert(texts: list[str]):
    tokenizer = train_wordpiece(texts, 800)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("The Function", "is [MASK]."))
    assert tokens[0] == "[CLS]"
    assert tokens[-1] == "[SEP]"
    assert tokens.count("[SEP]") == 2
    assert "[MASK]" in tokens
    assert tokenizer.decode(tokenizer.encode("The Function"), skip_special_tokens=True) == "the function"
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_wordpiece_knows_every_character_of_the_corpus_inside_words(texts: list[str]):
    tokenizer = train_wordpiece(texts, 800)
    assert tokenizer.unk_token_id not in tokenizer.encode(texts[0])


@pytest.mark.parametrize("train", [train_byte_level_bpe, train_wordpiece])
def test_saved_tokenizer_loads_and_encodes_the_same(texts: list[str], train, tmp_path: Path):
    tokenizer = train(texts, 600)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(HARD) == tokenizer.encode(HARD)
    assert loaded.special_tokens_map == tokenizer.special_tokens_map


def test_loading_a_folder_trains_nothing(texts: list[str], tmp_path: Path):
    train_byte_level_bpe(texts, 300).save_pretrained(tmp_path)

    def untouchable():
        raise AssertionError("went through the texts")
        yield ""

    assert len(load_or_train_tokenizer(str(tmp_path), untouchable(), "bpe", 5000)) == 300


def test_missing_tokenizer_and_tiny_vocabulary_are_refused():
    with pytest.raises(ConfigError, match=r"no tokenizer: expected a folder.*'/no/such/folder'"):
        load_or_train_tokenizer("/no/such/folder", [], "bpe", 1000)
    with pytest.raises(ConfigError, match=r"at least 257 tokens.*got 100"):
        load_or_train_tokenizer(None, ["text"], "bpe", 100)


def _train_on_rank() -> tuple[str, str]:
    """Each rank offers other text; all must end with the main process's tokenizer, and with its error."""
    rank = PartialState(cpu=True).process_index
    tokenizer = load_or_train_tokenizer(None, [f"text of rank {rank} " * 9], "bpe", 280)
    try:
        load_or_train_tokenizer(None, [], "bpe", 1000 if rank else 3)
    except ConfigError as error:
        return tokenizer.backend_tokenizer.to_str(), str(error)
    return tokenizer.backend_tokenizer.to_str(), ""


def test_every_rank_gets_the_main_process_s_tokenizer_and_its_error():
    results = run_ranks(_train_on_rank, 2)
    assert len(set(results)) == 1
    assert "got 3" in results[0][1]
