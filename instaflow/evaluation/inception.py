"""InceptionV3's features, those of FID: torch-fidelity's port of TensorFlow's network of 2015-12-05."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from instaflow.errors import DataError, reason_of
from instaflow.evaluation.features import Extractor
from instaflow.weights import hash_of

SIDE = 299
Resize = Literal["tensorflow", "clean-fid"]
RESIZES = {
    "tensorflow": "TensorFlow 1's bilinear resize to 299×299, without a filter, as FID began",
    "clean-fid": "clean-fid's: Pillow's bicubic with its filter to 299×299, each channel in floats (arXiv 2104.11222)",
}


def inception(weights: Path, *, resize: Resize = "tensorflow", device: torch.device) -> Extractor:
    """The 2,048 features after the last pooling. Raises DataError if the file holds other weights.

    weights: `instaflow.weights.find("inception")`. clean-fid's own file is the same network as TorchScript.
    """
    layers = load_layers(weights).to(device)
    resized = cleanly if resize == "clean-fid" else interpolated

    def extract(images: Tensor) -> Tensor:
        features: Tensor = layers((resized(images, device) - 128) / 128)
        return features

    return Extractor(
        "inception" if resize == "tensorflow" else f"inception-{resize}",
        "InceptionV3's pooled features (torch-fidelity)",
        RESIZES[resize],
        2048,
        hash_of(weights),
        extract,
    )


def load_layers(weights: Path) -> nn.Sequential:
    """From images [B, 3, 299, 299] in [-1, 1] to [B, 2048]. Raises DataError."""
    try:
        torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity itself would run a pickle's code
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(weights))
    except Exception as error:  # each kind of damage raises its own
        reason = reason_of(error)
        raise DataError(
            f"'{weights}' holds no weights of torch-fidelity's InceptionV3: {reason}",
            "Take the file that torch-fidelity gives out, as it is: instaflow weights inception",
        ) from error
    *layers, _ = network.children()  # in the order of its forward; the last one classifies
    return nn.Sequential(*layers, nn.Flatten()).eval()


def interpolated(images: Tensor, device: torch.device) -> Tensor:
    """[B, 3, 299, 299] in [0, 255], float32, of images [B, 3, H, W], uint8."""
    resized: Tensor = interpolate_bilinear_2d_like_tensorflow1x(
        images.to(device).float(), size=(SIDE, SIDE), align_corners=False
    )
    return resized


def cleanly(images: Tensor, device: torch.device) -> Tensor:
    """The same by Pillow, whose filter widens where it makes images smaller: no aliasing, nothing rounded."""
    channels = images.flatten(0, 1).float().numpy()
    resized = [
        np.asarray(Image.fromarray(channel).resize((SIDE, SIDE), Image.Resampling.BICUBIC)).clip(0, 255)
        for channel in channels
    ]
    return torch.from_numpy(np.stack(resized)).view(len(images), 3, SIDE, SIDE).to(device)
