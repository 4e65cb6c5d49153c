"""Images from a model folder: what `instaflow sample` does."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from instaflow.couplings.noise import coupled_noise
from instaflow.errors import ConfigError, DataError, InstaFlowError
from instaflow.models.device import device, set_up_cpu
from instaflow.models.text_to_image import load_model

BATCH = 64


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
    for file in (output, latents_file):
        if file and not file.absolute().parent.is_dir():
            raise ConfigError(f"The folder of '{file}' does not exist", "Make it first")
    if output.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"'{output}' has no image ending that is known", "Name it, say, grid.png")
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
        with open(latents_file, "wb") as target:
            np.save(target, latents.float().cpu().numpy())
    images = torch.cat([model.decode(part) for part in latents.split(BATCH)])
    grid(images).save(output)
    steps = num_steps or model.settings.num_steps
    if model.num_truncated:
        print(f"{model.num_truncated} prompts are longer than {model.tokenizer.model_max_length} tokens and were cut")
    return f"{output}: {len(prompts)} image{'s' if len(prompts) > 1 else ''}, {steps} step{'s' if steps > 1 else ''}"


def read_noise(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Noise from an .npy file: [N, C, H, W] of unit variance, one for each prompt. Raises DataError."""
    try:
        noise = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"The noise file '{file}' cannot be read: {error}", "It is an .npy file of float32") from error
    if noise.shape != shape:
        raise DataError(f"'{file}' holds noise of shape {noise.shape}; {shape} is needed: one for each prompt")
    if not np.issubdtype(noise.dtype, np.floating) or not np.isfinite(noise).all():
        raise DataError(f"'{file}' must hold finite floating-point numbers")
    return np.ascontiguousarray(noise, np.float32)


def grid(images: torch.Tensor) -> Image.Image:
    """Images [N, 3, H, W] in [-1, 1] side by side, as near to a square as N allows."""
    count, _, height, width = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    pixels = ((images.permute(0, 2, 3, 1).cpu().numpy() + 1) * 127.5).round().astype(np.uint8)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    return Image.fromarray(sheet)
