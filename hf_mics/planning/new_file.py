"""How is a result written without losing what stands in its place?"""

from __future__ import annotations

from pathlib import Path

from hf_mics.errors import ConfigError


def write_new(path: Path, text: str, *, force: bool) -> None:
    """Writes `text`, never over another file unless `force` says so.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise already_there(path) from None
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}.") from None


def already_there(path: Path) -> ConfigError:
    """The mistake of naming a file that exists, without `--force`."""
    return ConfigError(f"{str(path)!r} exists and is not overwritten: choose another name, or add --force.")
