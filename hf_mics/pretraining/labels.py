"""Which classes do labelled texts have, and is every label one of them?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, Value

from hf_mics.errors import ConfigError
from hf_mics.pretraining.sources import SourceArguments, load_splits
from hf_mics.pretraining.topics import load_topics


@dataclass(kw_only=True)
class LabelledArguments(SourceArguments):
    """Where the labelled texts come from. Without any of these flags: passages and topics of the embedded corpus."""

    label_column: str = field(default="label", metadata={"help": "The column of classes: names, or numbers from 0."})
    class_names: list[str] | None = field(
        default=None, metadata={"help": "The classes in order; default: the data set's, or those of the training rows."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_column == self.text_column:
            raise ConfigError(f"--label_column and --text_column must differ, got {self.text_column!r} for both.")
        if self.class_names and len(set(self.class_names)) < len(self.class_names):
            raise ConfigError(f"--class_names must all differ, got {' '.join(self.class_names)}.")


class LabelledText(NamedTuple):
    """What `load_labelled` returns; the rows have the columns "text" and "label", a number from 0."""

    train: Dataset
    validation: Dataset
    names: list[str]
    """Of the classes, by number."""


def load_labelled(arguments: LabelledArguments) -> LabelledText:
    """Loads the labelled texts that `arguments` name.

    Raises:
        ConfigError: what `load_splits` raises; labels that are neither names nor whole numbers, missing, out of range,
            or unknown to the training rows; fewer than two classes.
    """
    columns = {arguments.text_column: "--text_column", arguments.label_column: "--label_column"}
    splits = load_splits(arguments, load_topics, columns)
    names = _class_names(splits["train"], arguments.label_column, arguments.class_names)
    if len(names) < 2:
        raise ConfigError(
            f"too few classes: expected at least 2 in {arguments.label_column!r}, got {names}. Name "
            "another column with --label_column."
        )
    rows = {}
    for split in ("train", "validation"):
        numbers = _numbers(splits[split][arguments.label_column], names, split)
        # A missing text is an empty one, as in pretraining.
        texts = [text or "" for text in splits[split][arguments.text_column]]
        rows[split] = Dataset.from_dict({"text": texts, "label": numbers})
    return LabelledText(rows["train"], rows["validation"], names)


def _class_names(train: Dataset, column: str, wanted: list[str] | None) -> list[str]:
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        if wanted and len(wanted) != feature.num_classes:
            raise ConfigError(
                f"the data set has {feature.num_classes} classes ({', '.join(feature.names)}), --class_names has "
                f"{len(wanted)}: {', '.join(wanted)}. Name all of them, or leave --class_names out."
            )
        return wanted or list(feature.names)
    kind = feature.dtype if isinstance(feature, Value) else str(feature)
    if not kind.startswith(("string", "large_string", "int", "uint")):
        raise ConfigError(
            f"labels must be names or whole numbers from 0, one a row; the column {column!r} holds {kind}. Convert it, "
            "or name another one with --label_column."
        )
    found = {label for label in train[column] if label is not None}
    return wanted or (sorted(found) if "string" in kind else [str(number) for number in range(len(found))])


def _numbers(labels: Sequence[Any], names: list[str], split: str) -> list[int]:
    number_of = {name: number for number, name in enumerate(names)}
    for row, label in enumerate(labels):
        where = f"in row {row} of the {split} split"
        if label is None:
            raise ConfigError(f"no label {where}: expected one of {', '.join(names)}. Fill it in or drop the row.")
        if isinstance(label, str) and label not in number_of:
            raise ConfigError(
                f"unknown label {where}: expected one of {', '.join(names)}, got {label!r}. Correct it, or list all "
                "classes with --class_names."
            )
        if not isinstance(label, str) and not 0 <= label < len(names):
            raise ConfigError(
                f"label out of range {where}: expected 0 to {len(names) - 1} for {len(names)} classes, got {label}. "
                "Number the classes from 0, write their names instead, or list them all with --class_names."
            )
    return [number_of[label] if isinstance(label, str) else int(label) for label in labels]
