"""What a teacher is trained on: images of real digits and their captions, at any position of an endless stream."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from instaflow.digits import captions, grid_captions
from instaflow.digits.images import SIZE, real_digits, tiled
from instaflow.digits.losses import encode_all
from instaflow.digits.stream import captions_at, records_at


class DigitsData:
    """One digit an image. Every batch is a function of seed, stream's name and position alone."""

    side = 1  # of an image, in digits

    def __init__(self, seed: int, device: torch.device) -> None:
        digits, labels = real_digits(SIZE // self.side)
        self.seed, self.digits, self.labels = seed, digits.to(device), labels.to(device)

    def images_at(self, stream: str, position: int, size: int) -> Tensor:
        """[size, 3, 32, 32] in [-1, 1]"""
        return tiled(self.digits[self._records_at(stream, position, size)])

    def captions_at(self, stream: str, position: int, size: int) -> list[str]:
        """What is said about the images there."""
        labels = self.labels[self._records_at(stream, position, size)].tolist()
        return captions_at(self.seed, stream, position, labels, self.caption_for)

    def latents_by(self, vae: Any) -> Callable[[str, int, int], Tensor]:
        """What gives the scaled latents of the images there."""
        latents = encode_all(vae, self.digits)
        return lambda stream, position, size: latents[self._records_at(stream, position, size)[:, 0]]

    def labelled_at(self, stream: str, position: int, size: int) -> tuple[Tensor, Tensor]:
        """Single digits, as large as in the images [size, 3, H, W], and what they are [size]."""
        records = records_at(self.seed, stream, position, size, len(self.digits))
        return self.digits[records], self.labels[records]

    @staticmethod
    def caption_for(labels: list[int], rng: random.Random) -> str:
        return captions.caption_for(labels[0], rng)

    @staticmethod
    def allowed_by(caption: str) -> list[frozenset[int]]:
        """The digits that a caption allows in each cell [side²]."""
        return [captions.digits_named(caption)]

    def _records_at(self, stream: str, position: int, size: int) -> Tensor:
        """The digits of each image [size, side²]: all in their turn, each once an epoch."""
        cells = self.side**2
        records = records_at(self.seed, stream, cells * position, cells * size, len(self.digits))
        return torch.from_numpy(records).unflatten(0, (size, cells))


class GridData(DigitsData):
    """Four digits in a square, of ten million million combinations: none is made before it is its turn."""

    side = 2

    def latents_by(self, vae: Any) -> Callable[[str, int, int], Tensor]:
        return lambda stream, position, size: encode_all(vae, self.images_at(stream, position, size))

    @staticmethod
    def caption_for(labels: list[int], rng: random.Random) -> str:
        return grid_captions.caption_for(labels, rng)

    @staticmethod
    def allowed_by(caption: str) -> list[frozenset[int]]:
        named = grid_captions.cells_named(caption)
        return [captions.DIGITS if digit is None else frozenset({digit}) for digit in named]


DATA: dict[str, type[DigitsData]] = {"digits": DigitsData, "digits-grid": GridData}
