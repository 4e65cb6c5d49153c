"""instaflow.json: what a model folder written by this toolkit knows about itself beyond diffusers' own files."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from instaflow.errors import DataError
from instaflow.files import write_json

FILE = "instaflow.json"
FORMAT = 1


@dataclass(frozen=True)
class ModelSettings:
    """How a model is meant to be sampled, and where it comes from."""

    kind: Literal["teacher", "flow", "student"] = "teacher"
    parametrization: Literal["velocity", "epsilon", "edm"] = "epsilon"
    num_steps: Annotated[int, Field(ge=1)] = 25
    guidance_scale: Annotated[float, Field(ge=0)] = 7.5
    """1 or less: the network is called once a step, without guidance."""
    weights: Literal["ema", "raw"] = "ema"
    class_names: list[str] = field(default_factory=list)
    """Of a class-conditional model, in the order of their numbers; where it has none, the numbers are its prompts."""
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
        ModelSettings(**content)  # refuses a key that it does not know
        settings: ModelSettings = TypeAdapter(ModelSettings).validate_python(content)
        return settings
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise damaged(file, f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(file, str(error)) from error


def damaged(file: Path, reason: str) -> DataError:
    return DataError(f"'{file}' is damaged: {reason}", "Restore the file, or make the model's stage again")


def write_settings(folder: Path, settings: ModelSettings) -> None:
    write_json(folder / FILE, {"format": FORMAT, **asdict(settings)})
