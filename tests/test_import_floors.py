"""Do imports only point down? Floors as in the design: values, arithmetic, torch, Hugging Face, entry points."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hf_mics"
FLOORS = {
    0: {"errors", "topology", "meter", "presets"},
    1: {"traffic", "throughput", "planning"},
    2: {
        "_torch_compat",
        "_torch_names",
        "process_groups",
        "collectives",
        "hop2",
        "window",
        "two_hop",
        "engine",
        "clock",
        "hints",
        "loss_watch",
        "rank_watch",
        "training_meter",
        "testing",
    },
    3: {
        "calibration",
        "_hf_compat",
        "memory_probe",
        "probe_models",
        "admission",
        "model_methods",
        "after_evaluation",
        "plugin",
        "wrapping",
        "sharding",
        "absent_weights",
        "early_evaluation",
        "summary",
        "checkpoint",
        "shards_saved",
        "accelerator",
        "_trainer_compat",
        "callback",
        "pretraining",
    },
    4: {"__main__", "cli", "commands", "bench"},
}
# The package's own __init__ resolves its names at first use; it may name any module but import none of them.
LAZY = {"__init__"}
HUGGING_FACE = {"accelerate", "transformers", "datasets", "evaluate", "tokenizers"}
PRIVATE_OF = {"_torch_compat.py": "torch", "_hf_compat.py": "accelerate"}
# accelerate itself imports activation checkpointing from there; torch has no public name for it, nor for the tools of a
# memory probe.
ALLOWED_PRIVATE = {
    ("sharding.py", "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"),
    ("memory_probe.py", "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"),
    ("memory_probe.py", "torch.distributed._tools.fsdp2_mem_tracker"),
    ("memory_probe.py", "torch.distributed._tools.mod_tracker"),
    ("memory_probe.py", "torch._subclasses.fake_tensor"),
    ("memory_probe.py", "torch.testing._internal.distributed.fake_pg"),
    ("probe_models.py", "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu"),
    ("probe_models.py", "torch.ops.aten._scaled_dot_product_efficient_attention"),
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


class Import(NamedTuple):
    name: str
    """The dotted name that is imported, down to the imported attribute."""
    line: int
    where: str
    """module: runs at import; function: runs when called; typing: never runs."""


def floor_of(dotted: str) -> int | None:
    part = dotted.split(".")[1] if "." in dotted else "__init__"
    return next((floor for floor, names in FLOORS.items() if part in names), None)


def dotted_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[Import]:
    def walk(node: ast.AST, where: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = where
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inside = "function"
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inside = "typing"
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, where)
            elif isinstance(child, ast.ImportFrom):
                if child.level:
                    raise AssertionError(f"{path}:{child.lineno}: relative import; write the full name")
                for alias in child.names:
                    yield Import(f"{child.module}.{alias.name}", child.lineno, where)
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text()), "module")


def module_named(name: str) -> str | None:
    """hf_mics.meter.Tally -> hf_mics.meter."""
    while name.startswith("hf_mics"):
        path = PACKAGE.parent / name.replace(".", "/")
        if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
            return name
        name = name.rpartition(".")[0]
    return None


def of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_every_module_stands_on_a_floor():
    homeless = [of(p) for p in MODULES if p.stem not in LAZY and floor_of(dotted_name(p)) is None]
    assert not homeless, f"give these a floor in {Path(__file__).name}: {homeless}"
    names = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in MODULES}
    assert set().union(*FLOORS.values()) <= names, "FLOORS names modules that are gone"


def test_imports_point_down():
    wrong = []
    for path in MODULES:
        mine = floor_of(dotted_name(path))
        for found in imports(path):
            target = module_named(found.name)
            if target is None or mine is None or found.where == "typing":
                continue
            theirs = floor_of(target)
            if theirs is not None and theirs > mine:
                wrong.append(f"{of(path)}:{found.line} (floor {mine}) imports {target} (floor {theirs})")
    assert not wrong, "\n".join(wrong)


def test_imports_form_no_cycle():
    graph = {
        dotted_name(path): {
            target
            for found in imports(path)
            if found.where != "typing" and (target := module_named(found.name)) and target != dotted_name(path)
        }
        for path in MODULES
        if path.parent != PACKAGE or path.stem not in LAZY
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_the_package_itself_imports_none_of_its_modules():
    assert [i for i in imports(PACKAGE / "__init__.py") if module_named(i.name) and i.where == "module"] == []


def test_values_and_arithmetic_do_not_import_torch():
    """Module-level imports only: presets and throughput may use torch or transformers when called."""
    wrong = [
        f"{of(path)}:{found.line} imports {found.name}"
        for path in MODULES
        if floor_of(dotted_name(path)) in (0, 1)
        for found in imports(path)
        if found.where == "module" and found.name.split(".")[0] in {"torch", "numpy", *HUGGING_FACE}
    ]
    assert not wrong, "\n".join(wrong)


def test_only_adapters_import_hugging_face():
    wrong = [
        f"{of(path)}:{found.line} imports {found.name}"
        for path in MODULES
        if (floor_of(dotted_name(path)) or 0) < 3
        for found in imports(path)
        if found.where == "module" and found.name.split(".")[0] in HUGGING_FACE
    ]
    assert not wrong, "\n".join(wrong)


def is_private(dotted: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def private_uses(path: Path, library: str) -> Iterator[str]:
    """Private modules or names of `library` that `path` imports or reaches through an imported module."""
    aliases = {}
    tree = ast.parse(path.read_text())
    for found in imports(path):
        if found.name.split(".")[0] != library:
            continue
        aliases[found.name.rpartition(".")[2] if "." in found.name else found.name] = found.name
        module = found.name.rpartition(".")[0]
        if is_private(found.name) and not {(path.name, found.name), (path.name, module)} & ALLOWED_PRIVATE:
            yield f"{of(path)}:{found.line} imports {found.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases.update({a.asname: a.name for a in node.names if a.asname and a.name.split(".")[0] == library})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            root, _, rest = dotted.partition(".")
            used = f"{aliases.get(root)}.{rest}"
            is_name = root in aliases and rest.replace(".", "").replace("_", "").isalnum()
            if is_name and is_private(rest) and (path.name, used) not in ALLOWED_PRIVATE:
                yield f"{of(path)}:{node.lineno} uses {used}"


@pytest.mark.parametrize("library", ["torch", "accelerate"])
def test_private_names_of_the_libraries_live_in_one_file_each(library: str):
    wrong = [use for path in MODULES if PRIVATE_OF.get(path.name) != library for use in private_uses(path, library)]
    assert not wrong, "\n".join(wrong)


def test_the_private_name_finder_finds_imports_and_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A finder that finds nothing would pass everything."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import torch\nimport torch.distributed as dist\nfrom torch.distributed.fsdp._fully_shard import x\n"
        "torch._C._current_graph_task_id()\ndist._coalescing_manager()\ndist.get_rank()\n"
    )
    found = " ".join(private_uses(bad, "torch"))
    for name in ("torch.distributed.fsdp._fully_shard", "torch._C._current", "torch.distributed._coalescing_manager"):
        assert name in found
    assert "get_rank" not in found


@pytest.mark.parametrize(
    "statement",
    ["import hf_mics", "import hf_mics; dir(hf_mics)", "from hf_mics import Topology", "import hf_mics.traffic"],
)
def test_importing_the_package_loads_neither_torch_nor_hugging_face(statement: str):
    heavy = sorted({"torch", "numpy", "matplotlib", *HUGGING_FACE})
    code = f"{statement}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=PACKAGE.parent, check=False
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_public_name_resolves():
    code = "import hf_mics\nfor name in hf_mics.__all__: getattr(hf_mics, name)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent, check=False
    )
    assert done.returncode == 0, done.stderr
