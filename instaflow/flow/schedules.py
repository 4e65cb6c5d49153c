"""Between a variance-preserving diffusion, x = α data + σ ε, and the flow z_t = t data + (1 - t) ε.

The map is exact: z = x / (α + σ) has t = α / (α + σ) and the same conditional expectations, so a diffusion network's
prediction is a velocity without any approximation (RECIPES E1-E2; the algebra is that of Rectified Flow, Sec. 2.3).
All functions work elementwise on tensors that broadcast; they are meant for float32 or better, since near t = 0.06
an error in ε is amplified 15-fold.
"""

from torch import Tensor


def flow_time(alpha: Tensor, sigma: Tensor) -> Tensor:
    """t = α / (α + σ), in (0, 1)."""
    return alpha / (alpha + sigma)


def flow_state(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """z = x / (α + σ)."""
    return x / (alpha + sigma)


def epsilon_to_data(x: Tensor, epsilon: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """data = (x - σ ε) / α (DDIM, Eq. 9)."""
    return (x - sigma * epsilon) / alpha


def epsilon_to_velocity(x: Tensor, epsilon: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = data - ε = (x - (α + σ) ε) / α."""
    return (x - (alpha + sigma) * epsilon) / alpha


def data_to_velocity(x: Tensor, data: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = data - ε = ((α + σ) data - x) / σ."""
    return ((alpha + sigma) * data - x) / sigma


def velocity_to_data(x: Tensor, velocity: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """data = z + (1 - t) v = (x + σ v) / (α + σ)."""
    return (x + sigma * velocity) / (alpha + sigma)


def v_prediction_to_data(x: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """data = α x - σ v, where v = α ε - σ data (Salimans & Ho 2022, App. D)."""
    return alpha * x - sigma * v


def v_prediction_to_velocity(x: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """data - ε = (α - σ) x - (α + σ) v, which stays finite where α is 0."""
    return (alpha - sigma) * x - (alpha + sigma) * v
