"""Where do documents come from: the hub, local files, or what every Python carries?

Whatever the source, the result is two splits, "train" and "validation", with the columns that were asked for. Works
alike on `datasets.Dataset` and on `datasets.IterableDataset` (streaming).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from datasets import Dataset, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetsError
from datasets.table import CastError

from hf_mics.errors import ConfigError
from hf_mics.pretraining.arguments import require_at_least

AnyDataset: TypeAlias = Dataset | IterableDataset

BUILDERS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
MAX_VALIDATION_FRACTION = 0.1
PROBE_BYTES = 1 << 20


@dataclass(kw_only=True)
class SourceArguments:
    """Where the documents come from; the same flags for every recipe. Without any of them: embedded text."""

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

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_file:
            raise ConfigError(
                f"two sources of text: expected --dataset_name or --train_file, got both ({self.dataset_name!r} and "
                f"{self.train_file}). Leave one out."
            )
        if self.validation_file and not self.train_file:
            raise ConfigError("--validation_file needs --train_file: got files to validate on but none to train on.")
        if self.dataset_config and not self.dataset_name:
            raise ConfigError(f"--dataset_config needs --dataset_name: got {self.dataset_config!r} and no data set.")
        require_at_least(1, validation_documents=self.validation_documents)


def load_splits(
    arguments: SourceArguments,
    embedded: Callable[[], Mapping[str, AnyDataset]],
    columns: Mapping[str, str],
    streaming: bool = False,
) -> dict[str, AnyDataset]:
    """Loads what `arguments` name, or else what `embedded` returns.

    Args:
        columns: the columns that are wanted, each with the flag that names it.
        streaming: read while training, never the whole into the cache.

    Returns:
        Splits "train" and "validation" with those columns and no others. Where the source has no validation split,
        documents are held out of the training split: random ones of a fixed seed, or the first of a stream.

    Raises:
        ConfigError: missing, empty or mixed files; unknown data set; no such column; too few documents to hold any out.
    """
    if arguments.dataset_name:
        splits = _load_from_hub(arguments, streaming)
    elif arguments.train_file:
        splits = {"train": _load_files(arguments.train_file, streaming)}
        if arguments.validation_file:
            splits["validation"] = _load_files(arguments.validation_file, streaming)
    else:
        splits = dict(embedded())
        if streaming:
            splits = {name: split.to_iterable_dataset() for name, split in splits.items()}
    for name, split in splits.items():
        _check_columns(split, name, columns)
        _check_is_text(split, name, arguments.text_column)
    if "validation" not in splits:
        splits = _hold_out(splits["train"], arguments.validation_documents)
    return {name: split.select_columns(list(columns)) for name, split in splits.items()}


def _load_from_hub(arguments: SourceArguments, streaming: bool) -> dict[str, AnyDataset]:
    name = arguments.dataset_name
    try:
        loaded = load_dataset(name, arguments.dataset_config, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError(
            f"cannot load the data set {name!r} (configuration {arguments.dataset_config!r}): {error} "
            "Check the name and the network, or leave --dataset_name out to train on embedded text."
        ) from None
    if "train" not in loaded:
        raise ConfigError(
            f"the data set {name!r} must have a split 'train', got {', '.join(map(str, loaded))}. Take another, or "
            "pass files with --train_file."
        )
    return {split: loaded[split] for split in ("train", "validation") if split in loaded}


def _load_files(files: list[str], streaming: bool) -> AnyDataset:
    """Loads local files of one kind. Text files with blank lines are read by paragraphs, ones without by lines."""
    suffixes = {Path(file).suffix.lower() for file in files}
    if len(suffixes) != 1 or not suffixes <= BUILDERS.keys():
        raise ConfigError(f"text files must be of one kind of {', '.join(BUILDERS)}; got {', '.join(files)}.")
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f"no such text file: {file} (absolute path {Path(file).resolve()}).")
        if not Path(file).stat().st_size:
            raise ConfigError(f"the text file {file} is empty: expected documents, got 0 bytes.")
    builder = BUILDERS[suffixes.pop()]
    options = {"sample_by": _sample_by(files)} if builder == "text" else {}
    try:
        dataset = load_dataset(builder, data_files={"train": files}, split="train", streaming=streaming, **options)
        is_empty = next(iter(dataset), None) is None
    except (OSError, ValueError, DatasetsError) as error:
        cause: object = error.__cause__ or error
        if isinstance(cause, CastError):
            both = cause.requested_column_names, cause.table_column_names
            first, other = (", ".join(sorted(names)) for names in both)
            cause = f"all of it must have the same columns, got {first} first and {other} later. Take out what differs."
        raise ConfigError(f"cannot read {', '.join(files)} as {builder}: {cause}") from None
    if is_empty:
        raise ConfigError(f"no documents in {', '.join(files)}: expected at least one, got none.")
    return dataset


def _sample_by(files: list[str]) -> str:
    """Returns what a document is in all of the text `files`: a "paragraph" or a "line"."""
    found: dict[str, str] = {}
    for file in files:
        with open(file, "rb") as opened:
            start = opened.read(PROBE_BYTES).replace(b"\r\n", b"\n").replace(b"\r", b"\n").strip()
        if b"\n" in start:  # a single line is one document either way
            found.setdefault("paragraph" if b"\n\n" in start else "line", file)
    if len(found) > 1:
        raise ConfigError(
            "text files must all have blank lines between their documents, or all one document a line: "
            f"{found['paragraph']} has blank lines, {found['line']} has none. Convert one of them, or take jsonl."
        )
    return next(iter(found), "line")


def _check_columns(dataset: AnyDataset, split: str, wanted: Mapping[str, str]) -> None:
    columns = list(dataset.column_names or next(iter(dataset), {}))
    for column, flag in wanted.items():
        if column not in columns:
            raise ConfigError(
                f"no column {column!r} in the {split} split: expected a column {column!r}, got "
                f"{', '.join(columns) or 'none'}. Name the right one with {flag}."
            )


def _check_is_text(dataset: AnyDataset, split: str, text_column: str) -> None:
    feature = dataset.features[text_column] if dataset.features else Value("string")
    if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string")):
        raise ConfigError(
            f"the column {text_column!r} of the {split} split must hold text, got "
            f"{getattr(feature, 'dtype', feature)}. Name another one with --text_column."
        )


def _hold_out(dataset: AnyDataset, num_documents: int) -> dict[str, AnyDataset]:
    if isinstance(dataset, IterableDataset):
        splits: dict[str, AnyDataset] = {
            "train": dataset.skip(num_documents),
            "validation": dataset.take(num_documents),
        }
        if next(iter(splits["train"]), None) is None:
            raise ConfigError(
                f"nothing left to train on: the stream ends within the {num_documents} documents that are held out for "
                "validation. Pass --validation_file, or a smaller --validation_documents."
            )
        return splits
    size = min(num_documents, max(1, int(MAX_VALIDATION_FRACTION * len(dataset))))
    if len(dataset) < 2:
        raise ConfigError(
            f"too few documents to hold one out for validation: expected at least 2, got {len(dataset)}. Pass "
            "--validation_file, or text with more paragraphs or lines."
        )
    held_out = dataset.train_test_split(test_size=size, seed=0)
    return {"train": held_out["train"], "validation": held_out["test"]}
