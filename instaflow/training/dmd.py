"""The distribution matching gradient of DMD (arXiv 2311.18828)."""

from torch import Tensor
from torch.nn import functional

SMALLEST = 1e-6
"""The least normaliser, so that a sample that is its own real mean is not divided by zero."""


def matching_direction(x: Tensor, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """Where the samples come from, seen from where they should be: (μ_fake - μ_real) / mean|x - μ_real|.

    (DMD, Eqs. 7 and 8, as its Algorithm 2 has them.) All [B, ...]; the mean is over each sample's values. The means are
    those of the data, as predicted at one diffused point of x by the teacher (real) and by the network that is trained
    on the generator's samples (fake).
    """
    normaliser = (x - real_mean).abs().flatten(1).mean(1).clamp(min=SMALLEST)
    return (fake_mean - real_mean) / normaliser.view(-1, *[1] * (x.dim() - 1))


def matching_loss(x: Tensor, direction: Tensor) -> Tensor:
    """½ mean (x - sg[x - direction])²: its gradient by x is `direction` over the number of values."""
    return 0.5 * functional.mse_loss(x, (x - direction).detach())
