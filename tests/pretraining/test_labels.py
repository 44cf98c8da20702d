"""Are labels of every kind understood, and wrong ones refused with the row they are in?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_mics.errors import ConfigError
from hf_mics.pretraining.labels import LabelledArguments, LabelledText, load_labelled


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, labels: list, **more: list) -> str:
    rows = [{"text": f"text {row}", "label": label} for row, label in enumerate(labels)]
    for name, values in more.items():
        rows = [{**row, name: value} for row, value in zip(rows, values, strict=True)]
    if path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tmp_path: Path, train: list, validation: list | None = None, suffix: str = ".jsonl", **flags) -> LabelledText:
    files = {"train_file": [write(tmp_path / f"train{suffix}", train)]}
    if validation is not None:
        files["validation_file"] = [write(tmp_path / f"validation{suffix}", validation)]
    return load_labelled(LabelledArguments(**files, **flags))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["cat", "dog", "ant"], ["ant", "cat", "dog"], [1, 2, 0]),
        ([0, 2, 1], ["0", "1", "2"], [0, 2, 1]),
    ],
)
def test_names_and_numbers_become_classes(tmp_path: Path, suffix: str, labels: list, names: list, numbers: list):
    data = load(tmp_path, labels * 2, labels, suffix)
    assert data.names == names
    assert data.validation["label"] == numbers
    assert data.train["label"] == numbers * 2
    assert data.train["text"] == [f"text {row}" for row in range(6)]


def test_order_of_names_is_as_given_and_numbers_may_be_named(tmp_path: Path):
    data = load(tmp_path, ["cat", "dog"], ["ant"], class_names=["dog", "cat", "ant"])
    assert (data.train["label"], data.validation["label"]) == ([1, 0], [2])
    numbered = load(tmp_path, [0, 2], [1], class_names=["dog", "cat", "ant"])
    assert (numbered.names, numbered.validation["label"]) == (["dog", "cat", "ant"], [1])


def test_class_labels_of_a_data_set_keep_their_names_and_order(tmp_path: Path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"text": list("abcdef"), "label": [1, 0] * 3}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    data = load_labelled(LabelledArguments(train_file=[str(tmp_path / "a.parquet")]))
    assert data.names == ["neg", "pos"]
    assert set(data.train["label"]) == {0, 1}
    assert len(data.validation) == 1
    renamed = load_labelled(LabelledArguments(train_file=[str(tmp_path / "a.parquet")], class_names=["bad", "good"]))
    assert renamed.names == ["bad", "good"]
    assert renamed.train["label"] == data.train["label"]


def test_numbers_without_a_sign_are_classes_too(tmp_path: Path):
    features = Features({"text": Value("string"), "label": Value("uint8")})
    rows = Dataset.from_dict({"text": list("abcdef"), "label": [1, 0] * 3}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    assert load_labelled(LabelledArguments(train_file=[str(tmp_path / "a.parquet")])).names == ["0", "1"]


def test_columns_of_other_names(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", ["x", "y"] * 4, body=[f"body {row}" for row in range(8)])
    data = load_labelled(LabelledArguments(train_file=[file], text_column="body"))
    assert all(text.startswith("body") for text in data.train["text"])


def test_topics_are_the_default():
    assert load_labelled(LabelledArguments()).names == ["development", "files", "internet"]


@pytest.mark.parametrize(
    ("train", "validation", "flags", "expected"),
    [
        ([0, 1], [0, 2], {}, r"out of range in row 1 of the validation split: expected 0 to 1 for 2 classes, got 2"),
        ([0, 1, -1], [0], {}, r"out of range in row 2 of the train split: expected 0 to 2 for 3 classes, got -1"),
        ([1, 2, 1], [1], {}, r"out of range in row 1 of the train split.*got 2.*Number the classes from 0"),
        ([0, 1, 5], [1], {"class_names": ["a", "b"]}, r"row 2 of the train split: expected 0 to 1.*got 5"),
        (["a", "b"], ["a", "c"], {}, r"unknown label in row 1 of the validation split: expected one of a, b, got 'c'"),
        (["a", None, "b"], ["a"], {}, r"no label in row 1 of the train split: expected one of a, b"),
        ([0.5, 1.5], [0.5], {}, r"must be names or whole numbers.*'label' holds (double|float64)"),
        (["a", "a"], ["a"], {}, r"at least 2 in 'label', got \['a'\]"),
        ([0, 1], [0], {"label_column": "klass"}, r"no column 'klass'.*got text, label.*--label_column"),
        ([0, 1], [0], {"text_column": "body"}, r"no column 'body'.*got text, label.*--text_column"),
        ([0, 1], [0], {"text_column": "label", "label_column": "text"}, r"'label' .* must hold text, got int64"),
    ],
)
def test_wrong_labels_are_refused_with_their_place(tmp_path: Path, train, validation, flags, expected: str):
    with pytest.raises(ConfigError, match=expected):
        load(tmp_path, train, validation, **flags)


def test_a_missing_text_is_an_empty_one(tmp_path: Path):
    path = write(tmp_path / "train.jsonl", ["a", "b"], text=[None, "two"])
    loaded = load_labelled(LabelledArguments(train_file=[path], validation_file=[path]))
    assert list(loaded.train["text"]) == ["", "two"]


def test_contradicting_flags_are_refused():
    with pytest.raises(ConfigError, match=r"must differ, got 'text' for both"):
        LabelledArguments(label_column="text")
    with pytest.raises(ConfigError, match=r"--class_names must all differ, got a b a"):
        LabelledArguments(class_names=["a", "b", "a"])


def test_names_for_another_number_of_classes_are_refused(tmp_path: Path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"text": list("abcd"), "label": [1, 0] * 2}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    arguments = LabelledArguments(train_file=[str(tmp_path / "a.parquet")], class_names=["one", "two", "three"])
    with pytest.raises(ConfigError, match=r"has 2 classes \(neg, pos\), --class_names has 3"):
        load_labelled(arguments)
