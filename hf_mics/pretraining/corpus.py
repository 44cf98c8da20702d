"""What text is there to learn from when nothing has been downloaded? The English that every Python carries.

Two sources, both read and never imported or run: the language reference in `pydoc_data.topics`, and the docstrings of
the standard library's sources. Code is left out: at quickstart scale a model learns one language, and prose shows
progress to the eye. It makes 1.2 MB.

The modules are listed by name, so that all installations of one Python version give the same corpus, whatever their
packager split off (tkinter, test, idlelib), and other versions nearly the same. Modules removed since Python 3.11 are
not on the list, nor those whose docstrings are mostly tables of doctests (decimal).
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from datasets import DatasetDict

MODULES = """
    _collections_abc _pyio abc argparse ast asyncio base64 bdb bisect bz2 cProfile calendar cmd code codecs
    codeop collections colorsys compileall concurrent configparser contextlib copy copyreg csv ctypes curses
    dataclasses datetime dbm difflib dis doctest email enum filecmp fileinput fnmatch fractions ftplib functools
    genericpath getopt getpass gettext glob graphlib gzip hashlib heapq hmac html http imaplib importlib inspect io
    ipaddress json keyword linecache locale logging lzma mailbox mimetypes modulefinder multiprocessing ntpath
    numbers opcode operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint
    profile pstats pty py_compile pyclbr pydoc queue quopri random re reprlib rlcompleter runpy sched secrets selectors
    shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl stat statistics string stringprep subprocess
    symtable sysconfig tabnanny tarfile tempfile textwrap threading timeit tokenize tomllib trace traceback
    tracemalloc types typing unittest urllib uuid venv warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp
    zipfile zipimport zoneinfo
""".split()  # noqa: SIM905

MIN_PARAGRAPH_CHARS = 60
MIN_LETTER_FRACTION = 0.88  # spaces count as letters; of English prose it is about 0.95, of code 0.8
VALIDATION_PERCENT = 6


class Document(NamedTuple):
    """A piece of the corpus.

    `name` says where it is from: "topic/lambda", "module/json/decoder.py". `text` holds its paragraphs, one a line.
    """

    name: str
    text: str


def split_of(name: str) -> str:
    """Returns "train" or "validation" for the document called `name`: by a fixed hash, the same everywhere."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "validation" if bucket < VALIDATION_PERCENT else "train"


@cache
def documents() -> tuple[Document, ...]:
    """Returns the corpus in a fixed order. A paragraph that occurs more than once is kept where it is first."""
    seen: set[str] = set()
    result = []
    for name, text in [*_topics(), *_modules()]:
        # A dict and not a set: it drops repetitions within the document and keeps the order.
        paragraphs = [part for part in dict.fromkeys(_paragraphs(text)) if part not in seen]
        seen.update(paragraphs)
        if paragraphs:
            result.append(Document(name, "\n".join(paragraphs)))
    return tuple(result)


def load_embedded_corpus() -> DatasetDict:
    """Returns the corpus as splits "train" and "validation" with the columns "name" and "text", a row per document."""
    from datasets import Dataset, DatasetDict

    splits: dict[str, list[Document]] = {"train": [], "validation": []}
    for document in documents():
        splits[split_of(document.name)].append(document)
    return DatasetDict(
        {
            split: Dataset.from_dict({"name": [d.name for d in rows], "text": [d.text for d in rows]})
            for split, rows in splits.items()
        }
    )


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"topic/{name}", topics[name])


def _modules() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for module in MODULES:
        package = root / module
        for path in sorted(package.rglob("*.py")) if package.is_dir() else [package.with_suffix(".py")]:
            relative = path.relative_to(root)
            if path.is_file() and "test" not in relative.parts:
                yield Document(f"module/{relative.as_posix()}", _docstrings(path.read_text("utf-8", errors="replace")))


def _docstrings(source: str) -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    found = sorted((getattr(node, "lineno", 0), ast.get_docstring(node) or "") for node in nodes)
    return "\n\n".join(text for _, text in found)


def _paragraphs(text: str) -> Iterator[str]:
    """Yields the paragraphs that are prose, their lines joined; leaves out code, doctests, tables and grammar."""
    for part in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in part.splitlines() if re.search(r"\w", line)]
        paragraph = re.sub(r"\s+", " ", " ".join(lines))
        letters = sum(char.isalpha() or char == " " for char in paragraph)
        is_prose = letters > MIN_LETTER_FRACTION * len(paragraph) and paragraph.endswith((".", ":", "!", "?", ")"))
        if is_prose and len(paragraph) >= MIN_PARAGRAPH_CHARS and ">>>" not in paragraph and "::=" not in paragraph:
            yield paragraph
