"""How different two latents look once decoded: LPIPS (Zhang et al., arXiv 1801.03924), differentiable."""

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from instaflow.errors import DataError, reason_of
from instaflow.files import replace_folder, write_json
from instaflow.training.draws import CROP

FORMAT = 1
TAPS = {"alex": (2, 5, 8, 10, 12), "vgg": (4, 9, 16, 23, 30)}
"""The layers of torchvision's `features` after which LPIPS looks: behind each ReLU, or each last one before a pool."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's moments, for images in [-1, 1]
SMALL, ENLARGED = 64, 224
"""Sides in pixels: images of at most 64 are enlarged bilinearly to 224 for ImageNet's networks, as 2-rectified flow++
and DMD do."""


class PerceptualNetwork(nn.Module):
    """d(x, y) = Σ_l mean_hw Σ_c w_lc (f_l(x) - f_l(y))², f_l a layer's output with unit norm over channels (Eq. 1)."""

    shift: Tensor
    scale: Tensor

    def __init__(
        self, layers: nn.Sequential, taps: Sequence[int], heads: Sequence[Tensor] | None = None, *, of_imagenet: bool
    ) -> None:
        """`taps`: after how many layers features are taken. `heads`: the weights w_l [1, C, 1, 1], by default all 1."""
        super().__init__()
        bounds = zip((0, *taps), taps, strict=False)
        self.slices = nn.ModuleList(layers[start:end] for start, end in bounds)
        self.heads = nn.ParameterList([torch.ones(())] * len(taps) if heads is None else heads)
        self.of_imagenet = of_imagenet
        self.register_buffer("shift", torch.tensor(SHIFT if of_imagenet else (0.0,) * 3).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE if of_imagenet else (1.0,) * 3).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Each tapped layer's normalised features [B, C, h, w], float32. images: [B, 3, H, W] in [-1, 1]."""
        if self.of_imagenet and min(images.shape[2:]) <= SMALL:
            images = functional.interpolate(images, size=ENLARGED, mode="bilinear", align_corners=False)
        x, features = (images - self.shift) / self.scale, []
        for part in self.slices:
            x = part(x)
            features.append(functional.normalize(x.float(), dim=1, eps=1e-10))  # its gradient is finite at zero, too
        return features

    def distance(self, features: list[Tensor], others: list[Tensor]) -> Tensor:
        """d of each pair of images [B], from what `forward` makes of them."""
        layers = zip(features, others, self.heads, strict=True)
        return torch.stack([((one - other).square() * head).sum(1).mean((1, 2)) for one, other, head in layers]).sum(0)


class PerceptualDistance:
    """d(decode(z), decode(z')) of scaled latents, with the gradient going through a frozen decoder to z.

    No module, for nothing of it is trained, averaged or saved with the network.
    """

    def __init__(self, vae: Any, network: PerceptualNetwork, crop: int | None = None) -> None:
        """`vae` decodes, None where latents are pixels.

        `crop`: the side in latent cells of the square that is compared, at a drawn place.
        """
        self.vae, self.network, self.crop = vae, network, crop

    def __call__(self, latents: Tensor, targets: Tensor, draws: np.ndarray) -> Tensor:
        """The distance of each pair [B]. latents, targets: [B, C, h, w]; draws: [B, COLUMNS], the crop's among them."""
        if self.crop:
            latents, targets = (cropped(part, self.crop, draws[:, CROP]) for part in (latents, targets))
        with torch.no_grad():
            wanted = self.network(self.decode(targets))
        return self.network.distance(self.network(self.decode(latents)), wanted)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], about [-1, 1]: not clamped, which would stop the gradient."""
        if self.vae is None:
            return latents
        images: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return images


def cropped(latents: Tensor, side: int, places: np.ndarray) -> Tensor:
    """A square [B, C, side, side] of each latent [B, C, h, w]; places: [B, 2] in [0, 1), of its row and column."""
    height, width = latents.shape[2:]
    corners = (places * [height - side + 1, width - side + 1]).astype(int)
    return torch.stack(
        [
            latent[:, row : row + side, column : column + side]
            for latent, (row, column) in zip(latents, corners, strict=True)
        ]
    )


# --- networks on disk -------------------------------------------------------------------------------------------------


def backbone(name: str) -> nn.Sequential:
    """The layers of torchvision's network for "alex" or "vgg", at random weights."""
    import torchvision

    make = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[name]
    layers: nn.Sequential = make(weights=None).features
    return layers


def load_lpips(name: str, weights: Path) -> PerceptualNetwork:
    """LPIPS version 0.1 on "alex" or "vgg", its backbone from torchvision's file. Raises DataError if that is another.

    The heads come with the package lpips.
    """
    with torch.device("meta"):
        layers = backbone(name)
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        own = {key.removeprefix("features."): value.float() for key, value in state.items() if "features." in key}
        layers.load_state_dict(own, assign=True)
    except Exception as error:  # each kind of damage raises its own
        reason = reason_of(error)
        raise DataError(
            f"'{weights}' holds no weights of torchvision's network for '{name}': {reason}",
            f"Take the file that torchvision gives out, as it is: instaflow weights lpips-{name}",
        ) from error
    package = importlib.util.find_spec("lpips")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "weights" / "v0.1" / f"{name}.pth"
    heads = torch.load(file, map_location="cpu", weights_only=True)
    return PerceptualNetwork(
        layers, TAPS[name], [heads[f"lin{i}.model.1.weight"] for i in range(len(TAPS[name]))], of_imagenet=True
    )


def small_layers(channels: Sequence[int], strides: Sequence[int]) -> nn.Sequential:
    """3×3 convolutions, each with its ReLU. `channels`: those of the images and of each layer."""
    pairs = zip(channels, channels[1:], strides, strict=False)
    convolutions = [nn.Conv2d(before, after, 3, stride, padding=1) for before, after, stride in pairs]
    return nn.Sequential(*(layer for convolution in convolutions for layer in (convolution, nn.ReLU())))


def save_network(folder: Path, layers: nn.Sequential, channels: Sequence[int], strides: Sequence[int]) -> None:
    """Write the folder of a network that `small_layers` made: config.json and model.safetensors."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write_json(temporary / "config.json", {"format": FORMAT, "channels": list(channels), "strides": list(strides)})
    state = {name: value.detach().cpu().contiguous() for name, value in layers.state_dict().items()}
    save_file(state, temporary / "model.safetensors")
    replace_folder(temporary, folder)


def write_tiny_network(folder: Path) -> None:
    """A network's folder with two layers of random weights, of seed 0."""
    torch.manual_seed(0)
    channels, strides = (3, 8, 8), (1, 2)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_network(folder, small_layers(channels, strides), channels, strides)


def load_network(folder: Path) -> PerceptualNetwork:
    """The network in a folder that `save_network` wrote; each of its layers counts alike. Raises DataError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise ValueError(f"its format {config['format']!r} is not {FORMAT}")
        layers = small_layers(config["channels"], config["strides"])
        layers.load_state_dict(load_file(folder / "model.safetensors"))
    except Exception as error:  # safetensors and torch each raise their own kinds
        reason = reason_of(error)
        raise DataError(
            f"'{folder}' is no perceptual network: {reason}", "Name a teacher stage, or its folder 'perceptual'"
        ) from error
    return PerceptualNetwork(layers, range(2, len(layers) + 1, 2), of_imagenet=False)
