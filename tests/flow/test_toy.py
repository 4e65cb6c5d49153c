"""The start of reflow from a diffusion's network, worked out for unit Gaussians: independent noise and data, t uniform.

x_t has the variance q = t² + (1-t)², E[noise | x_t] = (1-t)/q x_t and E[data - noise | x_t] = (2t-1)/q x_t. The mean
squared errors below follow from ∫ (1-t)²/q dt = 1/2, ∫ (1-t)(2t-1)/q dt = π/4 - 1 and ∫ (2t-1)²/q dt = 2 - π/2.
RECIPES E5 tells them as sampled, so to two digits: 2.93, 2.09, 2.01 and 1.58.
"""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from instaflow.flow.paths import velocity
from instaflow.flow.views import EpsilonView, VelocityView

COUNT = 2**20
SD = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod


def loss(view, network):
    """The reflow loss of `network(x, t, timestep)`, t spread evenly over the view's range."""
    noise, data = torch.randn(2, COUNT, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    t = view.time((torch.arange(COUNT) + 0.5) / COUNT)
    x, timestep = view.point(noise, data, t)
    output = network(x, t.view(-1, 1, 1, 1), timestep)
    return float((view.velocity(x, timestep, output) - velocity(noise, data)).square().mean())


def epsilon(x, t, timestep):
    """A perfect prediction of the noise."""
    return (1 - t) / (t**2 + (1 - t) ** 2) * x


NETWORKS = {
    "negated at the start, as InstaFlow": (lambda *inputs: -epsilon(*inputs), 9 / 2 - math.pi / 2, 2.93),
    "unchanged": (epsilon, 1 / 2 + math.pi / 2, 2.09),
    "zero": (lambda x, t, timestep: 0 * x, 2.0, 2.01),
    "optimum": (lambda x, t, timestep: -(2 * t - 1) / (t**2 + (1 - t) ** 2) * x, math.pi / 2, 1.58),
}


@pytest.mark.parametrize(("network", "exact", "sampled"), NETWORKS.values(), ids=NETWORKS)
def test_what_a_network_of_noise_is_worth_as_a_velocity(network, exact, sampled):
    assert loss(VelocityView(), network) == pytest.approx(exact, abs=0.01)
    assert exact == pytest.approx(sampled, abs=0.02)


def test_the_exact_map_starts_at_the_optimum():
    """Its t leaves out the ends of [0, 1], where less is to be known: ∫ 2 - (2t-1)²/q dt = arctan(2t - 1)."""
    view = EpsilonView(SD)
    last, first = (float(t) for t in view.times()[[-1, 0]])
    optimum = (math.atan(2 * first - 1) - math.atan(2 * last - 1)) / (first - last)

    def teacher(x, t, timestep):
        return view.alpha_sigma(timestep)[1] * x  # E[noise | x] where α data + σ noise has unit variance

    assert loss(view, teacher) == pytest.approx(optimum, abs=0.01)
    assert optimum == pytest.approx(1.623, abs=1e-3)
