"""Every view's network as a denoiser: what it is fed at a timestep, and what its output stands for there."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler

from instaflow.flow.views import EdmView, EpsilonView, VelocityView

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ALPHAS = DDIMScheduler(**SCHEDULE).alphas_cumprod
VIEWS = {
    "velocity": VelocityView(),
    **{kind: EpsilonView(ALPHAS, kind) for kind in ("epsilon", "v_prediction", "sample")},
    "edm": EdmView(),
}
every_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
SHARES = torch.tensor([0.0, 0.0204, 0.5, 0.73, 0.9996])


def normal(seed, dtype=torch.float64):
    return torch.randn(len(SHARES), 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@every_view
def test_the_target_stands_for_the_data(view):
    noise, data, timestep = normal(0), normal(1), view.timestep(SHARES)
    x, target = view.noised(noise, data, timestep), view.target(noise, data, timestep)
    found = view.predicted_data(x, timestep, target)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, data, rtol=0, atol=1e-6 if isinstance(view, EpsilonView) else 1e-13)
    torch.testing.assert_close(view.velocity(x, timestep, target), data - noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("read", ["predicted_data", "velocity"])
@pytest.mark.parametrize("kind", [kind for kind in VIEWS if kind != "velocity"])
def test_halves_are_read_in_single_precision(kind, read):
    """Near the noise an output's rounding is amplified: nothing of it may come from the reading."""
    timestep = VIEWS[kind].timestep(SHARES)
    x, output = normal(2).bfloat16(), normal(3).bfloat16()
    found = getattr(VIEWS[kind], read)(x, timestep, output)
    assert found.dtype == torch.float32
    assert torch.equal(found, getattr(VIEWS[kind], read)(x.float(), timestep, output.float()))


