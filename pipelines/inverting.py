"""Real images that a couple stage inverts: what they are, and the noise that the model's flow leads to them from."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from instaflow.couplings.generate import Made, Sampler
from instaflow.couplings.manifest import Manifest
from instaflow.digits.data import DigitsData
from instaflow.digits.images import real_digits
from instaflow.digits.stream import captions_at
from instaflow.image_files import ImageFiles, ImageReader, pixels_of
from instaflow.models.model import Model
from instaflow.models.sampling import fetched
from instaflow.sections import DIGITS

RealImage = Callable[[int], Tensor | None]
"""The real image of an index, [3, H, W] in [-1, 1]; None for one that can't be read."""
INVERSION = {"class": "Inversion", "method": "heun"}
"""What stands for a sampler in the manifest."""


def real_captions(data: str, count: int, seed: int, stage: str) -> Iterator[str]:
    """The captions of the first `count` images; those of the digits are drawn by the seed and the stage's name."""
    if data == DIGITS:
        labels = [[label] for label in real_digits()[1][:count].tolist()]
        return iter(captions_at(seed, stage, 0, labels, DigitsData.caption_for))
    return (image.caption for image in islice(ImageFiles(data), count))


def real_images(data: str, count: int, size: tuple[int, int]) -> RealImage:
    """The first `count` images of a source, each of `size` (H, W). Raises ConfigError if it can't be read."""
    if data == DIGITS:
        images = real_digits()[0]
        if images.shape[2:] != size:
            images = functional.interpolate(images, size=size, mode="bilinear", antialias=True)
        return lambda index: images[index]
    reader = ImageReader(data, count)

    def read(index: int) -> Tensor | None:
        content = reader.read(index)
        try:
            pixels = torch.from_numpy(pixels_of(content, size).copy())
        except ValueError:
            return None
        return pixels.permute(2, 0, 1).float() / 127.5 - 1

    return read


def inverting(model: Model, manifest: Manifest, image: RealImage) -> Sampler:
    """Takes real images in place of noise: encodes them, and inverts their latents as they are stored.

    A record whose image can't be read gets a latent that is not finite, and so is left out.
    """

    def sample(indices: Sequence[int], noise: np.ndarray, prompts: list[str]) -> Callable[[], Made]:
        images = [image(index) for index in indices]
        blank = torch.zeros(3, *model.image_size)
        latents = model.encode_images(torch.stack([blank if one is None else one for one in images]))
        latents = latents.to(getattr(torch, manifest.stored_dtype)).float()
        found = model.inverted(latents, prompts, num_steps=manifest.num_steps, guidance_scale=manifest.guidance_scale)
        latents[[row for row, one in enumerate(images) if one is None]] = torch.nan
        wait_for_latents, wait_for_noise = fetched(latents), fetched(found)
        return lambda: Made(wait_for_latents(), noise=wait_for_noise())

    return sample
