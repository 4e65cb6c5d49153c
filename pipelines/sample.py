"""Images of models: what `instaflow sample` does."""

import io
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import instaflow
from instaflow.errors import ConfigError, DataError
from instaflow.files import write_file
from instaflow.models.device import set_up_cpu
from instaflow.models.safety import lacks_checker, told_of
from instaflow.models.settings import note_on_guidance
from instaflow.models.text_to_image import TextToImage
from instaflow.places import short_names
from instaflow.plurals import counted
from instaflow.using.film import film, frames, way_of
from instaflow.using.generator import Generator
from instaflow.using.metadata import About, Drawn, encoded
from instaflow.using.seeds import written
from instaflow.using.sheet import sheet
from instaflow.using.strips import through_noises, through_prompts
from pipelines.sample_request import FILMS, Request, Wanted


def run(request: Request, wanted: Wanted) -> str:
    """Draw what is wanted and write it; returns a line that says what was done. Raises InstaFlowError."""
    set_up_cpu()
    if request.is_folder:
        from pipelines.sample_folder import run as fill_folder

        return fill_folder(request, wanted, load(request, request.models[0]))
    if request.animate:
        return animated(request, wanted)
    return on_a_sheet(request, wanted)


def load(request: Request, place: str) -> Generator:
    """Says, too, what guidance does to a model that was trained to go without."""
    checked = request.safety_checker
    model = instaflow.load(place, dtype=request.dtype, batch_size=request.batch_size, safety_checker=checked)
    own = model.settings
    if note := note_on_guidance(place, own.kind, own.guidance_scale, request.guidance_scale or 0):
        print(note)
    if request.safety_checker and lacks_checker(place):
        print(f"The safety checker of '{place}' is not on this machine, and asked of nothing")
    return model


def sampled_with(request: Request, model: Generator) -> dict[str, Any]:
    """Steps and guidance, those asked for or the model's own."""
    own = model.settings
    return {
        "num_steps": own.num_steps if request.num_steps is None else request.num_steps,
        "guidance_scale": own.guidance_scale if request.guidance_scale is None else request.guidance_scale,
    }


def noise_for(request: Request, wanted: Wanted, model: Generator) -> Tensor:
    """The noise of each image that is wanted. Raises DataError."""
    shape = (len(wanted), *model.latent_shape)
    if request.noise_file:
        return torch.from_numpy(read_noise(request.noise_file, shape))
    return model.noise([wanted.seed(index) for index in range(len(wanted))])


def on_a_sheet(request: Request, wanted: Wanted) -> str:
    """All images on one sheet: a row a model, or a row a prompt where seeds are named, or in a square."""
    images: list[Image.Image] = []
    hows: list[dict[str, Any]] = []
    drawn = [wanted.drawn(index) for index in range(len(wanted))]
    if request.noise_file:
        drawn = [Drawn(one.prompt, None) for one in drawn]
    columns = None if wanted.seeds is None or len(wanted.prompts) == 1 else len(wanted.seeds)
    for place in request.models:
        model = load(request, place)
        hows.append(sampled_with(request, model))
        if request.between is not None:
            latents, drawn, columns = strip(request.between, wanted, model, hows[-1])
        else:
            prompts = [one.prompt for one in drawn]
            latents = model.latents(prompts, noise=noise_for(request, wanted, model), **hows[-1])
        images += model.decode(latents)
        tell_of(model)
    if request.latents_file:
        content = io.BytesIO()
        np.save(content, latents.float().cpu().numpy())
        write_file(request.latents_file, content.getvalue())
    names = short_names(request.models)
    several = len(names) > 1
    words = [f"{name}: {caption(one)}" if several else caption(one) for name in names for one in drawn]
    columns = len(drawn) if several else columns
    about = About([*request.models], *steps_and_guidance(hows), request.dtype, drawn)
    picture = sheet(images, columns=columns, captions=words if request.captions else ())
    write_file(request.target, encoded(picture, request.target, about))
    steps = ", ".join(dict.fromkeys(counted(how["num_steps"], "step") for how in hows))
    return f"{request.target}: {counted(len(images), 'image')}, {steps}"


