"""Stable Diffusion's safety checker in an exported folder: kept where the teacher has one."""

import json
import shutil
from pathlib import Path

from instaflow.files import write_json

PARTS = {"safety_checker": "model.safetensors", "feature_extractor": "preprocessor_config.json"}
"""The parts that look at images, each with a file that it can't do without."""


def has_checker(teacher: Path) -> bool:
    """Whether a pipeline's folder holds a safety checker that is read without unpickling."""
    return all((teacher / part / file).is_file() for part, file in PARTS.items())


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
