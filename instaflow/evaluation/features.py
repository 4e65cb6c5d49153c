"""Images to features, by extractors that know what must be told beside a figure: weights, dimension and resize."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from instaflow.evaluation import latents
from instaflow.models.vae import encoded

BATCH = 32
CELLS = 8
"""A side, of the grid that pixels are averaged over: 192 features, few enough for thousands of images."""


@dataclass(frozen=True)
class Extractor:
    """What a distance is measured in.

    Images are rounded to 8 bits first, so that it does not matter whether they come from a model or from PNG files.
    On a CPU the batch size changes features within 1e-5 of the largest.
    """

    name: str
    words: str
    """Which network, which of its layers."""
    resize: str
    """How images are brought to the network's size, in words."""
    dimension: int
    sha256: str
    """Of the file of weights, or the fingerprint of the network's folder; empty where there is no network."""
    extract: Callable[[Tensor], Tensor]
    """Features [B, D] of images [B, 3, H, W], uint8, on the CPU."""

    def __call__(self, images: Tensor, batch_size: int = BATCH) -> np.ndarray:
        """Features [N, D], float32, of images [N, 3, H, W]: uint8, or of any float type in [-1, 1]."""
        with exactly():
            parts = [self.extract(in_bytes(part)).float().cpu().numpy() for part in images.split(batch_size)]
        return np.concatenate(parts)

    def __str__(self) -> str:
        """The line of a protocol's card."""
        hashed = f", weights {self.sha256[:8]}" if self.sha256 else ""
        return f"{self.words}{hashed}, {self.dimension:,} dimensions; {self.resize}"


@contextmanager
def exactly() -> Iterator[None]:
    """Without gradients, and in full float32: TensorFloat-32, cuDNN's default, would move figures between GPUs."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# --- images -----------------------------------------------------------------------------------------------------------


def in_bytes(images: Tensor) -> Tensor:
    """Images as a PNG holds them: uint8 on the CPU, of images that are so already or of floats in [-1, 1]."""
    if images.dtype == torch.uint8:
        return images.cpu()
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def in_floats(images: Tensor) -> Tensor:
    """Images in [-1, 1], float32, of uint8."""
    return images.float() / 127.5 - 1


def pictures(images: Tensor) -> list[Image.Image]:
    """One Pillow image each, of images [N, 3, H, W], uint8."""
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]


def lanczos(images: Tensor, side: int) -> Tensor:
    """Images of side × side, uint8, by Pillow's Lanczos filter: what DMD and GigaGAN do before FID (512 to 256)."""
    small = [np.asarray(image.resize((side, side), Image.Resampling.LANCZOS)) for image in pictures(in_bytes(images))]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)


# --- extractors for data without a pretrained one ---------------------------------------------------------------------


def pixels(side: int = CELLS) -> Extractor:
    """The colours of images over a grid of side × side cells, in [-1, 1]."""

    def extract(images: Tensor) -> Tensor:
        return adaptive_avg_pool2d(in_floats(images), side).flatten(1)

    return Extractor("pixels", "pixels in [-1, 1]", f"means over {side}×{side} cells", 3 * side**2, "", extract)


def autoencoder(vae: Any, fingerprint: str) -> Extractor:
    """A VAE's scaled mean latents, each channel's means over 4×4 cells: whole ones have more dimensions than samples.

    vae: as `models.vae` loads it; fingerprint: of its folder.
    """

    def extract(images: Tensor) -> Tensor:
        return torch.from_numpy(latents.features(encoded(vae, in_floats(images))))

    words = f"an autoencoder's mean latents over {latents.CELLS}×{latents.CELLS} cells"
    dimension = vae.config.latent_channels * latents.CELLS**2
    return Extractor("autoencoder", words, "no resize", dimension, fingerprint, extract)


def classifier(network: Any, fingerprint: str, *, device: torch.device) -> Extractor:
    """A perceptual network's last layer, each place's unit vector, averaged over the image: as Inception's is pooled.

    network: its call gives the layers' features [B, C, h, w] of images in [-1, 1] (`training.perceptual`'s networks).
    """
    network = network.to(device)

    def extract(images: Tensor) -> Tensor:
        last: Tensor = network(in_floats(images).to(device))[-1]
        return last.mean((2, 3))

    with torch.inference_mode():
        dimension = extract(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]
    words = "a classifier's last layer, averaged over places"
    return Extractor("classifier", words, "no resize", dimension, fingerprint, extract)
