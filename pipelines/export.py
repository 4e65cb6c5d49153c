"""A model in another form, for other programs: what `instaflow export` does."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from instaflow.errors import ConfigError, DataError
from instaflow.files import replace_folder, write_file
from instaflow.models.device import device, set_up_cpu
from instaflow.models.export import write_model
from instaflow.models.guidance_lock import lock_guidance
from instaflow.models.loading import load_model
from instaflow.models.model import Model
from instaflow.models.released import write_released
from instaflow.models.safety import has_checker, keep_checker, names_checker
from instaflow.models.single_file import write_single_file
from instaflow.places import find_model, is_hub_name, pipeline_class
from instaflow.provenance import Provenance, licence_of, provenance_of, told, write_provenance

SAMPLED = {
    "velocity": "The file cannot say how it is sampled: by Euler's method for a flow that answers noise - data at "
    "timesteps of 1000 times the noise level (shift 1).",
    "epsilon": "The file cannot say how it is sampled: by DDIM at trailing timesteps.",
}
"""What a user interface has to be told of a flow or a student, by parametrization."""


@dataclass(frozen=True)
class Request:
    """What is exported, and how."""

    place: str
    output: Path
    lock_guidance: bool
    provenance: Provenance
    teacher: str
    """The model that it began with; empty where that is not known."""


def run(place: str, output: Path, to: str, *, teacher: str | None, lock: bool) -> list[str]:
    """Write the model at `place` into the folder `output`; returns lines on what was written.

    Raises ConfigError or DataError.
    """
    if output.exists():
        raise ConfigError(f"'{output}' is there already", "Choose another name, or delete it")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"The folder of '{output}' does not exist", "Make it first")
    set_up_cpu()
    model = load_model(place, device=device())
    found = provenance_of(Path(place), model.settings.lineage)
    request = Request(place, output, lock, found, teacher or found.teacher)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        said = FORMATS[to](model, temporary, request)
        replace_folder(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [f"{output}: {said[0]}", *said[1:]]


def to_diffusers(model: Model, folder: Path, request: Request) -> list[str]:
    """A folder for stock diffusers."""
    locked = request.lock_guidance and model.vae is not None and model.settings.guidance_scale <= 1
    if locked:
        lock_guidance(model.unet)
    write_model(folder, **model.parts, scheduler=model.scheduler, settings=model.settings)
    checker = keep_safety(folder, request)
    notes = ["Stock diffusers calls it without guidance, whatever guidance_scale is passed."] if locked else []
    describe(folder, request, [*notes, *checker])
    return ["a folder for diffusers", *notes, *checker]


def to_instaflow(model: Model, folder: Path, request: Request) -> list[str]:
    """A folder for InstaFlow's own pipeline."""
    write_released(model, folder)
    checker = keep_safety(folder, request)
    describe(folder, request, checker)
    return ["for InstaFlow's RectifiedFlowPipeline", *checker]


def to_single_file(model: Model, folder: Path, request: Request) -> list[str]:
    """NAME.safetensors under the original code's names, and NAME/, the configuration without weights."""
    name = request.output.name
    file, configuration = folder / f"{name}.safetensors", folder / name
    folder.mkdir()
    write_single_file(model, file)
    write_model(configuration, **model.parts, scheduler=model.scheduler, settings=model.settings)
    for weights in configuration.rglob("*.safetensors"):
        weights.unlink()
    (configuration / "README.md").unlink()
    kind = pipeline_class(configuration)
    settings = model.settings
    scale = settings.guidance_scale if settings.guidance_scale > 1 else 1.0
    write_card(
        folder,
        "A Stable Diffusion in one file",
        f"""from diffusers import {kind}

pipeline = {kind}.from_single_file("{name}.safetensors", config="{name}")
image = pipeline("a prompt", num_inference_steps={settings.num_steps}, guidance_scale={scale}).images[0]""",
    )
    notes = [] if settings.kind == "teacher" else [SAMPLED[settings.parametrization]]
    describe(folder, request, notes)
    return [f"{file.name}, and its configuration in {name}/", *notes]


FORMATS = {"diffusers": to_diffusers, "instaflow": to_instaflow, "single-file": to_single_file}
"""What writes a model into a folder that isn't there yet, and says what it wrote, in lines."""


def keep_safety(folder: Path, request: Request) -> list[str]:
    """Keep the teacher's safety checker, if it has one; returns what is to be said of it."""
    for place in (request.place, request.teacher):
        try:
            teacher = find_model(place) if place else Path()
        except DataError:
            continue
        if not (teacher / "model_index.json").is_file():
            continue
        if has_checker(teacher):
            keep_checker(teacher, folder)
            return ["The teacher's safety checker is kept."]
        if names_checker(teacher):
            return [
                f"The safety checker of '{place}' is not on this machine, and left out. To keep it: hf download "
                f"{place if is_hub_name(place) else 'OWNER/NAME'} --include 'safety_checker/*.safetensors' "
                "'safety_checker/*.json' 'feature_extractor/*'"
            ]
    return []


def write_card(folder: Path, title: str, code: str) -> None:
    """A model card's beginning, which `describe` completes."""
    head = "---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n---\n"
    write_file(folder / "README.md", f"{head}# {title}\n\n```python\n{code}\n```\n")


def describe(folder: Path, request: Request, notes: list[str]) -> None:
    """Complete a model's card, and put its provenance beside it."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8").rstrip()
    licence = request.provenance.licence or licence_of(request.teacher)
    if (folder / "safety_checker").is_dir():
        text = text.replace(", safety_checker=None", "")
    if licence:
        text = text.replace("---\n", f"---\nlicense: {licence}\n", 1)
        notes = [*notes, f"The licence is the teacher's: {licence}. Its terms go with the weights."]
    elif request.teacher:
        notes = [*notes, f"The licence is that of the teacher, '{Path(request.teacher).name}', which says more."]
    parts = [text, *notes, *([told(request.provenance)] if request.provenance.origins else [])]
    write_file(card, "\n\n".join(parts) + "\n")
    write_provenance(folder, request.provenance)
