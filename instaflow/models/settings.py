"""instaflow.json: what a model folder written by this toolkit knows about itself beyond diffusers' own files."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from instaflow.errors import DataError
from instaflow.files import write_json
from instaflow.places import is_released

FILE = "instaflow.json"
FORMAT = 1
ONE_STEP, FLOW = "instaflow_0_9B_from_sd_1_5", "2_rectified_flow_from_sd_1_5"
"""What the hub calls InstaFlow-0.9B and its 2-rectified flow."""


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

    @property
    def stock_guidance(self) -> float:
        """What stock diffusers takes for guidance_scale: 1 for none."""
        return self.guidance_scale if self.guidance_scale > 1 else 1.0


def note_on_guidance(name: str, kind: str, own: float, scale: float) -> str:
    """What to know of an image drawn with guidance `scale` by a model that recommends `own`; most often nothing."""
    if kind == "teacher" or own > 1 or scale <= 1:
        return ""
    return f"'{name}' is meant without guidance, which is trained in: {scale:g} spoils its images"


def released(name: str, **sampled: Any) -> ModelSettings:
    lineage = [{"stage": name, "kind": "import", "summary": "released with InstaFlow (arXiv 2309.06380)"}]
    return ModelSettings(parametrization="velocity", lineage=lineage, **sampled)


INSTAFLOW = released(ONE_STEP, kind="student", num_steps=1, guidance_scale=1.0)
TWO_RECTIFIED_FLOW = released(FLOW, kind="flow", num_steps=25, guidance_scale=1.5)


def read_settings(folder: Path) -> ModelSettings:
    """The settings in a model folder; without them, those of InstaFlow's released models or of a plain teacher.

    Raises DataError.
    """
    file = folder / FILE
    if not file.is_file():
        return released_settings(folder) if is_released(folder) else ModelSettings()
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


def released_settings(folder: Path) -> ModelSettings:
    """How InstaFlow's authors sample what they released: InstaFlow-0.9B in one step, the 2-rectified flow in 25.

    Their files do not say which of the two they are: the folder's name does. Raises DataError where it does not.
    """
    for name, settings in {ONE_STEP: INSTAFLOW, FLOW: TWO_RECTIFIED_FLOW}.items():
        if any(part.endswith(name) for part in folder.absolute().parts):  # the hub's cache keeps the name, too
            return settings
    raise DataError(
        f"'{folder}' is a model that InstaFlow released, and its files do not tell which: one step, or the flow",
        f"Name the folder as they did: {ONE_STEP} or {FLOW}",
    )


def damaged(file: Path, reason: str) -> DataError:
    return DataError(f"'{file}' is damaged: {reason}", "Restore the file, or make the model's stage again")


def write_settings(folder: Path, settings: ModelSettings) -> None:
    write_json(folder / FILE, {"format": FORMAT, **asdict(settings)})
