"""Where does a run stand, and which checkpoint does it resume from?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_mics.checkpoint.check import check_folder, newest
from hf_mics.errors import CheckpointError, ConfigError

PREFIX = "step_"


@dataclass
class Progress:
    """Goes into every checkpoint (`Accelerator.register_for_checkpointing`): a resumed run takes up the next batch.

    Args:
        step: optimizer steps done.
        epoch: passes over the data finished.
        sequences: sequences that all processes together have used of the pass they are in.
        train_loss: optimizer steps and the training loss there, in nats per token; `validation_loss` likewise.
    """

    step: int = 0
    epoch: int = 0
    sequences: int = 0
    train_loss: list[tuple[int, float]] = field(default_factory=list)
    validation_loss: list[tuple[int, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values, which torch loads with `weights_only`."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the values that `state_dict` returned."""
        self.__dict__.update(state)


def checkpoint_path(output_dir: str | Path, step: int) -> Path:
    """Returns the folder for the checkpoint after optimizer step `step`; names sort by step."""
    return Path(output_dir, "checkpoints", f"{PREFIX}{step:08d}")


def find_checkpoint(wanted: str, output_dir: str | Path) -> tuple[Path, str]:
    """Returns the folder of a complete checkpoint, and a line for each other that was skipped.

    Args:
        wanted: its path, or "latest" for the one below `output_dir` that was saved last.

    Raises:
        ConfigError: there is none, or the folder is not a complete checkpoint; the message says why and which are.
    """
    parent = Path(output_dir, "checkpoints")
    try:
        if wanted == "latest":
            return newest(parent, PREFIX)
        check_folder(Path(wanted))
    except CheckpointError as error:
        known = ", ".join(map(str, sorted(parent.glob(f"{PREFIX}*")))) or "none"
        raise ConfigError(
            f"not a checkpoint: expected 'latest' or a folder that --save_steps wrote, got {wanted!r}. {error} "
            f"In {output_dir}: {known}."
        ) from error
    return Path(wanted), ""
