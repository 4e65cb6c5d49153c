"""How different images look to a network: a student's from its teacher's, and a model's own of one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, count, islice
from typing import Any

import numpy as np
import torch

from instaflow.evaluation.features import exactly, in_floats

BATCH = 16  # images at a time: VGG16 of 512×512 pixels takes some 0.4 GB of each
IMAGES, PROMPTS = 4, 100
"""Of diversity: so many images of each of so many prompts, where there are as many."""


@dataclass(frozen=True)
class Perception:
    """LPIPS (arXiv 1801.03924), or the same distance by a network of one's own."""

    words: str
    """Which network."""
    sha256: str
    """Of the file of its weights, or the fingerprint of its folder."""
    network: Any
    """Its call gives features of images [B, 3, H, W] in [-1, 1], its `distance` those of B pairs
    (`training.perceptual`'s networks)."""
    device: torch.device

    def __str__(self) -> str:
        """The line of a protocol's card."""
        return f"{self.words}, weights {self.sha256[:8]}"

    def apart(self, images: np.ndarray) -> np.ndarray:
        """The distance of each two of K images: [N, K, H, W, 3], uint8, to [N, K (K - 1) / 2], float32."""
        some = max(1, BATCH // images.shape[1])
        parts = [self._apart(images[start : start + some]) for start in range(0, len(images), some)]
        return np.concatenate(parts)

    def _apart(self, images: np.ndarray) -> np.ndarray:
        together = in_floats(torch.from_numpy(images).flatten(0, 1)).permute(0, 3, 1, 2)
        with exactly():
            features = [layer.unflatten(0, images.shape[:2]) for layer in self.network(together.to(self.device))]
            pairs = [
                self.network.distance([layer[:, one] for layer in features], [layer[:, other] for layer in features])
                for one, other in combinations(range(images.shape[1]), 2)
            ]
            return torch.stack(pairs, dim=1).float().cpu().numpy()


def of_one_prompt(prompts: Sequence[str], kept: int) -> list[tuple[str, list[int]]]:
    """What diversity is measured on: the first PROMPTS different prompts, with the places of IMAGES images of each.

    Diversity is the mean over prompts of the mean distance of two images of one prompt from different noise, 0 where
    all noise becomes the same image. BicycleGAN measured so by LPIPS (arXiv 1711.11586: 1,900 pairs of 100 inputs), and
    DMD2 what text becomes (arXiv 2405.14867); the counts here, 600 pairs of 100 prompts, are ours.

    Taken are places among the first `kept`, whose images are there; then further ones, from len(prompts) on, that are
    still to be drawn.
    """
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).extend([place] if place < kept else [])
    further = count(len(prompts))
    return [
        (prompt, found[:IMAGES] + [next(further) for _ in range(IMAGES - len(found))])
        for prompt, found in islice(places.items(), PROMPTS)
    ]
