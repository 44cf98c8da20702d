"""Where does a run stand, and which checkpoint does it resume from?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_mics.errors import ConfigError

# Accelerate writes registered objects last, so a folder without this file was not finished.
LAST_FILE_WRITTEN = "custom_checkpoint_0.pkl"


@dataclass
class Progress:
    """Goes into every checkpoint (`Accelerator.register_for_checkpointing`): a resumed run takes up the next batch.

    Args:
        step: optimizer steps done.
        epoch: passes over the data finished.
        batch: micro-batches that each process has used of the pass it is in.
        train_loss: optimizer steps and the training loss there, in nats per token; `validation_loss` likewise.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
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
    return Path(output_dir, "checkpoints", f"step_{step:08d}")


def find_checkpoint(wanted: str, output_dir: str | Path) -> Path:
    """Returns the folder of a checkpoint made by `Accelerator.save_state` with a registered object.

    Args:
        wanted: its path, or "latest" for the newest below `output_dir`.

    Raises:
        ConfigError: there is none, or the folder is not a (complete) checkpoint; the message lists those that are.
    """
    complete = [path for path in sorted(Path(output_dir, "checkpoints").glob("step_*")) if is_checkpoint(path)]
    if wanted == "latest" and complete:
        return complete[-1]
    if wanted != "latest" and is_checkpoint(Path(wanted)):
        return Path(wanted)
    raise ConfigError(
        f"Not a checkpoint: expected 'latest' or a folder that holds {LAST_FILE_WRITTEN}, as --save_steps writes them, "
        f"got {wanted!r}. Checkpoints in {output_dir}: {', '.join(map(str, complete)) or 'none'}."
    )


def is_checkpoint(path: Path) -> bool:
    """Returns whether `path` is a folder in which accelerate finished writing a checkpoint."""
    return (path / LAST_FILE_WRITTEN).is_file()
