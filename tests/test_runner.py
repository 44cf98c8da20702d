"""Does `python -m hf_mics` put unchanged scripts under MiCS, and otherwise behave as python does?

A launch of it, with a script that imports the Trainer after it, is in test_callback.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_mics.errors import ConfigError
from hf_mics.plugin import MiCSPlugin, keep_runner_flags, with_runner_flags
from tests.scripts import ROOT, run_alone, run_on_ranks

ASSETS = Path(__file__).parent / "assets"


def run_both(*commands: tuple[str | Path, ...]) -> list[subprocess.CompletedProcess[str]]:
    """Runs python with each of two command lines, at the same time."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(command: tuple[str | Path, ...]) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, *map(str, command)]
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)

    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(run, commands))


def count_on_ranks(folder: Path, *command: str | Path) -> list[dict]:
    """Runs a script under the runner on 4 ranks, and returns each rank's counts."""
    ranks = run_on_ranks(ASSETS / "run_and_report.py", folder, *command)
    assert all(rank.returncode == 0 for rank in ranks), ranks[0].stderr[-4000:]
    stderr = "".join(rank.stderr for rank in ranks)
    assert stderr.count("MiCS: 4 ranks on 1 node of 4, 2 partition groups of 2") == 1
    reports = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert all(len(report) == 1 for report in reports)
    return [report[0] for report in reports]


def test_accelerate_script_with_accumulate_runs_hop_2_once_per_optimizer_step(tmp_path: Path) -> None:
    for counts in count_on_ranks(tmp_path, ASSETS / "accelerate_causal.py", "--epochs", "2"):
        # 40 rows on 4 ranks in batches of 2 are 5 micro-steps an epoch: windows of 2, 2 and 1.
        assert counts["topology"] == [4, 4, 2]
        assert counts["all_reduce/replication"] == 2 * 3 * counts["units"]
        assert counts["reduce_scatter/partition"] == 2 * 5 * counts["units"]


def test_accelerate_script_with_no_sync_by_hand_runs_hop_2_once_per_optimizer_step(tmp_path: Path) -> None:
    for counts in count_on_ranks(tmp_path, ASSETS / "accelerate_classifier.py", tmp_path / "state"):
        assert counts["all_reduce/replication"] == 3 * counts["units"]
        assert counts["reduce_scatter/partition"] == 3 * 4 * counts["units"]


def test_trainer_script_runs_hop_2_once_per_optimizer_step(tmp_path: Path) -> None:
    for counts in count_on_ranks(tmp_path, ASSETS / "trainer_causal.py", tmp_path / "out"):
        # 72 rows on 4 ranks in batches of 2 are 9 micro-steps an epoch: four windows of 2 and one of 1.
        assert counts["all_reduce/replication"] == 2 * 5 * counts["units"]
        assert counts["reduce_scatter/partition"] == 2 * 9 * counts["units"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "tool").mkdir()
    (folder / "tool" / "__init__.py").write_text("")
    show = "import json, sys\nprint(json.dumps([sys.argv, __name__, sys.path[0], sys.modules['__main__'].__name__]))\n"
    (folder / "tool" / "show.py").write_text(show)
    (folder / "show.py").write_text(show + "import accelerate; print(accelerate.Accelerator.knows_mics)\nsys.exit(7)\n")
    (folder / "eager").mkdir()
    (folder / "eager" / "__init__.py").write_text("from accelerate import Accelerator\n")
    (folder / "eager" / "run.py").write_text("from eager import Accelerator; print(Accelerator.knows_mics)\n")
    (folder / "plugin.py").write_text(
        "from accelerate import Accelerator\n"
        "from accelerate.utils import FullyShardedDataParallelPlugin\n"
        "a = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=False))\n"
        "print(a.mics_plugin.settings(), a.mics_plugin.reshard_after_forward)\n"
    )
    (folder / "own.py").write_text("import hf_mics; print(hf_mics.MiCSAccelerator().mics_plugin.settings(), True)\n")
    (folder / "fail.py").write_text("def inner():\n    raise KeyError('mine')\n\ninner()\n")
    return folder


def test_script_sees_its_own_argv_and_name_and_sets_the_exit_code(package: Path) -> None:
    words = (package / "show.py", "--partition-size", "x", "-m")
    ours, alone = run_both(("-m", "hf_mics", "--partition-size", "2", *words), words)
    assert ours.returncode == 7
    assert ours.stdout.splitlines()[0] == alone.stdout.splitlines()[0]
    assert ours.stdout.splitlines()[1] == "True"


def test_module_runs_as_under_python_m(package: Path) -> None:
    ours = run_alone("-m", "hf_mics", "-m", "tool.show", "a", cwd=package)
    alone = run_alone("-m", "tool.show", "a", cwd=package)
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == alone.stdout


def test_module_whose_package_imports_accelerator_early_gets_the_mics_one(package: Path) -> None:
    result = run_alone("-m", "hf_mics", "-m", "eager.run", cwd=package)
    assert result.stdout == "True\n", result.stderr


@pytest.mark.parametrize(("script", "reshards"), [("own.py", True), ("plugin.py", False)])
def test_flags_hold_for_a_mics_accelerator_and_for_accelerates_own_fsdp_plugin(
    package: Path, script: str, reshards: bool
) -> None:
    result = run_alone("-m", "hf_mics", "--flat", "--gradient-wire-dtype", "float32", package / script)
    expected = {"partition_size": None, "node_size": None, "hierarchical": False, "gradient_wire_dtype": "float32"}
    assert result.stdout == f"{expected} {reshards}\n", result.stderr


def test_flags_fill_in_what_the_scripts_own_plugin_leaves_out_and_contradict_nothing(monkeypatch) -> None:
    monkeypatch.setattr("hf_mics.plugin._RUNNER_FLAGS", {})
    keep_runner_flags({"partition_size": 2, "hierarchical": False})
    expected = {"partition_size": 2, "node_size": None, "hierarchical": False, "gradient_wire_dtype": "float32"}
    own = MiCSPlugin(gradient_wire_dtype="float32", hierarchical=False)
    assert with_runner_flags(own).settings() == expected
    assert with_runner_flags(own) is own
    with pytest.raises(ConfigError, match=r"partition_size=4 against --partition-size \(2\)"):
        with_runner_flags(MiCSPlugin(partition_size=4))


def test_traceback_starts_in_the_script(package: Path) -> None:
    ours, alone = run_both(("-m", "hf_mics", package / "fail.py"), (package / "fail.py",))
    assert ours.returncode == alone.returncode == 1
    assert ours.stderr[ours.stderr.index("Traceback") :] == alone.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "no script given"),
        (("nowhere.py",), "can't open script 'nowhere.py'"),
        (("-m", "no.such.module"), "no module named 'no.such.module'"),
        (("--gradient-wire-dtype", "int8", __file__), "gradient_wire_dtype must be one of auto, float32, bfloat16"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_why(arguments: tuple[str, ...], expected: str) -> None:
    result = run_alone("-m", "hf_mics", *arguments)
    assert result.returncode == 2
    assert expected in result.stderr
