"""A model in another form, for other programs: what `instaflow export` does."""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
from safetensors.torch import load_file, save_file

from instaflow.errors import ConfigError, DataError, InstaFlowError, reason_of
from instaflow.files import fingerprint_of, remove_leftovers, replace_folder, temporary_name, write_file
from instaflow.models.architecture import read_config
from instaflow.models.device import device, set_up_cpu
from instaflow.models.difference import DELTA, LORA, add, difference, low_rank, weights_of
from instaflow.models.export import LINEAGE, write_model
from instaflow.models.guidance_lock import lock_guidance
from instaflow.models.loading import load_model
from instaflow.models.model import Model
from instaflow.models.onnx_graphs import PIPELINE, STOCK_SCALE, write_onnx
from instaflow.models.released import SCALE, write_released
from instaflow.models.safety import has_checker, keep_checker, names_checker
from instaflow.models.settings import read_settings, write_settings
from instaflow.models.single_file import write_single_file
from instaflow.places import find_model, is_hub_name, model_fingerprint, pipeline_class
from instaflow.provenance import Origin, Provenance, licence_of, provenance_of, told, write_provenance
from pipelines.export_cards import IN_ONE_STEP, drawn, sampled, teacher_loaded, unlocked, write_card

RANK = 64
AGREE = 1e-3
"""So far an ONNX graph may be from PyTorch, relative to its largest output: rounding stays below 1e-5 of that."""
MEND_ONNX = "Try other versions of torch, onnxscript and onnxruntime"
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
    lock_guidance: bool | None
    rank: int
    provenance: Provenance
    teacher: str
    """The model that it began with; empty where that is not known."""

    def load_teacher(self, why: str) -> Model:
        """Raises ConfigError where it is not known."""
        if not self.teacher:
            raise ConfigError(
                f"{why} asks for the teacher of '{self.place}', which its folder does not tell",
                "Name it: --teacher PLACE",
            )
        return load_model(self.teacher, device=device())


