"""How does one process per node run inside its namespace, get watched, and get killed with everything it started?"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from hf_mics.bench import cluster_state
from hf_mics.errors import MiCSError


@dataclass(frozen=True)
class NodeResult:
    """How the process of one node ended.

    Attributes:
        node: which node.
        returncode: its exit code, negative for a signal.
        stdout: what it and its children wrote to standard output.
        stderr: the same for standard error.
        wall_s: seconds from start to end.
        timed_out: whether it was killed because the time was up.
    """

    node: int
    returncode: int
    stdout: str
    stderr: str
    wall_s: float
    timed_out: bool


class NodeProcesses:
    """One running process per node; a context manager that leaves none behind.

    Args:
        commands: the command of each node, by node, which takes itself there.
        names: the namespace of each node, by node.
        environment: the whole environment of every process.
    """

    def __init__(
        self, commands: Mapping[int, list[str]], names: Mapping[int, str], environment: Mapping[str, str]
    ) -> None:
        self._names = names
        self._began_s = time.monotonic()
        self._ended_s: dict[int, float] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="mics_nodes_")
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        try:
            for node, command in commands.items():
                # Files, not pipes: nobody has to read them while the nodes run.
                with self._file(node, "out").open("wb") as out, self._file(node, "err").open("wb") as err:
                    self._processes[node] = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        env=dict(environment),
                        start_new_session=True,
                    )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def running(self) -> list[int]:
        """Nodes whose process has not ended."""
        for node, process in self._processes.items():
            if node not in self._ended_s and process.poll() is not None:
                self._ended_s[node] = time.monotonic()
        return [node for node in self._processes if node not in self._ended_s]

    def output(self, node: int) -> tuple[str, str]:
        """What the node has written so far: (standard output, standard error)."""
        out, err = (self._file(node, kind).read_text(errors="replace") for kind in ("out", "err"))
        return out, err

    def kill(self, node: int) -> None:
        """Kills everything that runs on the node at once, as a power cut would."""
        process = self._processes[node]
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        # Launchers put their workers in sessions of their own, which the group's signal does not reach.
        cluster_state.kill_all_in(self._names[node])
        process.wait()
        self._ended_s.setdefault(node, time.monotonic())

    def wait(self, timeout_s: float) -> list[NodeResult]:
        """Waits until every node's process has ended, and kills all that are left `timeout_s` after the start.

        On Ctrl-C or any other exception every process is killed before it is passed on.
        """
        late: list[int] = []
        try:
            while running := self.running():
                if time.monotonic() > self._began_s + timeout_s:
                    late = running
                    break
                time.sleep(0.05)
        finally:
            self._kill_all()
        return [
            NodeResult(
                node=node,
                returncode=process.returncode,
                stdout=self.output(node)[0],
                stderr=self.output(node)[1],
                wall_s=self._ended_s[node] - self._began_s,
                timed_out=node in late,
            )
            for node, process in self._processes.items()
        ]

    def close(self) -> None:
        """Kills what still runs and deletes the captured output."""
        self._kill_all()
        self._folder.cleanup()

    def _kill_all(self) -> None:
        for node in self._processes:
            self.kill(node)

    def _file(self, node: int, kind: str) -> Path:
        return Path(self._folder.name) / f"{node}.{kind}"


def require_success(results: list[NodeResult]) -> list[NodeResult]:
    """`results`, if every node ended well.

    Raises:
        MiCSError: some did not; the message holds the last lines of each of them.
    """
    failed = [result for result in results if result.returncode or result.timed_out]
    if failed:
        parts = []
        for result in failed:
            how = f"was killed after {result.wall_s:.0f} s" if result.timed_out else f"exited {result.returncode}"
            parts.append(f"node {result.node} {how}:\n{(result.stderr or result.stdout)[-3000:]}")
        raise MiCSError("\n".join(parts))
    return results