def strip(between: int, wanted: Wanted, model: Generator, how: dict[str, Any]) -> tuple[Tensor, list[Drawn], int]:
    """Latents, what is known of each, and how many make a line: through the seeds a line a prompt, or the prompts."""
    seeds = wanted.seeds or [wanted.first]
    if len(seeds) == 1:
        noise, prompts = model.noise(seeds), wanted.prompts
        latents = through_prompts(model, prompts, between, noise=noise, **how)
        ends = [Drawn(prompt, written(seeds[0])) for prompt in prompts]
        ways = [partial(Drawn, f"{one.prompt} → {other.prompt}", one.seed, None) for one, other in pairwise(ends)]
        return latents, spread(ends, ways, between), len(latents)
    noise = through_noises(model.noise(seeds), between)
    lines, drawn, names = [], [], [written(seed) for seed in seeds]
    for prompt in wanted.prompts:
        lines.append(model.latents(prompt, noise=noise, **how))
        ways = [partial(Drawn, prompt, None, two) for two in pairwise(names)]
        drawn += spread([Drawn(prompt, name) for name in names], ways, between)
    return torch.cat(lines), drawn, len(noise)


def spread(ends: list[Drawn], ways: Sequence[Callable[[float], Drawn]], between: int) -> list[Drawn]:
    """The ends with so many steps of the way to the next between them."""
    positions = [round(step / (between + 1), 6) for step in range(1, between + 1)]
    inside = [part for end, way in zip(ends, ways, strict=False) for part in (end, *map(way, positions))]
    return [*inside, ends[-1]]


def animated(request: Request, wanted: Wanted) -> str:
    """A film of the models' paths from the same noise."""
    ways, hows, shape = [], [], None
    prompts = [wanted.prompt(index) for index in range(len(wanted))]
    for place, label in zip(request.models, short_names(request.models), strict=True):
        model = load(request, place)
        if shape not in (None, model.latent_shape):
            message = f"'{place}' starts from noise of shape {model.latent_shape}, '{request.models[0]}' of {shape}"
            raise ConfigError(message, "Show models of one size")
        shape = model.latent_shape
        how = sampled_with(request, model)
        noise = noise_for(request, wanted, model)
        ways.append(way_of(model, prompts, noise, label=label, num_steps=how["num_steps"], scale=how["guidance_scale"]))
        hows.append(how)
        tell_of(model)
    pictures = frames(ways, prompts)
    drawn = [wanted.drawn(index) for index in range(len(wanted))]
    drawn = [Drawn(one.prompt, None) for one in drawn] if request.noise_file else drawn
    about = About([*request.models], *steps_and_guidance(hows), request.dtype, drawn)
    write_file(request.target, film(pictures, FILMS[request.target.suffix.lower()], about))
    of = counted(len(request.models), "model")
    return f"{request.target}: {counted(len(pictures), 'frame')} of {of}, {counted(len(prompts), 'image')} of each"


def caption(drawn: Drawn) -> str:
    at = f" at {drawn.position:g}" if drawn.position is not None else ""
    if drawn.between:
        return f"{' → '.join(drawn.between)}{at}  {drawn.prompt}"
    return f"{drawn.seed}  {drawn.prompt}{at}" if drawn.seed else drawn.prompt + at


def steps_and_guidance(hows: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    return [how["num_steps"] for how in hows], [how["guidance_scale"] for how in hows]


def tell_of(model: Generator) -> None:
    """Say of how many images the prompt was longer than the model reads, and how many were taken for unsafe."""
    if model.num_blackened:
        print(f"{told_of(model.num_blackened)} (--no-safety-checker asks none)")
    if isinstance(model.model, TextToImage) and (count := model.model.num_truncated):
        most = model.model.tokenizer.model_max_length
        print(f"Of {counted(count, 'image')} the prompt is longer than {most} tokens, and cut there")


# --- files ------------------------------------------------------------------------------------------------------------


def read_noise(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Noise from an .npy file: float32 [N, C, H, W] of unit variance, one for each image. Raises DataError."""
    try:
        with open(file, "rb") as source:
            noise = np.lib.format.read_array(source, allow_pickle=False)
    except Exception as error:  # for a damaged header numpy raises whatever its parser does
        reason = str(error).partition("\n")[0]
        hint = "It is one float32 array, as numpy.save writes it; numpy.savez and torch.save write something else"
        raise DataError(f"The noise file '{file}' cannot be read: {reason}", hint) from error
    if noise.dtype != np.float32:
        message = f"'{file}' holds noise of {noise.dtype}; float32 is needed: it is used bit by bit as it stands"
        raise DataError(message, f"Convert it: numpy.save({str(file)!r}, numpy.load({str(file)!r}).astype('float32'))")
    if noise.shape != shape:
        raise DataError(f"'{file}' holds noise of shape {noise.shape}; {shape} is needed: one for each prompt")
    if not np.isfinite(noise).all():
        raise DataError(f"'{file}' holds noise that is not finite", "Draw it anew, say, with standard_normal")
    return np.ascontiguousarray(noise)
