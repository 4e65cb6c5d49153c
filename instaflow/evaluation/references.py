"""Features of real images, computed once for a folder of them and an extractor, and kept with a hash of both."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import Tensor

from instaflow.errors import ConfigError, DataError
from instaflow.evaluation.features import Extractor
from instaflow.files import opened, sealed, write_file
from instaflow.image_files import pixels_of
from instaflow.progress import Progress
from instaflow.prompt_files import IMAGES
from instaflow.weights import cache

CENTRE = "the middle square, by Pillow's Lanczos filter"


@dataclass(frozen=True)
class RealImages:
    """The images of a folder, in the order of their paths: its subfolders' too."""

    folder: Path
    files: tuple[Path, ...]
    content: str
    """SHA-256 of every file's name and bytes, in that order."""

    @classmethod
    def of(cls, folder: Path, told: Callable[[int], None] = lambda done: None) -> "RealImages":
        """Raises ConfigError where there is no image. told: how many were hashed so far."""
        if not folder.is_dir():
            raise ConfigError(f"'{folder}', given as real images, is no folder", "Name a folder of images")
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES and file.is_file())
        if not files:
            endings = ", ".join(IMAGES)
            raise ConfigError(f"'{folder}', given as real images, holds none", f"Images end in {endings}")
        digest = hashlib.sha256()
        for done, file in enumerate(files, start=1):
            digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
            told(done)
        return cls(folder, tuple(files), digest.hexdigest())

    def __len__(self) -> int:
        return len(self.files)

    def __str__(self) -> str:
        return f"{len(self):,} images, SHA-256 {self.content[:16]}"

    def image(self, index: int, side: int) -> Tensor:
        """[3, side, side], uint8: the middle square, by Lanczos' filter. Raises DataError where it can't be read."""
        file = self.files[index]
        try:
            return torch.tensor(pixels_of(file.read_bytes(), (side, side))).permute(2, 0, 1)
        except (OSError, ValueError) as error:
            raise DataError(f"'{file}' is no image that can be read: {error}", "Restore it, or take it away") from error

    def batches(self, side: int, size: int) -> Iterator[Tensor]:
        """[B, 3, side, side], uint8."""
        for start in range(0, len(self), size):
            yield torch.stack([self.image(index, side) for index in range(start, min(start + size, len(self)))])


def reference_features(real: RealImages, extractor: Extractor, side: int, batch_size: int) -> np.ndarray:
    """Features [N, D] of the images, each brought to side × side; from the cache where they are there.

    The cache lies in `instaflow/references` of the user's cache folder. A file is called after what its features
    come from: the images, the extractor with its weights and resize, and the size.
    """
    what = f"{real.content} {extractor} {side} {CENTRE}"
    file = cache() / "instaflow" / "references" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.features"
    if file.is_file() and (content := opened(file.read_bytes())):
        kept: np.ndarray = load(content)["features"]
        return kept
    parts: list[np.ndarray] = []
    with Progress("real images", total=len(real), unit="images") as progress:
        for images in real.batches(side, batch_size):
            parts.append(extractor(images))
            progress.update(progress.done + len(images))
    features = np.concatenate(parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, sealed(save({"features": features}, {"of": what})))
    return features
