"""Which topic does a passage of the standard library's documentation speak of? A task that needs no download.

Passages are the docstrings of the embedded corpus, a few sentences each, labelled by what the module is for: the
internet, the tools of development, or files. Held out are whole modules, the same ones that pretraining holds out, so
no text of theirs was ever seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hf_mics.pretraining.corpus import documents, split_of

if TYPE_CHECKING:
    from datasets import DatasetDict

TOPICS: dict[str, frozenset[str]] = {
    topic: frozenset(modules.split())
    for topic, modules in {
        "internet": """
            base64 email ftplib hmac html http imaplib ipaddress mailbox mimetypes poplib quopri selectors smtplib
            socket socketserver ssl urllib uuid webbrowser wsgiref xml xmlrpc
        """,
        "development": """
            ast bdb cProfile code codeop compileall dis doctest importlib inspect linecache logging modulefinder opcode
            pdb pickletools pkgutil profile pstats py_compile pyclbr pydoc rlcompleter runpy site symtable tabnanny
            timeit tokenize trace traceback tracemalloc unittest venv warnings zipapp zipimport
        """,
        "files": """
            _pyio bz2 codecs configparser copy copyreg csv dbm filecmp fileinput fnmatch genericpath glob gzip io json
            lzma ntpath os pathlib pickle plistlib posixpath shelve shutil sqlite3 stat tarfile tempfile tomllib zipfile
        """,
    }.items()
}
PASSAGE_CHARS = 300


def topic_of(name: str) -> str | None:
    """Returns the topic of the document called `name`, as in "module/json/decoder.py"; None if it has none."""
    module = name.split("/")[1].removesuffix(".py")
    is_module = name.startswith("module/")
    return next((topic for topic, modules in TOPICS.items() if is_module and module in modules), None)


def load_topics() -> DatasetDict:
    """Returns the passages as splits "train" and "validation" with the columns "text" and "label", a topic's name."""
    from datasets import Dataset, DatasetDict

    splits: dict[str, dict[str, list[str]]] = {split: {"text": [], "label": []} for split in ("train", "validation")}
    for document in documents():
        topic = topic_of(document.name)
        if topic is not None:
            passages = list(_passages(document.text))
            splits[split_of(document.name)]["text"] += passages
            splits[split_of(document.name)]["label"] += [topic] * len(passages)
    return DatasetDict({split: Dataset.from_dict(rows) for split, rows in splits.items()})


def _passages(text: str) -> Iterator[str]:
    """Joins paragraphs until a passage has `PASSAGE_CHARS` characters; the last one is what is left."""
    passage = ""
    for paragraph in text.split("\n"):
        passage = f"{passage} {paragraph}".strip()
        if len(passage) >= PASSAGE_CHARS:
            yield passage
            passage = ""
    if passage:
        yield passage
