"""Images from a model folder: what `instaflow sample` does."""

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from instaflow.couplings.noise import coupled_noise
from instaflow.errors import ConfigError, DataError, InstaFlowError
from instaflow.files import write_file
from instaflow.models.device import device, set_up_cpu
from instaflow.models.loading import load_model
from instaflow.models.text_to_image import TextToImage

BATCH = 64
VISIBLE = 128  # pixels: smaller images are enlarged to about this


def run(
    model_folder: str,
    prompts: list[str],
    *,
    num_steps: int | None,
    guidance_scale: float | None,
    seed: int,
    noise_file: Path | None,
    latents_file: Path | None,
    output: Path,
) -> str:
    """Sample each prompt, write the images as one grid; returns a line that says what was done."""
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise ConfigError(f"'--guidance-scale' must be a finite number, not {guidance_scale}", "Try, say, 1.5")
    check_prompts(prompts)
    for file in (output, latents_file):
        if file and not file.absolute().parent.is_dir():
            raise ConfigError(f"The folder of '{file}' does not exist", "Make it first")
        if file and file.exists() and not file.is_file():
            raise ConfigError(f"'{file}' is no regular file", "Choose another name")
    files = [file.absolute() for file in (output, latents_file, noise_file) if file]
    if len(set(files)) < len(files):
        raise ConfigError("Two of the files for noise, latents and image are one", "Give each its own name")
    encoded(Image.new("RGB", (1, 1)), output)
    set_up_cpu()
    model = load_model(model_folder, device=device())
    shape = (len(prompts), *model.latent_shape)
    if noise_file:
        noise = read_noise(noise_file, shape)
    else:
        noise = coupled_noise(seed, "sample", range(len(prompts)), model.latent_shape)
    parts = []
    for start in range(0, len(prompts), BATCH):
        batch = slice(start, start + BATCH)
        parts.append(
            model.sample(
                torch.from_numpy(noise[batch]), prompts[batch], num_steps=num_steps, guidance_scale=guidance_scale
            )
        )
    latents = torch.cat(parts)
    if not torch.isfinite(latents).all():
        raise InstaFlowError(f"'{model_folder}' gave latents that are not finite", "Try fewer or more --num-steps")
    if latents_file:
        content = io.BytesIO()
        np.save(content, latents.float().cpu().numpy())
        write_file(latents_file, content.getvalue())
    images = torch.cat([model.decode(part) for part in latents.split(BATCH)])
    write_file(output, encoded(grid(images), output))
    steps = num_steps or model.settings.num_steps
    if isinstance(model, TextToImage) and model.num_truncated:
        many = "1 prompt is" if model.num_truncated == 1 else f"{model.num_truncated} prompts are"
        print(f"{many} longer than {model.tokenizer.model_max_length} tokens and cut there")
    return f"{output}: {len(prompts)} image{'s' if len(prompts) > 1 else ''}, {steps} step{'s' if steps > 1 else ''}"


def check_prompts(prompts: list[str]) -> None:
    """Raises ConfigError where a prompt was typed in bytes that are no text."""
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            hint = "Type it in a terminal that is set to UTF-8"
            raise ConfigError(f"The prompt {prompt!r} is not UTF-8 (character {error.start})", hint) from error


def encoded(image: Image.Image, output: Path) -> bytes:
    """The image as a file of the format that the ending of `output` stands for. Raises ConfigError."""
    name, content = Image.registered_extensions().get(output.suffix.lower(), ""), io.BytesIO()
    if name not in Image.SAVE:
        raise ConfigError(f"'{output}' has no ending of an image format that can be written", "Name it, say, grid.png")
    try:
        image.save(content, name)
    except Exception as error:  # a format without a writer, colours or such sizes: each raises its own kind
        size = "×".join(map(str, image.size))
        message = f"'{output}': {name} does not take an RGB image of {size} pixels: {error}"
        raise ConfigError(message, "Name it, say, grid.png") from error
    return content.getvalue()


def read_noise(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Noise from an .npy file: float32 [N, C, H, W] of unit variance, one for each prompt. Raises DataError."""
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


def grid(images: torch.Tensor) -> Image.Image:
    """Images [N, 3, H, W] in [-1, 1] side by side, as near to a square as N allows.

    Small ones are enlarged by a whole factor, pixel by pixel, so that they can be looked at.
    """
    factor = max(1, VISIBLE // max(images.shape[2:]))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    count, _, height, width = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    pixels = ((images.permute(0, 2, 3, 1).cpu().numpy() + 1) * 127.5).round().astype(np.uint8)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    return Image.fromarray(sheet)
