"""Images to features, by extractors that know what must be told beside a figure: weights, dimension and resize."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

BATCH = 32


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
    """Of the file of weights; empty where there is no network."""
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


def pictures(images: Tensor) -> list[Image.Image]:
    """One Pillow image each, of images [N, 3, H, W], uint8."""
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]


def lanczos(images: Tensor, side: int) -> Tensor:
    """Images of side × side, uint8, by Pillow's Lanczos filter: what DMD and GigaGAN do before FID (512 to 256)."""
    small = [np.asarray(image.resize((side, side), Image.Resampling.LANCZOS)) for image in pictures(in_bytes(images))]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)
