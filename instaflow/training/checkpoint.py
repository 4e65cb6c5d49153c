"""Checkpoints of a training stage: safetensors and JSON, complete or absent, one form for any number of processes.

CHECKPOINTS/000064000/{model,ema,optimizer}.safetensors and state.json, which holds their hashes; the folder's name is
the number of samples seen.
A second network that is trained beside the first has critic-model, critic-ema and critic-optimizer.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from instaflow.errors import DataError
from instaflow.files import replace_folder, sha256_of, write_json

PARTS = ("model", "ema", "optimizer")
CRITIC = tuple(f"critic-{part}" for part in PARTS)
DIGITS = "[0-9]" * 12
"""A checkpoint's name, as a glob; a folder of another name is the user's own."""


class OneByOne(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read anew when it is asked for: no two need be in memory together."""

    def __init__(self, file: Path) -> None:
        self.file = safe_open(file, framework="pt", backend="pread")
        self.names = self.file.keys()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        tensor: Tensor = self.file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that training needs to go on as if it had never stopped."""

    model: Mapping[str, Tensor]
    """Mapped from the disk: processes of one machine share its memory."""
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    """"NAME/exp_avg", "NAME/exp_avg_sq" and "NAME/step" for each parameter."""
    state: dict[str, Any]
    """samples_seen and whatever else the loop counts."""
    folder: Path
    critic: tuple[Mapping[str, Tensor], ...] = ()
    """Model, average and optimizer of a second network, where there is one."""


def save_checkpoint(
    folder: Path,
    parts: Mapping[str, Iterable[tuple[str, Tensor]]],
    state: dict[str, Any],
    *,
    keep: int = 2,
    keep_every: int | None = None,
) -> Path:
    """Write a checkpoint and drop all but the last `keep`, and the first at or past each `keep_every` samples.

    `parts`: name and entries of PARTS, and perhaps of CRITIC, gone through in this order; memory holds one at a time.
    Returns its folder.
    """
    final = folder / f"{state['samples_seen']:012d}"
    temporary = folder / f".{final.name}.tmp"
    for unfinished in folder.glob(f".{DIGITS}.tmp"):  # of a killed run
        shutil.rmtree(unfinished)
    temporary.mkdir(parents=True)
    for part, entries in parts.items():
        tensors = {name: value.detach().cpu().contiguous() for name, value in entries}
        save_file(tensors, temporary / f"{part}.safetensors")
        del tensors
    write_json(temporary / "state.json", {**state, "hashes": {part: hash_of(temporary, part) for part in parts}})
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
    return sorted(path for path in folder.glob(DIGITS) if path.is_dir())


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, or None where there is none. Raises DataError if it is damaged, whichever file is."""
    found = complete_checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        state = json.loads((newest / "state.json").read_text())
        for part, written in state.pop("hashes").items():
            if not (newest / f"{part}.safetensors").is_file():
                raise LookupError(f"{part}.safetensors")
            if hash_of(newest, part) != written:
                raise ValueError(f"{part}.safetensors is not what was written")
        found_critic = read_parts(newest, CRITIC) if any(newest.glob("critic-*")) else ()
        return Checkpoint(*read_parts(newest, PARTS), state, newest, found_critic)
    except Exception as error:  # safetensors raises its own kinds
        why = f"it lacks {error}" if isinstance(error, LookupError) else str(error)
        raise damaged(newest, why) from error


def hash_of(folder: Path, part: str) -> str:
    return sha256_of(folder / f"{part}.safetensors")


def read_parts(folder: Path, parts: tuple[str, ...]) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], OneByOne]:
    model, ema, optimizer = (folder / f"{part}.safetensors" for part in parts)
    return load_file(model), OneByOne(ema), OneByOne(optimizer)


def damaged(folder: Path, why: str) -> DataError:
    return DataError(
        f"The checkpoint '{folder}' is damaged: {why}", f"Delete it to go on from the one before: rm -r {folder}"
    )
