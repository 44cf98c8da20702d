"""How does a test run a function on several ranks of this machine?

Ranks are forked from a server that has torch and transformers loaded, so that a spawn costs tenths of a second; they
meet through a temporary file, never a port. Every spawn has a time limit.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

# Torch imports its compiler at an optimizer's first step, and transformers its Trainer when somebody asks for it: one
# or two seconds each, which every rank would spend anew.
_PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "accelerate",
    "transformers",
    "transformers.trainer",
    "hf_mics.accelerator",
]


def start_server(*modules: str) -> ForkServerContext:
    """Starts the server that ranks are forked from, with `modules` loaded as well, unless it runs already.

    Modules that cannot be imported are passed over. It loads them while the caller goes on.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOAD, *modules])
    forkserver.ensure_running()
    return context


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    node_size: int | None = None,
    timeout_s: float = 240.0,
    backend: str | None = "gloo",
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Calls `function(*args)` on `world_size` ranks of this machine and returns their results in rank order.

    Each rank finds the launcher's variables (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE) for nodes of `node_size`,
    one thread, and a process group over `backend` (None: no process group). Over NCCL, LOCAL_RANK is the rank whatever
    `node_size`, and a rank's device that modulo the number of GPUs; otherwise GPUs are hidden. `function` and its
    results must be picklable.

    Raises:
        AssertionError: a rank raised (its traceback is in the message), died, or `timeout_s` seconds passed.
    """
    context = start_server()
    node_size = node_size or world_size
    with tempfile.TemporaryDirectory(prefix="mics_ranks_") as folder:
        ranks: list[tuple[BaseProcess, Connection]] = []
        for rank in range(world_size):
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                # Emulated nodes share this machine's GPUs, and over NCCL every rank needs one of its own.
                "LOCAL_RANK": str(rank if backend == "nccl" else rank % node_size),
                **({} if backend == "nccl" else {"CUDA_VISIBLE_DEVICES": ""}),
                "LOCAL_WORLD_SIZE": str(node_size),
                "MASTER_ADDR": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                **(environment or {}),
            }
            receiver, sender = context.Pipe(duplex=False)
            rendezvous = os.path.join(folder, "rendezvous")
            process: BaseProcess = context.Process(
                target=_rank_main,
                args=(function, args, variables, backend, rendezvous, list(sys.path), sender),
                daemon=True,
            )
            process.start()
            sender.close()
            ranks.append((process, receiver))
        try:
            return _collect(ranks, time.monotonic() + timeout_s, timeout_s)
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


def _collect(ranks: list[tuple[BaseProcess, Connection]], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        for rank, (process, receiver) in enumerate(ranks):
            if rank in results or not receiver.poll(0.02):
                continue
            try:
                failed, payload = pickle.loads(receiver.recv_bytes())
            except EOFError:
                process.join()
                raise AssertionError(f"rank {rank} died with exit code {process.exitcode}") from None
            if failed:
                raise AssertionError(f"rank {rank} raised:\n{payload}")
            results[rank] = payload
        if time.monotonic() > deadline:
            waiting = [rank for rank in range(len(ranks)) if rank not in results]
            raise AssertionError(f"ranks {waiting} did not finish within {timeout_s:.0f} s")
    return [results[rank] for rank in range(len(ranks))]


def _rank_main(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    variables: dict[str, str],
    backend: str | None,
    rendezvous: str,
    path: list[str],
    sender: Connection,
) -> None:
    import torch
    import torch.distributed as dist

    sys.path[:] = path
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        if backend is not None:
            rank, world_size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
            if backend == "nccl":
                torch.cuda.set_device(int(variables["LOCAL_RANK"]) % torch.cuda.device_count())
            dist.init_process_group(
                backend, store=dist.FileStore(rendezvous, world_size), rank=rank, world_size=world_size
            )
            # A rank whose function is done at once would leave while others connect to it: "Connection closed by peer",
            # seen on a busy machine.
            dist.barrier()
        outcome = False, function(*args)
    except BaseException:
        outcome = True, traceback.format_exc()
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    if dist.is_initialized() and not outcome[0]:
        dist.destroy_process_group()
