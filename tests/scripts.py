"""How does a test run a script on ranks without waiting for their imports? Forked, with the launcher's environment.

A rank that `accelerate launch` starts loads torch, transformers and datasets for seconds before it does anything. These
are forked from the server of `hf_mics.testing`, which has them loaded. For scripts that do not mind what is loaded
before them; whether a launcher can start a recipe is for the tests that use `tests.recipes.launch`.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from hf_mics.testing import start_server

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "recipes" / "configs" / "cpu_2x2.yaml"
WORLD_SIZE = 4
STREAMS = ("stdout", "stderr")


class Ran(NamedTuple):
    """How a script ended on one rank, and what it wrote."""

    returncode: int | None
    stdout: str
    stderr: str


@functools.cache
def launch_environment() -> dict[str, str]:
    """What accelerate adds to the environment of the ranks that it launches with `CONFIG`: its own code is asked."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    before, added = dict(os.environ), {}

    def instead_of_torchrun(arguments: object) -> None:
        added.update({name: value for name, value in os.environ.items() if before.get(name) != value})

    with mock.patch("torch.distributed.run.run", instead_of_torchrun):
        launch_command(launch_command_parser().parse_args(["--config_file", str(CONFIG), "script.py"]))
    return added


def run_on_ranks(
    *words: str | Path | float, environment: dict[str, str] | None = None, timeout_s: float = 240.0
) -> list[Ran]:
    """Runs a script with its arguments on 4 ranks; without `environment` on those of `CONFIG`, in groups of 2.

    With a MASTER_PORT in it the ranks meet there, as launched ones do.
    """
    common = launch_environment() if environment is None else environment
    ranks = [
        {
            **common,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(WORLD_SIZE),
            "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
        }
        for rank in range(WORLD_SIZE)
    ]
    return _run(list(map(str, words)), ranks, timeout_s)


def run_alone(*words: str | Path | float, cwd: Path = ROOT, timeout_s: float = 240.0) -> Ran:
    """Runs a script with its arguments, or a module after "-m", in one process that no launcher has started."""
    (ran,) = _run(list(map(str, words)), [{}], timeout_s, cwd)
    return ran


def _run(words: list[str], environments: list[dict[str, str]], timeout_s: float, cwd: Path = ROOT) -> list[Ran]:
    context, deadline = start_server(), time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory(prefix="mics_script_") as name:
        folder = Path(name)
        files = [[folder / f"rank{rank}.{stream}" for stream in STREAMS] for rank in range(len(environments))]
        for file in (file for of_rank in files for file in of_rank):
            file.touch()
        processes = [
            context.Process(target=_main, args=(words, variables, cwd, files[rank], folder / "rendezvous"))
            for rank, variables in enumerate(environments)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        said = [[file.read_text() for file in of_rank] for of_rank in files]
    assert None not in codes, f"{words[0]} took over {timeout_s:.0f} s: exit codes {codes}\n{said[0][1][-4000:]}"
    return [Ran(code, *texts) for code, texts in zip(codes, said, strict=True)]


def _main(words: list[str], variables: dict[str, str], cwd: Path, files: list[Path], rendezvous: Path) -> None:
    """What a forked process does: what python would, up to the functions that are called at exit."""
    import torch.distributed as dist

    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY), descriptor)
    os.environ.update(variables)
    os.chdir(cwd)
    # Some libraries take a process of another name for a worker.
    multiprocessing.current_process().name = "MainProcess"
    if variables and "MASTER_PORT" not in variables:
        # They meet through a file: a port that was free a moment ago may be taken.
        store, rank = dist.FileStore(str(rendezvous), WORLD_SIZE), int(variables["RANK"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    sys.path[:0] = [str(cwd if is_module else Path(words[0]).parent), str(ROOT)]
    # Those of the server, which multiprocessing's children do not call either.
    atexit._clear()
    try:
        if is_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except Exception as error:
        sys.last_value = error
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