def test_an_edm_is_asked_for_no_level_that_it_does_not_know():
    view, ends = VIEWS["edm"], torch.tensor([math.log(80.0), math.log(0.002)], dtype=torch.float64) / 4
    _, found = view.point(normal(0)[:2], normal(1)[:2], torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(found, ends)
    shares = torch.tensor([1.0, 0.0])  # the first is what float32 makes of nearly 1
    torch.testing.assert_close(view.timestep(shares), ends.float())


@every_view
def test_the_same_data_as_the_velocity_leads_to(view):
    x, output, timestep = normal(2), normal(3), view.timestep(SHARES)
    led = view.data(x, timestep, view.velocity(x, timestep, output))
    torch.testing.assert_close(view.predicted_data(x, timestep, output), led, rtol=1e-5, atol=1e-5)


@every_view
def test_noise_rises_with_the_share(view):
    timestep = view.timestep(torch.linspace(0, 0.999, 50, dtype=torch.float64))
    ones, zeros = torch.ones(50, 1, 1, 1, dtype=torch.float64), torch.zeros(50, 1, 1, 1, dtype=torch.float64)
    ratio = (view.noised(ones, zeros, timestep) / view.noised(zeros, ones, timestep)).flatten()
    assert (ratio.diff() > 0).all() and ratio[0] < 0.05 and ratio[-1] > 14


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_diffusions_are_the_stock_schedulers(kind):
    view, stock = VIEWS[kind], DDIMScheduler(**SCHEDULE, prediction_type=kind)
    noise, data, timestep = normal(0, torch.float32), normal(1, torch.float32), view.timestep(SHARES)
    assert timestep.tolist() == [0, 20, 500, 730, 999] and timestep.dtype == torch.int64
    torch.testing.assert_close(view.noised(noise, data, timestep), stock.add_noise(data, noise, timestep))
    if kind == "v_prediction":
        torch.testing.assert_close(view.target(noise, data, timestep), stock.get_velocity(data, noise, timestep))


def test_a_velocitys_timestep_is_its_noise_level():
    view, noise, data = VIEWS["velocity"], normal(0), normal(1)
    timestep = view.timestep(SHARES)
    torch.testing.assert_close(timestep, 1000 * SHARES)
    torch.testing.assert_close(view.noised(noise, data, timestep)[3], 0.27 * data[3] + 0.73 * noise[3])
    assert torch.equal(view.target(noise, data, timestep), noise - data)


# --- EDM --------------------------------------------------------------------------------------------------------------


def preconditioning(sigma, sigma_data=0.5):
    """c_skip, c_out, c_in and c_noise as Table 1 has them (arXiv 2206.00364)."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total**0.5, 1 / total**0.5, math.log(sigma) / 4


@pytest.mark.parametrize("sigma", [0.002, 0.3, 7.0, 80.0])
@pytest.mark.parametrize("sigma_data", [0.5, 0.8])
def test_an_edm_is_preconditioned_as_published(sigma, sigma_data):
    view, noise, data, output = EdmView(sigma_data), normal(0), normal(1), normal(2)
    c_skip, c_out, c_in, c_noise = preconditioning(sigma, sigma_data)
    timestep = torch.full((len(noise),), c_noise, dtype=torch.float64)
    noisy = data + sigma * noise
    x = view.noised(noise, data, timestep)
    torch.testing.assert_close(x, c_in * noisy, rtol=1e-12, atol=1e-12)
    denoised = c_skip * noisy + c_out * output
    torch.testing.assert_close(view.predicted_data(x, timestep, output), denoised, rtol=1e-12, atol=1e-12)
    # RECIPES E2: v = D - (x̃ - D) / σ at z = x̃ / (1 + σ)
    slope = denoised - (noisy - denoised) / sigma
    torch.testing.assert_close(view.velocity(x, timestep, output), slope, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(view.state(x, timestep), noisy / (1 + sigma), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(view.model_input(view.state(x, timestep), timestep), x)
    target = (data - c_skip * noisy) / c_out
    torch.testing.assert_close(view.target(noise, data, timestep), target, rtol=1e-9, atol=1e-9)


def test_an_edms_point_lies_on_the_straight_path():
    view, noise, data = EdmView(), normal(0), normal(1)
    t = view.time(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64))
    torch.testing.assert_close(t[[0, -1]], torch.tensor([1 / 81, 1 / 1.002], dtype=torch.float64))
    x, timestep = view.point(noise, data, t)
    straight = (1 - t).view(-1, 1, 1, 1) * noise + t.view(-1, 1, 1, 1) * data
    torch.testing.assert_close(view.state(x, timestep), straight, rtol=1e-10, atol=1e-10)


def test_an_edms_grid_is_the_stock_schedulers():
    for num_steps in [1, 2, 5, 18, 40]:
        stock = EDMEulerScheduler()
        stock.set_timesteps(num_steps)
        timesteps, times = EdmView().grid(num_steps)
        torch.testing.assert_close(timesteps, stock.timesteps, rtol=0, atol=1e-6)
        torch.testing.assert_close(1 / times.float() - 1, stock.sigmas, rtol=1e-5, atol=1e-6)


def test_an_edms_shares_are_dmds_bins():
    """1000 levels from σ = 0.002 to 80, evenly spaced in σ^(1/7)."""
    ends = torch.tensor([0.002, 80.0], dtype=torch.float64) ** (1 / 7)
    bins = torch.lerp(ends[0], ends[1], torch.arange(1000, dtype=torch.float64) / 999) ** 7
    share = torch.tensor([0.0, 0.02, 0.0209, 0.5, 0.9999], dtype=torch.float64)
    found = (4 * EdmView().timestep(share)).exp()
    torch.testing.assert_close(found, bins[[0, 20, 20, 500, 999]])
    assert EdmView().timestep(share.float()).dtype == torch.float32


def test_one_step_of_an_edm_is_its_denoisers():
    view, noise, output = EdmView(), normal(0), normal(1)
    c_skip, c_out, c_in, _ = preconditioning(80.0)
    torch.testing.assert_close(view.one_step(noise, output), c_skip * noise / c_in + c_out * output)
