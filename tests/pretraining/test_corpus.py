"""Is the embedded corpus prose, the same everywhere, and cleanly split?"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from hf_mics.pretraining.corpus import MODULES, documents, load_embedded_corpus, split_of

ROOT = Path(__file__).resolve().parents[2]


def test_corpus_is_large_enough_for_the_quickstart():
    # Versions of Python differ by a few percent; 3.11 has 1.01 million characters.
    assert 0.7e6 < sum(len(document.text) for document in documents()) < 2e6


def test_corpus_is_the_same_in_another_process_with_another_hash_seed():
    code = (
        "import hashlib, json; from hf_mics.pretraining.corpus import documents;"
        "print(hashlib.sha256(json.dumps(documents()).encode()).hexdigest())"
    )
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == hashlib.sha256(json.dumps(documents()).encode()).hexdigest()


def test_every_document_is_in_exactly_one_split():
    splits = load_embedded_corpus()
    train, validation = (set(splits[name]["name"]) for name in ("train", "validation"))
    assert not train & validation
    assert train | validation == {document.name for document in documents()}


def test_no_paragraph_occurs_twice_so_that_validation_text_is_unseen():
    paragraphs = [paragraph for document in documents() for paragraph in document.text.split("\n")]
    assert len(paragraphs) == len(set(paragraphs))


def test_validation_is_a_few_percent_of_the_text():
    chars = {"train": 0, "validation": 0}
    for document in documents():
        chars[split_of(document.name)] += len(document.text)
    assert 0.03 < chars["validation"] / sum(chars.values()) < 0.2


def test_splits_do_not_move_between_versions():
    """Frozen: a document that changed sides would leak into the validation text of older models."""
    names = ("topic/lambda", "topic/exceptions", "module/argparse.py", "module/json/decoder.py")
    assert [split_of(name) for name in names] == ["train", "validation", "validation", "train"]
    # The last of the hash's hundredths that is held out, and the first that is not.
    assert [split_of(f"module/{name}.py") for name in ("fractions", "symtable")] == ["validation", "train"]


def test_paragraphs_are_prose():
    paragraphs = [paragraph for document in documents() for paragraph in document.text.split("\n")]
    assert not any(">>>" in paragraph or "::=" in paragraph for paragraph in paragraphs)
    the = sum(" the " in f" {paragraph.lower()} " for paragraph in paragraphs)
    assert the > 0.5 * len(paragraphs)


def test_every_listed_module_yields_text():
    found = {document.name.split("/")[1].removesuffix(".py") for document in documents() if "module/" in document.name}
    # Those whose few docstrings are too short or repeat others', in one Python or another.
    missing = set(MODULES) - found
    assert len(missing) <= 0.1 * len(MODULES), missing
