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


def slerp(noise: Tensor, other: Tensor, t: float) -> Tensor:
    """The point of the great circle through two noises, each [...], t of the way from the first to the other.

    sin((1-t) θ) / sin θ · noise + sin(t θ) / sin θ · other, where θ is the angle between them (Shoemake 1985). A
    straight line would pass through noise of too small a norm, which no network was trained on. Where the two point
    the same way or opposite ones there is no such circle, and the line is taken.
    """
    cosine = (noise * other).sum() / (noise.norm() * other.norm())
    angle = cosine.clamp(-1, 1).acos()
    if angle.sin() < 1e-4:
        return (1 - t) * noise + t * other
    return (((1 - t) * angle).sin() * noise + (t * angle).sin() * other) / angle.sin()
