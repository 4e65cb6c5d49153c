"""The miniature's images: scikit-learn's handwritten digits, and the pixel space that they are compared in."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

SIZE = 32  # of the images that the autoencoder sees
FEATURE_SIZE = 8  # of the scans that the data set holds


def real_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All 1,797 real digits and what they are.

    The UCI set's 8x8 scans with 17 grey levels, ink bright on dark, bilinearly enlarged to three equal channels.

    Returns:
        images: [1797, 3, 32, 32], float32 in [-1, 1]
        labels: [1797], int64 in 0..9
    """
    digits = load_digits()
    scans = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # [1797, 1, 8, 8]
    images = functional.interpolate(scans, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return images.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(digits.target).long()


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
