"""Where are the peers installed? Each release in an environment of its own, from an extra of this project."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from hf_mics.bench.configuration import OWN_ENVIRONMENT, SYSTEMS
from hf_mics.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runs" / "venvs"
PEERS = tuple(sorted({system.environment for system in SYSTEMS.values()} - {OWN_ENVIRONMENT}))
# What a rank imports beside the peer; versions are those that constraints.txt pins for this project's own.
_SHARED = ("torch", "transformers", "accelerate", "psutil")


def interpreter(environment: str) -> Path:
    """The Python that runs systems of `environment`.

    Raises:
        ConfigError: a peer that is not installed.
    """
    if environment == OWN_ENVIRONMENT:
        return Path(sys.executable)
    python = _folder(environment) / "bin" / "python"
    if not python.exists():
        raise ConfigError(
            f"{' '.join(_pins(environment))} is not installed: expected it in {_folder(environment)}. Run "
            "`scripts/bench setup` (a few hundred MB per peer), or leave its systems out with --only."
        )
    return python


def is_installed(environment: str) -> bool:
    """Whether systems of `environment` can run."""
    return environment == OWN_ENVIRONMENT or (_folder(environment) / "bin" / "python").exists()


def install(environment: str) -> None:
    """Creates the peer's environment and installs what the extra of its name pins; nothing if it is there.

    Raises:
        ConfigError: pip failed; its own words are on standard error.
    """
    if is_installed(environment):
        return
    folder = _folder(environment)
    building = folder.with_suffix(".part")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(building)], check=True)
    pip = [str(building / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    # DeepSpeed's build imports torch, so torch comes first and the build is not isolated. Its kernels are not needed.
    for command in (
        [*pip, *constraints, "setuptools", "wheel", *_SHARED],
        ["env", "DS_BUILD_OPS=0", *pip, "--no-build-isolation", *constraints, *_pins(environment)],
    ):
        if subprocess.run(command, check=False).returncode:
            raise ConfigError(f"`{' '.join(command)}` failed, so {environment} is not installed.")
    building.rename(folder)


def _folder(environment: str) -> Path:
    (pin,) = _pins(environment)
    return FOLDER / pin.replace("==", "-")


def _pins(environment: str) -> list[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return list(extras[environment])
