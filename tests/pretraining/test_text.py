"""Does text from every source become full blocks without loss, and bad text an error that says what to do?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from hf_mics.errors import ConfigError
from hf_mics.pretraining.corpus import load_embedded_corpus
from hf_mics.pretraining.text import TextArguments, iterate_documents, load_text, pack
from hf_mics.pretraining.tokenization import train_byte_level_bpe, train_wordpiece

LINES = [f"Sentence number {number} has a few words in it." for number in range(40)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_byte_level_bpe(LINES, 300)


def write(path: Path, lines: list[str] = LINES) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    elif path.suffix == ".parquet":
        Dataset.from_dict({"text": lines}).to_parquet(path)
    elif path.suffix == ".csv":
        Dataset.from_dict({"text": lines}).to_csv(path, index=False)
    else:
        path.write_text("\n".join(lines))
    return str(path)


def texts(dataset) -> list[str]:
    return [row["text"] for row in dataset]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_local_files_give_every_document_once(tmp_path: Path, suffix: str, streaming: bool):
    arguments = TextArguments(train_file=[write(tmp_path / f"a{suffix}")], streaming=streaming, validation_documents=4)
    splits = load_text(arguments)
    assert isinstance(splits["train"], IterableDataset) == streaming
    assert len(texts(splits["validation"])) == 4
    assert sorted(texts(splits["train"]) + texts(splits["validation"])) == sorted(LINES)


@pytest.mark.parametrize("end_of_line", ["\n", "\r\n"])
def test_text_with_blank_lines_is_read_by_paragraphs(tmp_path: Path, end_of_line: str):
    """A file of a single line before it decides nothing."""
    single, file = tmp_path / "a.txt", tmp_path / "b.txt"
    single.write_text("zero")
    file.write_bytes("one\nstill one\n\ntwo\n\nthree".replace("\n", end_of_line).encode())
    splits = load_text(TextArguments(train_file=[str(single), str(file)], validation_documents=1))
    assert sorted(texts(splits["train"]) + texts(splits["validation"])) == ["one\nstill one", "three", "two", "zero"]


def test_text_files_of_paragraphs_and_of_lines_are_refused_together(tmp_path: Path):
    lines, paragraphs = write(tmp_path / "a.txt"), write(tmp_path / "b.txt", ["one\n", "two"])
    with pytest.raises(ConfigError, match=r"b\.txt has blank lines, .*a\.txt has none"):
        load_text(TextArguments(train_file=[lines, paragraphs]))


def test_validation_file_is_used_as_it_is(tmp_path: Path):
    held_out = write(tmp_path / "b.txt", ["held out", "also held out"])
    splits = load_text(TextArguments(train_file=[write(tmp_path / "a.txt")], validation_file=[held_out]))
    assert texts(splits["train"]) == LINES
    assert texts(splits["validation"]) == ["held out", "also held out"]


def test_held_out_documents_are_the_same_ones_every_time(tmp_path: Path):
    file = write(tmp_path / "a.txt")
    first, second = (texts(load_text(TextArguments(train_file=[file]))["validation"]) for _ in range(2))
    assert first == second


def test_tokenizers_are_trained_on_the_first_documents_of_a_source_without_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hf_mics.pretraining.text.TOKENIZER_TRAINING_DOCUMENTS", 3)
    documents = iterate_documents([{"text": text} for text in ["a", None, "b", "c"]], "text")
    assert [list(documents) for _ in range(2)] == [["a", "", "b"]] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_packing_keeps_every_token_in_order_but_the_last_block(tokenizer: PreTrainedTokenizerFast, streaming: bool):
    dataset = Dataset.from_dict({"text": [*LINES[:20], "", "   ", *LINES[20:]]})
    blocks = list(pack(dataset.to_iterable_dataset() if streaming else dataset, tokenizer, 16))
    stream = [token for line in LINES for token in [*tokenizer.encode(line), tokenizer.eos_token_id]]
    assert all(len(block["input_ids"]) == 16 for block in blocks)
    assert [token for block in blocks for token in block["input_ids"]] == stream[: len(stream) // 16 * 16]


def test_documents_that_fill_a_block_exactly_lose_nothing(tokenizer: PreTrainedTokenizerFast):
    num_tokens = len(tokenizer.encode(LINES[0])) + 1  # and the end of text
    assert len(pack(Dataset.from_dict({"text": LINES[:1]}), tokenizer, num_tokens)) == 1


def test_packing_for_bert_frames_every_block():
    tokenizer = train_wordpiece(LINES, 200)
    blocks = pack(Dataset.from_dict({"text": LINES}), tokenizer, 16)["input_ids"]
    inner = [token for line in LINES for token in [*tokenizer.encode(line, add_special_tokens=False), 3]]
    assert tokenizer.sep_token_id == 3
    first = pack(Dataset.from_dict({"text": LINES}), tokenizer, 16, with_offsets=True)[0]["offset_mapping"]
    expected = tokenizer(LINES[0], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][:14]
    assert [tuple(pair) for pair in first[: 1 + len(expected)]] == [(0, 0), *expected], "offsets stand at their tokens"
    assert {(block[0], block[-1]) for block in blocks} == {(tokenizer.cls_token_id, tokenizer.sep_token_id)}
    assert [token for block in blocks for token in block[1:-1]] == inner[: len(inner) // 14 * 14]


def test_offsets_tell_words_apart_where_spaces_belong_to_tokens():
    """And hold together a character of several tokens."""
    tokenizer = train_byte_level_bpe(LINES, 300)
    tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    document = "Sentence naïve 日本 words,  and\nmore "
    tokens = len(tokenizer.encode(document))
    (block,) = pack(Dataset.from_dict({"text": [document]}), tokenizer, tokens + 2, with_offsets=True)
    words: list[list[int]] = []
    previous_end = None
    for token, (start, end) in list(zip(block["input_ids"], block["offset_mapping"], strict=True))[1:-1]:
        if start != previous_end:
            words.append([])
        words[-1].append(token)
        previous_end = end
    assert [tokenizer.decode(word).strip() for word in words] == document.split()
    assert len(words) < tokens


def test_tokenizer_documents_can_be_gone_through_twice():
    documents = iterate_documents(Dataset.from_dict({"text": ["a", None, "b"]}), "text")
    assert list(documents) == list(documents) == ["a", "", "b"]


@pytest.mark.parametrize("streaming", [False, True])
def test_embedded_corpus_is_the_default(streaming: bool):
    splits = load_text(TextArguments(streaming=streaming))
    assert isinstance(splits["train"], IterableDataset) == streaming
    assert next(iter(splits["train"])) == {"text": load_embedded_corpus()["train"][0]["text"]}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.txt", None, "no such text file: .*missing.txt"),
        ("empty.txt", "", "empty.txt is empty"),
        ("blank.csv", "text\n", "no documents|cannot read"),
        (
            "columns.jsonl",
            '{"body": "x", "title": "y"}\n' * 4,
            "expected a column 'text', got body, title.*--text_column",
        ),
        ("broken.jsonl", "{not json", "cannot read .*broken.jsonl as json"),
        ("picture.png", "x", "one kind of .txt"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_files_are_refused(tmp_path: Path, name: str, content: str | None, expected: str, streaming: bool):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=expected):
        load_text(TextArguments(train_file=[str(tmp_path / name)], streaming=streaming))


def test_files_of_different_columns_are_refused_in_one_sentence(tmp_path: Path):
    other = tmp_path / "b.jsonl"
    other.write_text('{"body": "x", "text": "y"}\n')
    with pytest.raises(
        ConfigError, match=r"the same columns, got text first and body, text later\. Take out"
    ) as raised:
        load_text(TextArguments(train_file=[write(tmp_path / "a.jsonl"), str(other)]))
    assert "\n" not in str(raised.value)


def test_one_document_cannot_be_split(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"at least 2, got 1.*--validation_file"):
        load_text(TextArguments(train_file=[write(tmp_path / "a.txt", ["one"])]))


def test_stream_that_ends_in_the_held_out_documents_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nothing left to train on.*--validation_documents"):
        load_text(TextArguments(train_file=[write(tmp_path / "a.txt")], streaming=True, validation_documents=40))


@pytest.mark.parametrize("streaming", [False, True])
def test_block_longer_than_the_corpus_is_refused_with_its_size(tokenizer: PreTrainedTokenizerFast, streaming: bool):
    dataset = Dataset.from_dict({"text": ["Sentence number 1."]})
    num_tokens = len(tokenizer.encode("Sentence number 1.")) + 1  # and the end of text
    with pytest.raises(ConfigError, match=f"at least one block of 4096 tokens, got {num_tokens} tokens"):
        pack(dataset.to_iterable_dataset() if streaming else dataset, tokenizer, 4096)


def test_two_sources_are_refused():
    with pytest.raises(ConfigError, match=r"--dataset_name or --train_file"):
        TextArguments(dataset_name="a/b", train_file=["c.txt"])


def test_unknown_hub_data_set_is_refused_offline():
    with pytest.raises(ConfigError, match=r"cannot load the data set 'nobody/nothing'"):
        load_text(TextArguments(dataset_name="nobody/nothing"))
