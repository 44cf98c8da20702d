"""How does an unchanged script run under MiCS? `accelerate launch ... -m hf_mics [flags] script.py [args]`

Makes `accelerate.Accelerator` the MiCS one before the script is imported, then runs the script as python would: its own
`sys.argv`, `__name__ == "__main__"`, exit code, and tracebacks that start in the script.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from types import TracebackType

from hf_mics.errors import ConfigError

_USAGE = "accelerate launch --config_file mics.yaml -m hf_mics [flags] (script.py | -m package.module) [args]"


def main(arguments: list[str] | None = None) -> None:
    """Parses the flags before the script's name, replaces the Accelerator, and runs the script.

    Raises:
        SystemExit: with code 2 and a message when there is no script or it does not exist.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    as_module = options.module is not None
    target: list[str] = options.module if as_module else options.target
    if target[:1] == ["--"]:
        target = target[1:]
    if not target:
        parser.error(f"no script given. Usage: {_USAGE}")
    if not as_module and not os.path.exists(target[0]):
        parser.error(f"can't open script {target[0]!r}: no such file (searched from {os.getcwd()}).")
    try:
        # Before the module is looked for, which imports its package, which may import Accelerator.
        _put_mics_in_place(options)
    except ConfigError as error:
        parser.error(str(error))
    sys.path[0] = os.getcwd() if as_module else os.path.dirname(os.path.realpath(target[0]))
    if as_module:
        _check_module_exists(parser, target[0])
    sys.argv = target
    _start_tracebacks_in_script()
    if as_module:
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(target[0], run_name="__main__")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf_mics", usage=_USAGE, description=__doc__.splitlines()[0])
    parser.add_argument("--partition-size", type=int, help="ranks in a partition group (default: the config's)")
    parser.add_argument("--node-size", type=int, help="ranks per node (default: LOCAL_WORLD_SIZE)")
    parser.add_argument("--gradient-wire-dtype", help="what gradients travel as: auto (default), float32 or bfloat16")
    parser.add_argument(
        "--flat", action="store_true", help="one-stage collectives in groups that span nodes, for comparison"
    )
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, help="a module to run, as python's -m, then its arguments"
    )
    parser.add_argument("target", nargs=argparse.REMAINDER, help="the script to run, then its arguments")
    return parser


def _check_module_exists(parser: argparse.ArgumentParser, module: str) -> None:
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        parser.error(f"no module named {module!r} on the path (searched from {os.getcwd()}).")


def _put_mics_in_place(options: argparse.Namespace) -> None:
    import torch

    from hf_mics._hf_compat import is_switched_on, replace_accelerator
    from hf_mics.accelerator import MiCSAccelerator
    from hf_mics.plugin import keep_runner_flags

    if not is_switched_on("ACCELERATE_USE_FSDP"):
        # The runner is a promise that MiCS will be in force, and the flags alone are a full configuration.
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ.setdefault("FSDP_VERSION", "2")
    if not torch.accelerator.is_available():
        # TrainingArguments joins the job before any Accelerator exists, and without this takes a machine without
        # accelerators for a lone process.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    flags = {
        "partition_size": options.partition_size,
        "node_size": options.node_size,
        "hierarchical": False if options.flat else None,
        "gradient_wire_dtype": options.gradient_wire_dtype,
    }
    keep_runner_flags({name: value for name, value in flags.items() if value is not None})
    replace_accelerator(MiCSAccelerator)


def _start_tracebacks_in_script() -> None:
    """Leaves the runner's and runpy's frames out of tracebacks, as they are when python runs the script itself."""
    original = sys.excepthook
    ours = {__file__, runpy.__file__, "<frozen runpy>"}

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        first = trace
        while first is not None and first.tb_frame.f_code.co_filename in ours:
            first = first.tb_next
        # The interpreter's own hook prints what hangs on the exception, not what it is handed.
        original(kind, error.with_traceback(first), first)

    sys.excepthook = excepthook


if __name__ == "__main__":
    main()
