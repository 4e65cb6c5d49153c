"""The flow backwards: the noise that is known comes out, at the solver's order."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from instaflow.flow.inversion import invert
from instaflow.flow.straightness import euler
from instaflow.flow.views import EpsilonView, VelocityView
from tests.models.made import load, write_flow

SD = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
MEAN, DEVIATION = 0.5, 0.6  # of the data: a Gaussian, whose flow keeps each point's distance in standard deviations
NOISE = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(0))


class Exact(VelocityView):
    """Asks the network at the grid's own times, which the stock sampler rounds to whole timesteps."""

    def grid(self, num_steps):
        times = super().grid(num_steps)[1]
        return 1000 * (1 - times[:-1]), times


def velocity(x, timestep):
    """noise - data, as a perfect flow of that Gaussian returns it."""
    t = (1 - timestep / 1000).view(-1, 1, 1, 1)
    slope = (t * DEVIATION**2 - (1 - t)) / (t**2 * DEVIATION**2 + (1 - t) ** 2)
    return -(MEAN + slope * (x - t * MEAN)).float()


def epsilon(x, timestep):
    alpha, sigma = EpsilonView(SD).alpha_sigma(timestep)
    return sigma * (x - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)


def data_of(noise, alpha, sigma):
    """Where the Gaussian's flow leads from what it takes for noise: α data + σ ε."""
    return MEAN + DEVIATION * (noise - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2) ** 0.5


def rms(difference):
    return float(difference.square().mean().sqrt())


def order(counts, errors):
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def test_the_noise_of_a_gaussian_comes_out_at_second_order():
    data, counts = data_of(NOISE, 0.001, 0.999), [10, 20, 40, 80]
    errors = [rms(invert(Exact(), velocity, data, count) - NOISE) for count in counts]
    assert order(counts, errors) == pytest.approx(2, abs=0.2) and errors[-1] < 1e-4


def test_on_the_stock_grid_rounded_timesteps_are_all_that_is_left():
    data = data_of(NOISE, 0.001, 0.999)
    assert rms(invert(VelocityView(), velocity, data, 100) - NOISE) < 2e-3


def test_a_diffusion_s_noise_is_its_network_s_first_input():
    """Stable Diffusion's grid is coarse at the data: its last step falls as N^-1/2, so the error as N^-3/2."""
    view, counts = EpsilonView(SD), [40, 80, 160]
    data = data_of(NOISE, *view.alpha_sigma(torch.tensor([999])))
    errors = [rms(invert(view, epsilon, data, count) - NOISE) for count in counts]
    assert order(counts, errors) > 1.4 and errors[-1] < 3e-4


def test_halves_are_inverted_in_single_precision():
    data = data_of(NOISE, 0.001, 0.999).bfloat16()
    found = invert(EpsilonView(SD), epsilon, data, 10)
    assert found.dtype == torch.float32
    assert torch.equal(found, invert(EpsilonView(SD), epsilon, data.float(), 10))


@pytest.mark.parametrize("view", [VelocityView(), EpsilonView(SD)], ids=lambda view: type(view).__name__)
def test_the_network_is_called_twice_a_step(view):
    calls = []

    def predict(x, timestep):
        calls.append(int(timestep[0]))
        return torch.zeros_like(x)

    invert(view, predict, NOISE, 5)
    grid = view.grid(5)[0].tolist()
    assert len(calls) == 10 + isinstance(view, EpsilonView)
    assert calls[0] == 0 and calls[-1] == grid[0] and set(calls) == {0, *grid}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    model = load(write_flow(tmp_path_factory.mktemp("flow") / "model", "velocity"))
    text = model.conditioning(["a seven", "an odd digit"], 1.0)
    return lambda x, timestep: model.predict(x, timestep, text, 1.0)


@torch.no_grad()
def test_a_network_is_inverted_at_second_order(network):
    data = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    found = {count: invert(Exact(), network, data, count) for count in (5, 10, 20, 160)}
    errors = [rms(found[count] - found[160]) for count in (5, 10, 20)]
    assert order([5, 10, 20], errors) == pytest.approx(2, abs=0.4)


@torch.no_grad()
def test_there_and_back_is_as_good_as_the_sampler(network):
    """Euler's steps forward, of first order, are what either round trip falls short by."""
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    counts, noise_errors, data_errors = [10, 20, 40], [], []
    for count in counts:
        drawn = euler(Exact(), network, start, count).states[-1]
        noise_errors.append(rms(invert(Exact(), network, drawn, count) - start))
        again = euler(Exact(), network, invert(Exact(), network, start, count), count).states[-1]
        data_errors.append(rms(again - start))
    for errors in noise_errors, data_errors:
        assert order(counts, errors) > 0.8 and errors[-1] < 0.1 * rms(start)
