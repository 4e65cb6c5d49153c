"""Heun's method on an EDM: the published algorithm, its order, and the way back."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from instaflow.flow.inversion import invert
from instaflow.flow.straightness import euler
from instaflow.flow.views import EdmView
from instaflow.models.edm_heun import EdmHeunScheduler
from instaflow.models.states import visited_states

VIEW = EdmView()
MEAN, DEVIATION = 0.3, 0.7  # of Gaussian data, whose best denoiser is known


def denoised(noisy, sigma):
    """E[data | data + σ noise] of the Gaussian."""
    return (DEVIATION**2 * noisy + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)


def network(x, timestep):
    """The network whose denoiser is that: F = (D - c_skip x̃) / c_out."""
    sigma = VIEW.sigma(timestep)
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / (sigma**2 + 0.25).sqrt()
    noisy = x * (sigma**2 + 0.25).sqrt()
    return (denoised(noisy, sigma) - c_skip * noisy) / c_out


def noise():
    return torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sampled(scheduler, num_steps, network=network, start=None):
    scheduler.set_timesteps(num_steps)
    x, calls = noise() * (start or scheduler.init_noise_sigma), 0
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, timestep), timestep)
        x, calls = scheduler.step(output, timestep, x, return_dict=False)[0], calls + 1
    return x, calls


def exact(start):
    """Where the flow leads: (x̃ - mean) / √(deviation² + σ²) stays."""
    return MEAN + (start - MEAN) * DEVIATION / (DEVIATION**2 + 80.0**2) ** 0.5


def published(num_steps):
    """Algorithm 1 of arXiv 2206.00364 in a loop over t_i, with the curved network below."""
    levels = [float(level) for level in VIEW.levels(torch.linspace(0, 1, num_steps, dtype=torch.float64))] + [0.0]
    x = noise() * EdmHeunScheduler().init_noise_sigma

    def slope(x, level):
        timestep = torch.tensor(np.log(level) / 4)
        c_in = (level**2 + 0.25) ** -0.5
        output = curved(c_in * x, timestep)
        return (x - (0.25 * c_in**2 * x + 0.5 * level * c_in * output)) / level

    for before, after in pairwise(levels):
        first = slope(x, before)
        ahead = x + (after - before) * first
        x = ahead if after == 0 else x + (after - before) * (first + slope(ahead, after)) / 2
    return x


def curved(x, timestep):
    return torch.sin(1.3 * x + timestep) + 0.2 * x.flip(1)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 18])
def test_it_is_the_published_algorithm(num_steps):
    found, calls = sampled(EdmHeunScheduler(), num_steps, curved)
    assert calls == 2 * num_steps - 1
    torch.testing.assert_close(found, published(num_steps), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "order"), [(EdmHeunScheduler, 2), (EDMEulerScheduler, 1), (EDMDPMSolverMultistepScheduler, 2)]
)
def test_its_order(kind, order):
    counts = np.array([20, 40, 80, 160])
    errors = []
    for count in counts:
        scheduler = kind()
        found, _ = sampled(scheduler, int(count))
        errors.append(float((found - exact(noise() * scheduler.init_noise_sigma)).abs().max()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order - 0.3 < slope < order + 0.6, (slope, errors)


@pytest.mark.parametrize("num_steps", [1, 3, 18])
def test_euler_of_an_edm_is_the_stock_sampler(num_steps):
    # The stock scheduler begins with √(σ² + 1) noise, EDM with σ noise; the view where the noise is the input.
    stock, _ = sampled(EDMEulerScheduler(), num_steps, curved, start=EdmHeunScheduler().init_noise_sigma)
    ours = euler(VIEW, lambda x, timestep: curved(x, timestep[0]), noise(), num_steps).states[-1]
    torch.testing.assert_close(ours.float(), stock.float(), rtol=1e-4, atol=1e-4)


def test_the_way_back_leads_to_the_noise():
    errors, counts = [], np.array([10, 20, 40, 80])
    data = exact(noise() * EdmHeunScheduler().init_noise_sigma)
    for count in counts:
        calls = []

        def counted(x, timestep, calls=calls):
            calls.append(len(x))
            return network(x, timestep)

        found = invert(VIEW, counted, data, int(count))
        assert len(calls) == 2 * count - 1
        errors.append(float((found - noise()).abs().max()))
    assert errors[-1] < 2e-3 and -np.polyfit(np.log(counts), np.log(errors), 1)[0] > 1.7, errors


def test_its_states_lie_on_the_flow():
    states = visited_states(EdmHeunScheduler(), 5)
    levels = VIEW.levels(torch.linspace(0, 1, 5, dtype=torch.float64))
    assert [state.step for state in states] == [0, 2, 4, 6, 8]
    np.testing.assert_allclose([state.scale for state in states], 1 + levels.numpy(), rtol=1e-6)
    np.testing.assert_allclose([state.time for state in states], 1 / (1 + levels.numpy()), rtol=1e-6)


def test_it_is_made_anew_from_its_configuration():
    scheduler = EdmHeunScheduler(sigma_max=20.0, sigma_data=0.8, rho=5.0)
    again = EdmHeunScheduler.from_config(dict(scheduler.config))
    again.set_timesteps(4)
    scheduler.set_timesteps(4)
    assert torch.equal(again.sigmas, scheduler.sigmas)
    assert float(again.sigmas[0]) == pytest.approx(20.0) and again.init_noise_sigma == pytest.approx(20.016, abs=1e-3)