def run(
    place: str,
    output: Path,
    to: str,
    *,
    teacher: str | None,
    lock: bool | None,
    rank: int | None,
    added: str | None,
    strength: float | None,
) -> list[str]:
    """Write the model at `place` into the folder `output`; returns lines on what was written.

    lock: whether stock diffusers is to skip guidance; None where it can be. rank: of a LoRA, by default 64. added: a
    delta's folder, or a model whose difference to the teacher is added, times `strength`, by default 1. Raises
    ConfigError or DataError.
    """
    if output.exists():
        raise ConfigError(f"'{output}' is there already", "Choose another name, or delete it")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"The folder of '{output}' does not exist", "Make it first")
    if lock is not None and to != "diffusers":
        raise ConfigError(f"--to {to} has no place for a lock of guidance", "Leave it out, or export --to diffusers")
    if rank is not None and to != "lora":
        raise ConfigError(f"--rank is a LoRA's, and --to {to} has none", "Leave it out, or export --to lora")
    if strength is not None and (added is None or not math.isfinite(strength)):
        message = "--strength goes with --add" if added is None else f"--strength is {strength}"
        raise ConfigError(message, "Leave it out, or say what is added" if added is None else "Try, say, 0.5")
    set_up_cpu()
    model = load_model(place, device=device())
    found = provenance_of(Path(place), model.settings.lineage)
    request = Request(place, output, lock, rank or RANK, found, teacher or found.teacher)
    if added:
        request = transplant(model, request, added, 1.0 if strength is None else strength)
    remove_leftovers(output)
    temporary = output.with_name(temporary_name(output.name))
    try:
        said = FORMATS[to](model, temporary, request)
        if output.exists():
            raise ConfigError(f"'{output}' has been made meanwhile", "Choose another name")
        replace_folder(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [f"{output}: {said[0]}", *said[1:]]


def transplant(model: Model, request: Request, added: str, strength: float) -> Request:
    """Add a difference to a model, in place; returns the request with that told.

    A difference that a flow or a student is makes the model one, sampled as it is.
    """
    folder = Path(added)
    if (folder / DELTA).is_file():
        delta, settings = load_delta(folder), read_settings(folder)
        scheduler = load_scheduler(folder)
    else:
        other = load_model(added, device=device())
        delta, settings = difference(other, request.load_teacher("'--add' of a model")), other.settings
        scheduler = other.scheduler
    add(model, delta, added, strength)
    what = f"W + {strength:g} (W of {folder.name} - W of its teacher)"
    entry = {"stage": folder.name, "kind": "added", "summary": what}
    base = model.settings
    if settings.kind != "teacher":
        base, model.scheduler = settings, scheduler
    lineage = [*model.settings.lineage, *(base.lineage if base is settings else []), entry]
    model.settings = replace(base, lineage=lineage)
    content = fingerprint_of(folder) if folder.is_dir() else model_fingerprint(added)
    behind = [*request.provenance.origins, *provenance_of(folder, settings.lineage).origins]
    origins = list({(origin.name, origin.content): origin for origin in behind}.values())
    origin = Origin(name=folder.name, kind="added", content=content, summary=what)
    told = replace(request.provenance, origins=[*origins, origin], figures=[])  # of another model
    return replace(request, provenance=told)


def to_diffusers(model: Model, folder: Path, request: Request) -> list[str]:
    """A folder for stock diffusers."""
    fits = model.vae is not None and model.settings.guidance_scale <= 1
    if request.lock_guidance and not fits:
        scale = f"is sampled with guidance {model.settings.guidance_scale:g}" if model.vae is not None else "has none"
        raise ConfigError(f"--lock-guidance is for a model without guidance; '{model.name}' {scale}", "Leave it out")
    locked = fits and request.lock_guidance is not False
    if locked:
        lock_guidance(model.unet)
    write_model(folder, **model.parts, scheduler=model.scheduler, settings=model.settings)
    checker = keep_safety(folder, request)
    notes = ["Stock diffusers calls it without guidance, whatever guidance_scale is passed."] if locked else []
    notes = notes or unlocked(model.settings)
    describe(folder, request, [*notes, *checker])
    return ["a folder for diffusers", *notes, *checker]


def to_instaflow(model: Model, folder: Path, request: Request) -> list[str]:
    """A folder for InstaFlow's own pipeline."""
    write_released(model, folder)
    checker = keep_safety(folder, request)
    notes = [*unlocked(model.settings), *checker]
    describe(folder, request, notes)
    return ["for InstaFlow's RectifiedFlowPipeline", *notes]


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
    write_card(
        folder,
        "A Stable Diffusion in one file",
        f"""from diffusers import {kind}

pipeline = {kind}.from_single_file("{name}.safetensors", config="{name}")
{drawn(settings)}""",
    )
    notes = [] if settings.kind == "teacher" else [SAMPLED[settings.parametrization]]
    notes += unlocked(settings)
    describe(folder, request, notes)
    return [f"{file.name}, and its configuration in {name}/", *notes]


def to_delta(model: Model, folder: Path, request: Request) -> list[str]:
    """W - W_teacher, and the sampler that goes with the sum."""
    delta = difference(model, request.load_teacher("'--to delta'"))
    write_difference(model, folder, DELTA, delta)
    name = request.output.name
    write_card(
        folder,
        "The difference of a model to its teacher",
        f"""# or: instaflow export TEACHER OUTPUT --to diffusers --add {name}
{teacher_loaded(model, request.teacher)}
from safetensors.torch import load_file

for key, change in load_file("{DELTA}").items():  # key: PART.NAME
    part, _, name = key.partition(".")
    getattr(pipeline, part).get_parameter(name).data += change
{sampled(model)}""",
    )
    notes = unlocked(model.settings)
    describe(folder, request, notes)
    many = sum(change.numel() for change in delta.values())
    return [f"{DELTA}: {len(delta)} of {len(weights_of(model))} weights differ, {many:,} numbers", *notes]


def to_lora(model: Model, folder: Path, request: Request) -> list[str]:
    """A LoRA for the teacher, and the sampler that goes with both."""
    found = low_rank(difference(model, request.load_teacher("'--to lora'")), request.rank)
    write_difference(model, folder, LORA, found.weights)
    write_card(
        folder,
        "A LoRA for its teacher",
        f"""{teacher_loaded(model, request.teacher)}

pipeline.load_lora_weights(".")  # pip install peft
{sampled(model)}""",
    )
    error = f"Rank {request.rank} leaves out {found.error:.2%} of the U-Net's difference to its teacher"
    notes = [f"{error}, {found.left_out:.2%} in biases and normalizations (root of the squares, relative)."]
    notes += unlocked(model.settings)
    describe(folder, request, notes)
    return [LORA, *notes]


def to_onnx(model: Model, folder: Path, request: Request) -> list[str]:
    """Graphs for onnxruntime, as stock diffusers reads them."""
    far = write_onnx(model, folder)
    if not far < AGREE:
        raise InstaFlowError(
            f"A graph of '{model.name}' is off by {far:.1e}: it is not what PyTorch computes", MEND_ONNX
        )
    height, width = (8 * side for side in model.latent_shape[1:])  # of an image that a VAE of factor 8 would make
    settings = model.settings
    if (settings.num_steps, settings.parametrization) == (1, "velocity"):
        code = IN_ONE_STEP.format(shape=(1, *model.latent_shape), slope=SCALE, factor=STOCK_SCALE)
    else:
        code = f"""from diffusers import {PIPELINE}

pipeline = {PIPELINE}.from_pretrained(".", provider="CPUExecutionProvider", provider_options={{}})
{drawn(settings, f"height={height}, width={width}, ")}"""
    write_card(folder, "A Stable Diffusion as ONNX graphs", code)
    notes = [f"In onnxruntime each graph is within {far:.1e} of PyTorch, relative to its largest output."]
    notes += unlocked(settings)
    describe(folder, request, notes)
    return ["graphs for onnxruntime", *notes]


FORMATS = {
    "diffusers": to_diffusers,
    "instaflow": to_instaflow,
    "single-file": to_single_file,
    "onnx": to_onnx,
    "lora": to_lora,
    "delta": to_delta,
}
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


def write_difference(model: Model, folder: Path, name: str, weights: dict[str, Any]) -> None:
    """The file, with the sampler and the settings of the model that it makes of its teacher."""
    folder.mkdir()
    save_file({key: value.cpu().contiguous() for key, value in weights.items()}, folder / name, {"format": "pt"})
    model.scheduler.save_pretrained(folder / "scheduler")
    write_settings(folder, model.settings)


def load_delta(folder: Path) -> dict[str, Any]:
    """Raises DataError."""
    try:
        return load_file(folder / DELTA)
    except Exception as error:  # safetensors raises its own kinds
        raise DataError(f"'{folder / DELTA}' cannot be read: {reason_of(error)}", "Export the delta again") from error


def load_scheduler(folder: Path) -> Any:
    """The scheduler in a delta's folder. Raises DataError."""
    config = read_config(folder / "scheduler" / "scheduler_config.json")
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise DataError(f"'{folder}' names no scheduler of diffusers", "Export the delta again")
    return kind.from_config(config)


def describe(folder: Path, request: Request, notes: list[str]) -> None:
    """Complete a model's card, and put its provenance beside it."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    if request.provenance.origins:  # which tell more
        text = text.partition(LINEAGE)[0]
    text = text.rstrip()
    licence = request.provenance.licence or licence_of(request.teacher) or licence_of(request.place)
    if (folder / "safety_checker").is_dir():
        text = text.replace(", safety_checker=None", "")
    if licence:
        text = text.replace("---\n", f"---\nlicense: {licence}\n", 1)
        notes = [*notes, f"The licence is the teacher's: {licence}. Its terms go with the weights."]
    elif any(origin.kind == "model" for origin in request.provenance.origins):
        notes = [*notes, f"The licence is that of the teacher, '{Path(request.teacher).name}', which says more."]
    elif request.provenance.origins:
        notes = [*notes, "No licence is known: no model from elsewhere is among what it was made from."]
    parts = [text, *notes, *([told(request.provenance)] if request.provenance.origins else [])]
    write_file(card, "\n\n".join(parts) + "\n")
    write_provenance(folder, request.provenance)
