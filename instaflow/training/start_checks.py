"""What is measured before the first update, so that a wrong sign or a wrong clock shows at once."""

from dataclasses import dataclass

from torch import Tensor

from instaflow.errors import InstaFlowError
from instaflow.flow.views import EpsilonView
from instaflow.models.model import Model
from instaflow.models.samplers import flow_scheduler

PARITY_STEPS = 10
PARITY_TOLERANCE = 1e-4


@dataclass(frozen=True)
class StartCheck:
    """One measurement: what, its value, and what it says."""

    what: str
    value: float
    expected: str


def parity(model: Model, noise: Tensor, prompts: list[str], guidance_scale: float) -> StartCheck:
    """The exact map against DDIM of the same network, on the same grid and guidance.

    Raises InstaFlowError if the largest difference of a latent exceeds 1e-4: then the network is not read rightly.
    """
    if not isinstance(model.view(), EpsilonView):
        raise ValueError("parity is between a diffusion teacher and its view as a velocity")
    path = model.trajectory(noise, prompts, num_steps=PARITY_STEPS, guidance_scale=guidance_scale)
    ddim = model.sample(
        noise,
        prompts,
        num_steps=PARITY_STEPS,
        guidance_scale=guidance_scale,
        scheduler=flow_scheduler("epsilon", model.scheduler),
    )
    difference = float((path.states[-1] - ddim).abs().max())
    if not difference <= PARITY_TOLERANCE * max(1.0, float(ddim.abs().max())):
        raise InstaFlowError(
            f"'{model.name}' read as a flow disagrees with DDIM by {difference:.2g} (at most {PARITY_TOLERANCE:g})",
            "Check the noise schedule and prediction_type in the model's scheduler_config.json",
        )
    return StartCheck(f"largest difference to DDIM of the teacher, {PARITY_STEPS} steps", difference, "at most 1e-4")


def coupling_distance(
    model: Model, noise: Tensor, latents: Tensor, prompts: list[str], *, num_steps: int, guidance_scale: float
) -> StartCheck:
    """How far the network's own flow ends from the stored couplings: the RMS over a latent's values."""
    path = model.trajectory(noise, prompts, num_steps=num_steps, guidance_scale=guidance_scale)
    distance = float((path.states[-1] - latents).square().mean().sqrt())
    return StartCheck(f"RMS distance of its {num_steps}-step Euler flow to the couplings", distance, "reported only")
