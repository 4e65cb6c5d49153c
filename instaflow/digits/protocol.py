"""The digits protocol: which prompts, which reference, and how an image is judged."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from instaflow.digits.captions import TRAINED, digits_named, evaluation_prompts
from instaflow.digits.images import features, real_digits
from instaflow.digits.reader import DigitReader

__all__ = ["DigitsProtocol", "features", "real_digits"]


@dataclass(frozen=True)
class Accuracy:
    """The share of images whose digit the prompt names: of all, and of prompts that no training stage saw."""

    all: float
    unseen: float | None


class DigitsProtocol:
    """What a model's images are asked for and compared with."""

    def __init__(self, num_samples: int) -> None:
        self.prompts = evaluation_prompts(num_samples)
        self.named = [digits_named(prompt) for prompt in self.prompts]
        self.unseen = np.array([prompt not in TRAINED for prompt in self.prompts])
        self.reader = DigitReader()
        self.real_images, _ = real_digits()

    def readings(self, images: Tensor) -> list[int]:
        """The digit that the reader sees on each image. images: [N, 3, 32, 32] in [-1, 1]."""
        return self.reader.read(images).tolist()

    def accuracy(self, readings: list[int]) -> Accuracy:
        """How many readings lie in the sets that the prompts name; for an open prompt any digit of its set counts."""
        right = np.array([digit in named for digit, named in zip(readings, self.named, strict=True)])
        return Accuracy(float(right.mean()), float(right[self.unseen].mean()) if self.unseen.any() else None)

    def gallery(self, count: int) -> list[int]:
        """The places of `count` different prompts to show: each digit-naming and open ones, some of them unseen."""
        places: dict[str, int] = {}
        for place, prompt in enumerate(self.prompts):
            places.setdefault(prompt, place)
        unseen = [place for place in places.values() if self.unseen[place]][: count // 4]
        specific = [p for p in places.values() if len(self.named[p]) == 1 and not self.unseen[p]]
        digits: dict[frozenset[int], int] = {}
        for place in specific:
            digits.setdefault(self.named[place], place)
        opened = [p for p in places.values() if len(self.named[p]) > 1 and not self.unseen[p]]
        half = (count - len(unseen) + 1) // 2
        chosen = [*list(digits.values())[:half], *opened[: count - len(unseen) - half], *unseen]
        return chosen[:count]


def unrelated_distance(images: Tensor, prompts: list[str]) -> float | None:
    """The median distance of two images of one prompt from different noises; None where no prompt stands twice."""
    last: dict[str, int] = {}
    pairs = []
    for place, prompt in enumerate(prompts):
        if prompt in last:
            pairs.append((last[prompt], place))
        last[prompt] = place
    if not pairs:
        return None
    first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
    return float(np.median(distances(images[first], images[second])))


def distances(images: Tensor, others: Tensor) -> np.ndarray:
    """The root mean squared pixel difference of each pair [N]. images, others: [N, 3, H, W] in [-1, 1]."""
    return (images - others).square().flatten(1).mean(1).sqrt().cpu().numpy()
