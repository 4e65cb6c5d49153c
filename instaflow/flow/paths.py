"""The straight path between a coupled noise and its data.

Time t runs from 0 (noise) to 1 (data), as in Rectified Flow (Liu et al. 2022) and InstaFlow (arXiv 2309.06380, Eq. 4).
"""

from torch import Tensor


def interpolate(noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """The point x_t = (1 - t) noise + t data. noise, data: [B, C, H, W]; t: [B] in [0, 1]."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * noise + t * data


def velocity(noise: Tensor, data: Tensor) -> Tensor:
    """The constant velocity dx_t/dt = data - noise of the straight path. noise, data: [B, C, H, W]."""
    return data - noise
