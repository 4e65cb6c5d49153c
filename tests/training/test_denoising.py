"""EDM's loss: which noise levels it draws, and what is a perfect network's."""

import math

import numpy as np
import pytest
import torch

from instaflow.flow.views import EdmView
from instaflow.training.denoising import EdmLoss
from instaflow.training.draws import draws

DATA = -0.7  # of each pixel, so that the network that is right can be written down


class Right(torch.nn.Module):
    """What a network answers that knows the data."""

    def __init__(self):
        super().__init__()
        self.timesteps = []

    def forward(self, x, timestep, return_dict=True):
        self.timesteps.append(timestep)
        cos, sin = EdmView().cos_sin(x, timestep)
        noise = (x - cos / 0.5 * DATA) / sin
        return (EdmView().target(noise, torch.full_like(x, DATA), timestep),)


def test_noise_levels_are_log_normal_about_the_mean_and_the_right_network_loses_nothing():
    network, count = Right(), 20000
    loss = EdmLoss(network, EdmView(), 0.4)
    noise = torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    numbers = draws(0, "denoiser", 0, count)
    value = loss(noise, torch.full_like(noise, DATA), None, numbers)
    log_sigma = 4 * network.timesteps[0].double().numpy()
    assert log_sigma.mean() == pytest.approx(0.4, abs=5 * 1.2 / math.sqrt(count))
    assert log_sigma.std() == pytest.approx(1.2, abs=5 * 1.2 / math.sqrt(2 * count))
    assert np.percentile(log_sigma, 84.13) == pytest.approx(1.6, abs=0.05)
    assert value == pytest.approx(0, abs=1e-6)
