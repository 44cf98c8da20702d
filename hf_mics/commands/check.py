"""What will an existing accelerate config do under MiCS, and what is wrong with it?"""

from __future__ import annotations

import argparse

from hf_mics.commands.config_check import check_config
from hf_mics.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("file", help="accelerate config, YAML or JSON")


def run(options: argparse.Namespace) -> None:
    """Prints the explanation; every mistake is an error."""
    report = check_config(options.file)
    if report.explanation:
        print("\n".join(report.explanation))
    for note in report.notes:
        print(f"note: {note}")
    if report.mistakes:
        count = "one mistake" if len(report.mistakes) == 1 else f"{len(report.mistakes)} mistakes"
        raise ConfigError("\n  ".join([f"{options.file} has {count}:", *report.mistakes]))
    print("no mistakes found")
