"""Checkpoints of a training stage: safetensors and JSON, complete or absent, one form for any number of processes.

CHECKPOINTS/000064000/{model,ema,optimizer}.safetensors and state.json; the folder's name is the number of samples seen.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from instaflow.errors import DataError
from instaflow.files import replace_folder, write_json


@dataclass(frozen=True)
class Checkpoint:
    """Everything that training needs to go on as if it had never stopped."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """"NAME/exp_avg", "NAME/exp_avg_sq" and "NAME/step" for each parameter."""
    state: dict[str, Any]
    """samples_seen and whatever else the loop counts."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2, keep_every: int | None = None) -> Path:
    """Write a checkpoint and drop all but the last `keep`, and the first at or past each `keep_every` samples.

    Returns its folder.
    """
    final = folder / f"{checkpoint.state['samples_seen']:012d}"
    temporary = folder / f".{final.name}.tmp"
    for unfinished in folder.glob(".*.tmp"):  # of a killed run
        shutil.rmtree(unfinished)
    temporary.mkdir(parents=True)
    for name in ("model", "ema", "optimizer"):
        tensors = {key: value.detach().contiguous() for key, value in getattr(checkpoint, name).items()}
        save_file(tensors, temporary / f"{name}.safetensors")
    write_json(temporary / "state.json", checkpoint.state)
    replace_folder(temporary, final)
    marks = 0
    for old in complete_checkpoints(folder)[:-keep]:
        if keep_every and int(old.name) // keep_every > marks:
            marks = int(old.name) // keep_every
            continue
        shutil.rmtree(old.rename(folder / f".{old.name}.tmp"))  # no half of it under its final name
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first; one that a kill left unfinished has another name."""
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, or None where there is none. Raises DataError if it is damaged."""
    found = complete_checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        parts = {name: load_file(newest / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}
        return Checkpoint(**parts, state=json.loads((newest / "state.json").read_text()))
    except Exception as error:  # safetensors raises its own kinds
        raise DataError(
            f"The checkpoint '{newest}' is damaged: {error}", f"Delete it to go on from the one before: rm -r {newest}"
        ) from error
