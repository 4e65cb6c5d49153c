"""The teacher's training samples at any position of an endless, shuffled stream."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from instaflow.digits.losses import autoencoder_loss, denoiser_loss
from instaflow.streams import random_stream, stream_key


def records_at(seed: int, name: str, position: int, size: int, length: int) -> np.ndarray:
    """The records [size] from a position on; each epoch is a permutation of `length` of its own."""
    epochs, offsets = np.divmod(np.arange(position, position + size), length)
    key = stream_key("order", seed, name)
    orders = {epoch: random_stream(key, int(epoch)).permutation(length) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][offset] for epoch, offset in zip(epochs, offsets, strict=True)])


def captions_at(
    seed: int, name: str, position: int, labels: list[list[int]], caption_for: Callable[[list[int], random.Random], str]
) -> list[str]:
    """A true caption for each image, by the labels of its digits, drawn anew at every position."""
    return [
        caption_for(shown, random.Random(f"{seed}/{name}/{position + place}")) for place, shown in enumerate(labels)
    ]


class AutoencoderLoss(nn.Module):
    """`autoencoder_loss` as the training loop takes it."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Scalar. images: [B, 3, H, W] in [-1, 1]; draws: [B, >= 1], whose first column seeds the latents' noise."""
        return autoencoder_loss(self.vae, images, generators_from(draws))


class ClassifierLoss(nn.Module):
    """Cross entropy of ten digits, read from what `layers` make of an image."""

    def __init__(self, layers: nn.Sequential, width: int) -> None:
        """`width`: the values that `layers` make of an image."""
        super().__init__()
        self.layers, self.head = layers, nn.Linear(width, 10)

    def forward(self, images: Tensor, labels: Tensor, draws: np.ndarray) -> Tensor:
        """Scalar. images: [B, 3, H, W] in [-1, 1]; labels: [B], int64; `draws` is not needed."""
        return functional.cross_entropy(self.logits(images), labels)

    def logits(self, images: Tensor) -> Tensor:
        """[B, 10]"""
        return self.head(self.layers(images).flatten(1))


class CaptionLoss(nn.Module):
    """How badly the text encoder's last state tells what a caption allows: binary cross entropy, by cell and digit.

    The last token has seen all the others, and what ends up there stands in one place for whoever attends to it.
    """

    def __init__(
        self, text_encoder: Any, *, tokenizer: Any, allowed_by: Callable[[str], list[frozenset[int]]], cells: int
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.head = nn.Linear(text_encoder.config.hidden_size, 10 * cells)

        @cache
        def known(caption: str) -> tuple[list[int], list[list[float]]]:
            allowed = [[float(digit in cell) for digit in range(10)] for cell in allowed_by(caption)]
            return tokenizer(caption, padding="max_length", truncation=True).input_ids, allowed

        self.known = known

    def forward(self, captions: list[str], draws: np.ndarray) -> Tensor:
        """Scalar; `draws` is not needed."""
        logits = self.logits(captions)
        allowed = torch.tensor([self.known(caption)[1] for caption in captions], device=logits.device)
        return functional.binary_cross_entropy_with_logits(logits, allowed)

    def logits(self, captions: list[str]) -> Tensor:
        """Of each digit's being allowed in each cell [B, cells, 10]."""
        tokens = torch.tensor([self.known(caption)[0] for caption in captions], device=self.head.weight.device)
        return self.head(self.text_encoder(tokens).last_hidden_state[:, -1]).unflatten(1, (-1, 10))


class DenoiserLoss(nn.Module):
    """`denoiser_loss` as the training loop takes it: U-Net and text encoder together."""

    def __init__(
        self,
        unet: Any,
        text_encoder: Any,
        *,
        tokenizer: Any,
        alphas_cumprod: Tensor,
        caption_dropout: float,
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.caption_dropout = unet, text_encoder, caption_dropout
        self.alphas_cumprod = alphas_cumprod

        @cache
        def tokens_of(caption: str) -> list[int]:
            return tokenizer(caption, padding="max_length", truncation=True).input_ids

        self.tokens_of = tokens_of

    def forward(self, latents: Tensor, captions: list[str], draws: np.ndarray) -> Tensor:
        """Scalar. latents: [B, 4, h, w], scaled; draws: [B, >= 2], for noise and timesteps, and for caption dropout."""
        kept = ["" if u < self.caption_dropout else text for u, text in zip(draws[:, 1], captions, strict=True)]
        generators, shape = generators_from(draws), latents.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=own) for own in generators]).to(latents.device)
        timesteps = torch.cat([torch.randint(len(self.alphas_cumprod), (1,), generator=own) for own in generators])
        return denoiser_loss(
            self.unet,
            self.text_encoder,
            self.alphas_cumprod.to(latents.device),
            latents=latents,
            input_ids=torch.tensor([self.tokens_of(text) for text in kept], device=latents.device),
            noise=noise,
            timesteps=timesteps.to(latents.device),
        )


def generators_from(draws: np.ndarray) -> list[torch.Generator]:
    """A CPU generator for each sample, so that no split of the batch changes its noise."""
    return [torch.Generator().manual_seed(int(number * 2**53)) for number in draws[:, 0]]
