"""The miniature's images: scikit-learn's digits, one or four to an image, and the space that they are compared in."""

import math

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

SIZE = 32  # of the images that the autoencoder sees, however many digits share one
FEATURE_SIZE = 8  # of the scans that the data set holds


def real_digits(size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """All 1,797 real digits and what they are.

    The UCI set's 8x8 scans with 17 grey levels, ink bright on dark, bilinearly enlarged to three equal channels.

    Returns:
        images: [1797, 3, size, size], float32 in [-1, 1]
        labels: [1797], int64 in 0..9
    """
    digits = load_digits()
    scans = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # [1797, 1, 8, 8]
    images = functional.interpolate(scans, size=(size, size), mode="bilinear", align_corners=False)
    return images.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(digits.target).long()


def real_images(side: int) -> torch.Tensor:
    """Each real digit once, in the data set's order, side² to an image; what fills no whole image is left out.

    Returns:
        [1797 // side², 3, 32, 32], float32 in [-1, 1]
    """
    digits, _ = real_digits(SIZE // side)
    whole = len(digits) // side**2
    return tiled(digits[: whole * side**2].unflatten(0, (whole, side**2)))


def smaller(images: torch.Tensor, size: int) -> torch.Tensor:
    """Square images [N, C, size, size], each pixel the mean of those that it covers: `features` sees no difference.

    size: a multiple of 8 that divides the images' side.
    """
    return functional.avg_pool2d(images, images.shape[-1] // size)


def tiled(digits: torch.Tensor) -> torch.Tensor:
    """Square images of K² digits each, in the order of reading: [N, K², C, H, W] to [N, C, K·H, K·W]."""
    count, cells, channels, height, width = digits.shape
    side = math.isqrt(cells)
    rows = digits.reshape(count, side, side, channels, height, width)
    return rows.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, side * height, side * width)


def cells_of(images: torch.Tensor, side: int) -> torch.Tensor:
    """What `tiled` was given: [N, C, side·H, side·W] to [N, side², C, H, W]."""
    count, channels, height, width = images.shape
    rows = images.reshape(count, channels, side, height // side, side, width // side)
    return rows.permute(0, 2, 4, 1, 3, 5).reshape(count, side**2, channels, height // side, width // side)


def features(images: torch.Tensor) -> np.ndarray:
    """Images as points of the evaluation's space: their grey pixels at 8x8.

    The mean of red, green and blue, averaged over 4x4 squares. No learned network stands between an image and its
    features, so a Fréchet distance there can be read in pixels.

    Args:
        images: [N, 3, H, W] in [-1, 1], H and W multiples of 8

    Returns:
        [N, 64], float64 in [-1, 1]
    """
    grey = images.detach().double().mean(dim=1, keepdim=True)
    return functional.adaptive_avg_pool2d(grey, FEATURE_SIZE).flatten(1).cpu().numpy()
