"""The map between a diffusion and a flow, against a Gaussian mixture whose conditional expectations are known."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from instaflow.flow.schedules import (
    data_to_velocity,
    epsilon_to_data,
    epsilon_to_velocity,
    flow_state,
    flow_time,
    v_prediction_to_data,
    v_prediction_to_velocity,
    velocity_to_data,
)

MEANS = torch.tensor([[-2.0, 0.5], [1.0, 1.5], [0.5, -1.0]], dtype=torch.float64)  # [K, D]
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
WIDTH = 0.3  # the standard deviation of each part


def expected_data(x, alpha, sigma):
    """E[data | alpha data + sigma noise = x] of the mixture. x: [B, D]; alpha, sigma: numbers."""
    variance = alpha**2 * WIDTH**2 + sigma**2
    distances = (x[:, None] - alpha * MEANS).square().sum(-1)  # [B, K]
    shares = torch.softmax(WEIGHTS.log() - distances / (2 * variance), 1)
    each = MEANS + alpha * WIDTH**2 / variance * (x[:, None] - alpha * MEANS)  # [B, K, D]
    return (shares[..., None] * each).sum(1)


def states(count=64):
    return 2 * torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("alpha_bar", [0.00466, 0.05, 0.5, 0.9, 0.9991])
def test_the_forms_of_the_velocity_agree(alpha_bar):
    alpha, sigma = torch.tensor([alpha_bar, 1 - alpha_bar], dtype=torch.float64).sqrt()
    x = states()
    data = expected_data(x, alpha, sigma)
    epsilon = (x - alpha * data) / sigma
    prediction = alpha * epsilon - sigma * data
    z, t = flow_state(x, alpha, sigma), flow_time(alpha, sigma)
    v = epsilon_to_velocity(x, epsilon, alpha, sigma)
    forms = [data - epsilon, (z - epsilon) / t, (data - z) / (1 - t)]
    forms += [v_prediction_to_velocity(x, prediction, alpha, sigma), data_to_velocity(x, data, alpha, sigma)]
    # The flow itself: the same mixture seen as t data + (1 - t) noise has the same conditional expectations.
    seen = expected_data(z, t, 1 - t)
    forms.append(seen - (z - t * seen) / (1 - t))
    for form in forms:
        torch.testing.assert_close(v, form, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(velocity_to_data(x, v, alpha, sigma), data, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(epsilon_to_data(x, epsilon, alpha, sigma), data, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(v_prediction_to_data(x, prediction, alpha, sigma), data, rtol=1e-10, atol=1e-10)


def runge_kutta(slope, start, begin, end, steps):
    """The classical method of order 4."""
    y, h = start, (end - begin) / steps
    for i in range(steps):
        s = begin + i * h
        k1 = slope(y, s)
        k2 = slope(y + h / 2 * k1, s + h / 2)
        k3 = slope(y + h / 2 * k2, s + h / 2)
        k4 = slope(y + h * k3, s + h)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


def test_the_diffusions_ode_and_the_flows_ode_end_in_the_same_point():
    """The probability-flow ODE over the angle p, alpha = sin p, sigma = cos p: dx/dp = sigma data - alpha epsilon."""
    first, last = math.asin(math.sqrt(0.00466)), math.asin(math.sqrt(0.9991))

    def diffusion(x, angle):
        alpha, sigma = math.sin(angle), math.cos(angle)
        data = expected_data(x, alpha, sigma)
        return sigma * data - alpha * (x - alpha * data) / sigma

    def flow(z, t):
        alpha, sigma = t / math.hypot(t, 1 - t), (1 - t) / math.hypot(t, 1 - t)
        x = z * (alpha + sigma)
        epsilon = (x - alpha * expected_data(x, alpha, sigma)) / sigma
        return epsilon_to_velocity(x, epsilon, alpha, sigma)

    (a0, s0), (a1, s1) = ((math.sin(angle), math.cos(angle)) for angle in (first, last))
    noise = states(16)
    by_diffusion = runge_kutta(diffusion, noise, first, last, 600)
    by_flow = runge_kutta(flow, flow_state(noise, a0, s0), flow_time(a0, s0), flow_time(a1, s1), 600)
    torch.testing.assert_close(flow_state(by_diffusion, a1, s1), by_flow, rtol=1e-7, atol=1e-7)
    assert (by_flow - flow_state(noise, a0, s0)).abs().mean() > 0.5  # and it is a long way


def test_stable_diffusions_schedule_on_the_flows_clock():
    schedule = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    alpha_bar = schedule.alphas_cumprod.double()
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    times = flow_time(alpha, sigma)
    assert float(alpha_bar[999]) == pytest.approx(0.004660, abs=1e-6)
    assert float((alpha + sigma)[999]) == pytest.approx(1.06593, abs=1e-5)
    assert float(times[999]) == pytest.approx(0.0640, abs=5e-5)
    assert float(times[0]) == pytest.approx(0.97166, abs=5e-6)
    levels = 1 - times.numpy()  # rising with the timestep
    nearest = {level: int(np.abs(levels - level).argmin()) for level in (0.25, 0.5, 0.75, 0.9, 0.93)}
    assert nearest == {0.25: 95, 0.5: 354, 0.75: 673, 0.9: 914, 0.93: 983}
    assert int((alpha + sigma).argmax()) == 354
