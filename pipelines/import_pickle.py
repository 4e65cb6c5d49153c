"""Weights out of pickles, by PyTorch's reader of plain tensors alone: what `instaflow import-pickle` does.

No other command opens a pickle. That reader builds tensors, numbers and containers, and imports nothing that a file
names; a file that wants more is refused.
"""

import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from instaflow.errors import ConfigError, DataError, reason_of
from instaflow.files import open_to_readers, replace_folder, temporary_name
from instaflow.places import PICKLES, configuration_of
from instaflow.plurals import counted

NAMES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "safety_checker": "model",
}
"""What each part's weights are called by diffusers and transformers, as .safetensors."""


class Callback:
    """Stands for PyTorch Lightning's, which Stable Diffusion's first checkpoints name beside their tensors."""


LIGHTNING: list[Any] = [(Callback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def run(place: Path, output: Path) -> str:
    """Write a file's or a folder's tensors as .safetensors; returns a line. Raises ConfigError or DataError.

    Of a pipeline's folder the other files are copied.
    """
    if output.exists():
        raise ConfigError(f"'{output}' is there already", "Choose another name, or delete it")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"The folder of '{output}' does not exist", "Make it first")
    if place.is_dir():
        return run_folder(place, output)
    if not place.is_file():
        raise DataError(
            f"There is no file '{place}'", "It is a checkpoint (.ckpt, .bin, .pt, .pth), or a model's folder"
        )
    if output.suffix != ".safetensors":
        raise ConfigError(f"'{output}' does not end in .safetensors", "A file's tensors become one file; name it so")
    tensors = read_tensors(place)
    temporary = output.with_name(temporary_name(output.name))
    try:
        write_tensors(temporary, tensors)
        open_to_readers(temporary)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    told = f"{output}: {counted(len(tensors), 'tensor')}"
    if not (folder := configuration_of(output)).is_dir():
        told += f". To be read as a model it wants its configuration beside it, in '{folder}'"
    return told


def run_folder(place: Path, output: Path) -> str:
    """The same of a pipeline's folder."""
    pickles = [file for part in NAMES for file in sorted(place.glob(f"{part}/*")) if file.suffix in PICKLES]
    if not pickles:
        raise DataError(f"'{place}' holds no pickles of weights", f"They are looked for in {', '.join(NAMES)}")
    if pieces := [file.name for file in pickles if "-of-" in file.name]:
        raise DataError(f"'{place}' has weights in pieces ('{pieces[0]}')", "Have each part's weights in one file")
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    count = 0
    try:
        shutil.copytree(place, temporary, ignore=lambda _, names: [one for one in names if Path(one).suffix in PICKLES])
        for file in pickles:
            part, variant = file.parent.name, "".join(Path(file.stem).suffixes)  # diffusion_pytorch_model.fp16.bin
            tensors = read_tensors(file)
            write_tensors(temporary / part / f"{NAMES[part]}{variant}.safetensors", tensors)
            count += len(tensors)
        replace_folder(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"{output}: {counted(count, 'tensor')} of {counted(len(pickles), 'pickle')}, and the other files"


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, of its `state_dict` if it has one. Runs none of its code. Raises DataError."""
    try:
        with torch.serialization.safe_globals(LIGHTNING):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # it raises kinds of its own, and those of whatever is damaged
        raise DataError(
            f"'{file}' can't be read as plain tensors: {reason(error)}",
            "What holds more than tensors would run code of its own, and a damaged one wants to be fetched anew",
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    tensors = dict(named_tensors(content))
    if not tensors:
        raise DataError(f"'{file}' holds no tensors by name", "It is a state dict, or has one as 'state_dict'")
    return tensors


def reason(error: Exception) -> str:
    """What PyTorch found, without its advice to load the file all the same."""
    if named := re.search(r"GLOBAL (\S+)", f"{error}"):
        return f"it asks for {named[1]}"
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or holds what is no tensor"
    return reason_of(error)


def named_tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, dict):
        for name, value in content.items():
            if isinstance(name, str) and isinstance(value, Tensor):
                yield name, value


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Each tensor on its own: safetensors refuses those that share memory."""
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, file, {"format": "pt"})
