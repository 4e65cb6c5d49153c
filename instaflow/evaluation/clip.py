"""CLIP's features of images, and how near an image is to its prompt: OpenCLIP's networks, text and preprocessing."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg
from torch import Tensor
from torch.nn.functional import cosine_similarity

from instaflow.errors import DataError, reason_of
from instaflow.evaluation.features import BATCH, exactly, in_bytes, pictures

NETWORKS = {
    "clip-vit-g-14": ("ViT-g-14", "laion2b_s12b_b42k"),
    "clip-vit-l-14": ("ViT-L-14-quickgelu", "openai"),  # without -quickgelu the activation would be another
}
"""OpenCLIP's architecture and pretraining of each file in `instaflow.weights`. The pretraining says how images are
prepared, which to open_clip a path to a file alone does not."""


@dataclass(frozen=True)
class Clip:
    """A network in float32, and how images and texts are made ready for it."""

    name: str
    architecture: str
    pretraining: str
    sha256: str
    """Of the tensors, by `hash_of_tensors`: the same from .bin and from .safetensors."""
    network: Any
    prepare: Callable[[Any], Tensor]
    """A Pillow image's numbers [3, S, S]."""
    tokenize: Callable[[list[str]], Tensor]
    """Tokens [B, 77]; a longer text is cut, and ends in the end's token all the same."""
    device: torch.device

    def __str__(self) -> str:
        return f"OpenCLIP's {self.architecture}, {self.pretraining}, weights {self.sha256[:8]}"

    @property
    def resize(self) -> str:
        how, side = self.network.visual.preprocess_cfg, self.network.visual.image_size[0]
        to = f"the shorter side to {side}, then the middle" if how["resize_mode"] == "shortest" else how["resize_mode"]
        return f"Pillow's {how['interpolation']}, {to}, {side}×{side}"

    def images(self, images: Tensor) -> Tensor:
        """Features [B, D] of images [B, 3, H, W], uint8."""
        ready = torch.stack([self.prepare(image) for image in pictures(images)])
        features: Tensor = self.network.encode_image(ready.to(self.device))
        return features

    def texts(self, texts: list[str]) -> Tensor:
        """Features [B, D]."""
        features: Tensor = self.network.encode_text(self.tokenize(texts).to(self.device))
        return features

    def scores(
        self, images: Tensor, prompts: Sequence[str], *, prefix: str = "", batch_size: int = BATCH
    ) -> np.ndarray:
        """The cosine of each image and its prompt, [N] in [-1, 1]; their mean is the papers' CLIP score, such as 0.304.

        Others multiply it by 100, or (CLIPScore) by 2.5, and set what is below 0 to 0.

        images: [N, 3, H, W], uint8 or of any float type in [-1, 1]. prefix: put before each prompt; that of DMD
        and GigaGAN is "A photo depicts ", after CLIPScore (arXiv 2104.08718).
        """
        parts = []
        with exactly():
            for start in range(0, len(images), batch_size):
                batch = slice(start, start + batch_size)
                texts = [prefix + prompt for prompt in prompts[batch]]
                cosines = cosine_similarity(self.images(in_bytes(images[batch])), self.texts(texts))
                parts.append(cosines.cpu().numpy())
        return np.concatenate(parts)


def load_clip(name: str, weights: Path, *, device: torch.device) -> Clip:
    """The network of this name in `NETWORKS`, from its file. Raises DataError if that holds another's weights."""
    architecture, pretraining = NETWORKS[name]
    how = get_pretrained_cfg(architecture, pretraining)
    try:
        network, prepare = open_clip.create_model_from_pretrained(
            architecture,
            pretrained=str(weights),
            image_mean=how["mean"],
            image_std=how["std"],
            image_interpolation=how["interpolation"],
            image_resize_mode=how["resize_mode"],
        )
    except Exception as error:  # each kind of damage raises its own
        reason = reason_of(error)
        raise DataError(
            f"'{weights}' holds no weights of OpenCLIP's {architecture}: {reason}",
            f"Take the file that is given out, as it is: instaflow weights {name}",
        ) from error
    sha256 = hash_of_tensors(network.state_dict())
    network = network.to(device).requires_grad_(False).eval()
    tokenize = open_clip.get_tokenizer(architecture)
    return Clip(name, architecture, pretraining, sha256, network, prepare, tokenize, device)


def hash_of_tensors(state: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of tensors on the CPU with their names, types and shapes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
