"""Stable Diffusion's safety checker: kept in an exported folder where the teacher has one, and asked of images."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPImageProcessor

from instaflow.errors import DataError, reason_of
from instaflow.files import write_json
from instaflow.places import find_model
from instaflow.plurals import counted

logging.getLogger(StableDiffusionSafetyChecker.__module__).setLevel(logging.ERROR)  # we tell of it ourselves
PARTS = {"safety_checker": "model.safetensors", "feature_extractor": "preprocessor_config.json"}
"""The parts that look at images, each with a file that it can't do without."""


def has_checker(teacher: Path) -> bool:
    """Whether a pipeline's folder holds a safety checker that is read without unpickling."""
    return all((teacher / part / file).is_file() for part, file in PARTS.items())


class SafetyChecker:
    """What looks at images, as stock pipelines do, and blackens those that it takes for unsafe."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Of the pipeline in `folder`, in float32. Raises DataError where it cannot be read."""
        try:
            network: Any = StableDiffusionSafetyChecker.from_pretrained(
                str(folder / "safety_checker"), use_safetensors=True, local_files_only=True
            )
            self.features = CLIPImageProcessor.from_pretrained(str(folder / "feature_extractor"))
        except Exception as error:  # each library raises its own kinds
            message = f"The safety checker in '{folder}' cannot be read: {reason_of(error)}"
            raise DataError(message, "Restore its folders, safety_checker and feature_extractor") from error
        self.network, self.device = network.to(device).eval(), device

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray, int]:
        """The images [N, H, W, 3], uint8, those that are taken for unsafe black, and how many these are."""
        shown = self.features([Image.fromarray(one) for one in pixels], return_tensors="pt").pixel_values
        checked, unsafe = self.network(clip_input=shown.to(self.device), images=pixels.copy())
        return np.asarray(checked), sum(unsafe)


def checker_of(place: str, device: torch.device) -> SafetyChecker | None:
    """The safety checker of a model; None where it has none, or none that is here. Raises DataError."""
    folder = find_model(place)
    return SafetyChecker(folder, device) if has_checker(folder) else None


def lacks_checker(place: str) -> bool:
    """Whether a model says that it has a safety checker, which is not on this machine."""
    folder = find_model(place)
    return (folder / "model_index.json").is_file() and names_checker(folder) and not has_checker(folder)


def told_of(count: int) -> str:
    """What to say of so many images that were blackened."""
    are = "is" if count == 1 else "are"
    return f"{counted(count, 'image')}, taken for unsafe by the model's safety checker, {are} black"


def names_checker(teacher: Path) -> bool:
    """Whether a pipeline says that it has one, here or not."""
    index = json.loads((teacher / "model_index.json").read_text(encoding="utf-8"))
    return (index.get("safety_checker") or [None])[0] is not None


def keep_checker(teacher: Path, folder: Path) -> None:
    """Put a teacher's safety checker into another pipeline's folder."""
    theirs = json.loads((teacher / "model_index.json").read_text(encoding="utf-8"))
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for part in PARTS:
        shutil.copytree(teacher / part, folder / part, ignore=shutil.ignore_patterns("*.bin"))
        index[part] = theirs[part]
    write_json(folder / "model_index.json", index | {"requires_safety_checker": True})
