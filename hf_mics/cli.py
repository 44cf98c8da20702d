"""What can be asked of hf_mics from a shell? `hf-mics COMMAND ...`

Each command is a module of `hf_mics.commands` with two functions, `add_arguments(parser)` and `run(options)`. Only the
one that is asked for is imported, so that help is instant and no command waits for another's libraries.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

import hf_mics
from hf_mics.errors import MiCSError, did_you_mean

COMMANDS: dict[str, str] = {
    "plan": "choose the partition size for a model on a cluster: memory, traffic and time of each, without GPUs",
    "config": "write the accelerate config for given partition groups",
    "check": "explain what an accelerate config will do under MiCS, with the mistakes that it would hide",
    "measure": "measure a cluster's links and computing, under accelerate launch, and write a cluster file",
    "simulate": "predict weak and strong scaling of MiCS and its peers, as tables and plots",
    "export": "turn a training checkpoint into a folder that from_pretrained loads",
}
"""What each command does, in the words of `hf-mics --help`."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that `arguments` (default `sys.argv[1:]`) name and returns its exit code.

    A mistake of the user's (a `MiCSError`) is one message on standard error and exit code 2. A reader that went away,
    as in `hf-mics plan ... | head`, is nobody's: exit code 1 without a word.
    """
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            # What is still buffered meets the closed pipe here, and not where the interpreter would report it.
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(words: list[str]) -> int:
    asked = next((word for word in words if not word.startswith("-")), None)
    parser = _parser(asked)
    if asked is not None and asked not in COMMANDS:
        hint = did_you_mean(asked, COMMANDS)
        parser.error(f"unknown command: expected one of {', '.join(COMMANDS)}, got {asked!r}.{hint}")
    options = parser.parse_args(words)
    try:
        code: int | None = options.run(options)
    except MiCSError as error:
        print(f"hf-mics {options.command}: error: {error}", file=sys.stderr)
        return 2
    return code or 0


def _parser(asked: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-mics", description=hf_mics.__doc__)
    parser.add_argument("--version", action="version", version=f"hf-mics {hf_mics.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == asked:
            module = import_module(f"hf_mics.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
