"""Does what pip builds hold what it needs, and ask for versions on which it works?"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs", "hf_mics", "recipes", "scripts", "tests")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both archives, built as pip would build them, but by the setuptools that is installed."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=LEFT_OUT)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, source)
    code = f"from setuptools import build_meta as b; b.build_sdist({str(output)!r}); b.build_wheel({str(output)!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return output


def test_the_wheel_holds_the_package_and_nothing_else(built: Path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        entry_points = wheel.read(next(name for name in wheel.namelist() if name.endswith("entry_points.txt")))
    assert names == {path.relative_to(ROOT).as_posix() for path in files_of("hf_mics")}
    assert "hf_mics/py.typed" in names, "without it type checkers ignore the annotations of an installed hf_mics"
    assert b"hf-mics = hf_mics.cli:main" in entry_points


def test_the_source_archive_holds_what_readme_and_tests_need(built: Path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in files_of(folder)}
    wanted |= {"LICENSE", "README.md", "constraints.txt", "pyproject.toml"}
    assert not wanted - names


def files_of(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_what_is_installed_pinned_and_named_in_readme_is_what_pyproject_permits():
    """A user's pip goes by those ranges, and nothing else here would notice one that has become false."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    permitted = {need.name: need.specifier for need in map(Requirement, needed)}
    assert not {name: version(name) for name, range_ in permitted.items() if version(name) not in range_}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().split("==") for line in lines if "==" in line)
    assert not {
        name: pinned[name] for name, range_ in permitted.items() if name in pinned if pinned[name] not in range_
    }
    assert (str(permitted["torch"]), str(permitted["transformers"])) == ("<2.15,>=2.11", "<6,>=5.23")
    named = "(torch 2.11 to 2.14, accelerate 1.15, transformers 5.23 or newer;"
    assert named in " ".join((ROOT / "README.md").read_text().split())
