"""An image as a file, and what it tells of itself: model, prompts, seeds, steps, guidance, in a text chunk of a PNG."""

import io
import json
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import TypeAdapter, ValidationError

from instaflow import __version__
from instaflow.errors import ConfigError, DataError, reason_of
from instaflow.plurals import counted

KEY = "instaflow"
"""Of the chunk (iTXt, UTF-8): JSON."""


@dataclass(frozen=True)
class Drawn:
    """How one image was drawn.

    seed: as `seeds.written`; None where the noise came from a file or lies between two. between: those two, where they
    are known, and `position` on the great circle from the one to the other, 0 to 1. A position without them is of the
    way from a prompt to the next.
    """

    prompt: str
    seed: str | None
    between: tuple[str, str] | None = None
    position: float | None = None


@dataclass(frozen=True)
class About:
    """How a picture was made. It shows one image or many, in rows from top left, each row of several models' by one."""

    models: list[str]
    num_steps: list[int]
    """Of each model."""
    guidance_scale: list[float]
    """Of each model."""
    dtype: str
    images: list[Drawn] = field(default_factory=list)
    version: str = __version__

    def of(self, drawn: Drawn) -> "About":
        """The same of a picture of one image alone."""
        return replace(self, images=[drawn])

    def chunk(self) -> PngInfo:
        """The text chunk that a PNG is saved with."""
        text, content = PngInfo(), asdict(self)
        for drawn in content["images"]:
            for key in ("between", "position"):
                if drawn[key] is None:
                    del drawn[key]
        text.add_itxt(KEY, json.dumps(content, ensure_ascii=False))
        return text


def encoded(image: Image.Image, output: Path, about: About | None = None) -> bytes:
    """The image as a file of the format that the ending of `output` stands for. Raises ConfigError.

    A PNG tells how it was made.
    """
    name, content = Image.registered_extensions().get(output.suffix.lower(), ""), io.BytesIO()
    if name not in Image.SAVE:
        hint = "Name it, say, grid.png; a folder of images ends in a slash: images/"
        raise ConfigError(f"'{output}' has no ending of an image format that can be written", hint)
    try:
        image.save(content, name, **({"pnginfo": about.chunk()} if about and name == "PNG" else {}))
    except Exception as error:  # a format without a writer, colours or such sizes: each raises its own kind
        size = "×".join(map(str, image.size))
        message = f"'{output}': {name} does not take an RGB image of {size} pixels: {error}"
        raise ConfigError(message, "Name it, say, grid.png") from error
    return content.getvalue()


def read_about(file: Path) -> About:
    """What a PNG tells of itself. Raises DataError where it tells nothing, or can't be read."""
    hint = "`instaflow sample` notes in a PNG how it was made; other formats, and programs that save it anew, drop that"
    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.load()  # a chunk may stand behind the pixels
            text = getattr(image, "text", {}).get(KEY)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"'{file}' cannot be read as a PNG: {reason_of(error)}", hint) from error
    if text is None:
        raise DataError(f"'{file}' does not tell how it was made", hint)
    try:
        about: About = TypeAdapter(About).validate_json(text)
    except ValidationError as error:
        raise DataError(f"What '{file}' tells of itself is damaged: {reason_of(error)}", hint) from error
    if not len(about.models) == len(about.num_steps) == len(about.guidance_scale) or any(
        drawn.between and drawn.position is None for drawn in about.images
    ):
        raise DataError(f"What '{file}' tells of itself is damaged: parts of it are missing", hint)
    return about


def told(about: About) -> str:
    """It in words, Markdown; of a picture of one image, with the command that draws it again."""
    lines = [f"Drawn by instaflow {about.version} in {about.dtype}.", ""]
    for model, steps, scale in zip(about.models, about.num_steps, about.guidance_scale, strict=True):
        guidance = f"guidance {scale:g}" if scale > 1 else "no guidance"
        lines.append(f"- {model}: {counted(steps, 'step')}, {guidance}")
    lines.append("")
    for drawn in about.images:
        seed = "noise without a seed" if drawn.seed is None else f"seed {drawn.seed}"
        if drawn.between:
            seed = f"{drawn.position:g} of the way from seed {drawn.between[0]} to {drawn.between[1]}"
        elif drawn.position is not None:
            seed += f", {drawn.position:g} of the way"
        lines.append(f"- {seed}: {json.dumps(drawn.prompt, ensure_ascii=False)}")
    if len(about.images) == len(about.models) == 1 and about.images[0].seed and about.images[0].position is None:
        lines += ["", "Again:", "", f"    {again(about)}"]
    return "".join(
        one if one.isprintable() or one == "\n" else "�" for one in "\n".join(lines)
    )  # else a terminal obeys


def again(about: About) -> str:
    """The command that draws an image again."""
    (drawn,), (model,), (steps,), (scale,) = about.images, about.models, about.num_steps, about.guidance_scale
    words = ["instaflow", "sample", model, f"--prompt={drawn.prompt}", f"--seeds={drawn.seed}", f"--num-steps={steps}"]
    words += [f"--guidance-scale={scale}", *([] if about.dtype == "float32" else [f"--dtype={about.dtype}"])]
    words.append("--output=again.png")
    return shlex.join(words)
