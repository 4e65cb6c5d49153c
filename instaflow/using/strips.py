"""Strips: images on the way from one seed to the next, or from one prompt to the next."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from instaflow.flow.paths import slerp
from instaflow.using.generator import Generator


def through_noises(noises: Tensor, between: int) -> Tensor:
    """Noises [K, C, H, W] with `between` more on the great circle from each to the next: [(K-1) (between+1) + 1, ...].

    All of them have the norm that noise has.
    """
    shares = [step / (between + 1) for step in range(between + 1)]
    way = [slerp(first, last, share) for first, last in pairwise(noises) for share in shares]
    return torch.stack([*way, noises[-1]])


def through_prompts(
    model: Generator,
    prompts: Sequence[str],
    between: int,
    *,
    noise: Tensor,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
) -> Tensor:
    """Latents of K prompts and of `between` blends from each to the next, all from one noise [1, C, H, W]."""
    shares = [step / (between + 1) for step in range(between + 1)]
    pairs = list(pairwise(prompts))
    parts = [
        model.blended(
            pair,
            shares if pair is not pairs[-1] else [*shares, 1.0],
            noise=noise,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
        )
        for pair in pairs
    ]
    return torch.cat(parts)
