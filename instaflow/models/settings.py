"""instaflow.json: what a model folder written by this toolkit knows about itself beyond diffusers' own files."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from instaflow.errors import DataError
from instaflow.files import write_json

FILE = "instaflow.json"
FORMAT = 1


@dataclass(frozen=True)
class ModelSettings:
    """How a model is meant to be sampled, and where it comes from."""

    kind: Literal["teacher", "flow", "student"] = "teacher"
    parametrization: Literal["velocity", "epsilon"] = "epsilon"
    num_steps: int = 25
    guidance_scale: float = 7.5
    """1 or less: the network is called once a step, without guidance."""
    weights: Literal["ema", "raw"] = "ema"
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """The stages from the teacher to this model, oldest first."""


def read_settings(folder: Path) -> ModelSettings:
    """The settings in a model folder, or those of a plain Stable Diffusion teacher. Raises DataError."""
    file = folder / FILE
    if not file.is_file():
        return ModelSettings()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise DataError(f"'{file}' has a format that this version does not know", "Update instaflow")
        return ModelSettings(**content)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"'{file}' is damaged: {error}", "Restore the file, or make the model's stage again") from error


def write_settings(folder: Path, settings: ModelSettings) -> None:
    write_json(folder / FILE, {"format": FORMAT, **asdict(settings)})
