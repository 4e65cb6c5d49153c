"""How near latents are to others, without an image of them."""

import numpy as np
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

CELLS = 4  # a side: 64 features of Stable Diffusion's four channels, few enough for a hundred latents


def features(latents: Tensor) -> np.ndarray:
    """The means [N, C · 16] of latents [N, C, H, W] over a grid of 4×4 cells, or of fewer where they are smaller."""
    height, width = latents.shape[2:]
    return adaptive_avg_pool2d(latents.float(), (min(CELLS, height), min(CELLS, width))).flatten(1).cpu().numpy()


def rms_distance(latents: Tensor, others: Tensor) -> float:
    """√ mean (a - b)² over all numbers of latents and their counterparts, both [N, C, H, W]."""
    return float((latents - others).double().square().mean().sqrt())
