import numpy as np
import pytest
import torch
from scipy.special import stdtrit

from instaflow.evaluation.intervals import of_mean
from instaflow.flow.straightness import Bends, Trajectory, euler, straightness
from instaflow.flow.views import VelocityView
from tests.flow.test_schedules import runge_kutta
from tests.flow.test_views import epsilon_view, noise


def curved(x, timestep):
    """A flow whose velocity is 2t everywhere; its network returns the negative at timestep 1000 (1 - t)."""
    t = 1 - timestep.double() / 1000
    return (-2 * t).float().view(-1, 1, 1, 1).expand(x.shape)


def test_a_straight_flow_has_straightness_zero():
    def towards(x, timestep):  # every path ends in 3
        level = (timestep.float() / 1000).view(-1, 1, 1, 1)
        return (x - 3) / level

    for num_steps in (1, 4, 100):
        path = euler(VelocityView(), lambda x, timestep: torch.full_like(x, -1.5), noise(), num_steps)
        assert straightness(path).value == pytest.approx(0, abs=1e-8)
    path = euler(VelocityView(), towards, noise(), 100)
    assert straightness(path).relative < 1e-4
    torch.testing.assert_close(path.states[-1], torch.full_like(noise(), 3), rtol=0, atol=0.05)


def test_a_known_curved_flow():
    """Velocity 2t: the mean is 1, so S is the integral of (2t - 1)^2, 1/3 for each of a latent's 32 values."""
    result = straightness(euler(VelocityView(), curved, noise(), 1000))
    assert result.value == pytest.approx(32 / 3, rel=5e-3)
    assert result.relative == pytest.approx(1 / 3, rel=5e-3)
    t, deviation = np.array(result.profile).T
    np.testing.assert_allclose(deviation, 32 * (2 * t - 1) ** 2, atol=0.15)


def test_straightness_of_states_by_hand():
    """Steps of 1/6 and 1/3 from t = 1/2: velocities 0 and 6, mean 4, so (1/6 * 16 + 1/3 * 4) / (1/2)."""
    times = torch.tensor([1 / 2, 2 / 3, 1.0], dtype=torch.float64)
    velocities = torch.tensor([0.0, 6.0]).view(2, 1, 1, 1, 1)
    states = torch.tensor([5.0, 5.0, 7.0]).view(3, 1, 1, 1, 1)
    result = straightness(Trajectory(states, velocities, times))
    assert result.value == pytest.approx(8.0, rel=1e-6) and result.relative == pytest.approx(0.5, rel=1e-6)
    assert result.profile == [(pytest.approx(7 / 12, abs=1e-4), 16.0), (pytest.approx(5 / 6, abs=1e-4), 4.0)]


def test_the_number_of_paths_does_not_matter():
    def wavy(x, timestep):
        return torch.sin(x + timestep.view(-1, 1, 1, 1) / 300)

    once = straightness(euler(VelocityView(), wavy, noise(4), 50))
    thrice = straightness(euler(VelocityView(), wavy, noise(4).repeat(3, 1, 1, 1), 50))
    assert once.value > 0.1 and once.value == pytest.approx(thrice.value, rel=1e-5)
    assert once.relative == pytest.approx(thrice.relative, rel=1e-5)


def test_a_flow_that_does_not_move():
    result = straightness(euler(VelocityView(), lambda x, timestep: torch.zeros_like(x), noise(), 5))
    assert (result.value, result.relative) == (0.0, 0.0)


@pytest.mark.parametrize("view", [VelocityView(), epsilon_view()], ids=["velocity", "epsilon"])
def test_euler_has_order_one(view):
    """The error falls as 1 / N: by regression, against the classical method of order 4."""

    def slope(z, t):
        return torch.sin(2 * z + 3 * t) + 0.5

    def end_of(num_steps):
        clock = iter(view.grid(num_steps)[1].tolist())

        def predict(x, timestep):
            v = slope(view.state(x, timestep), next(clock))
            if isinstance(view, VelocityView):
                return -v
            alpha, sigma = view.alpha_sigma(timestep)
            return (x - alpha * v) / (alpha + sigma)  # the epsilon whose velocity is v

        return euler(view, predict, noise(8), num_steps).states[-1]

    timesteps, times = view.grid(1)
    begin = view.state(noise(8), timesteps.expand(8)).double()
    exact = runge_kutta(slope, begin, float(times[0]), 1.0, 200)
    steps = np.array([50, 100, 200, 400])
    errors = [float((end_of(int(n)) - exact).abs().mean()) for n in steps]
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order == pytest.approx(1, abs=0.1)


def test_paths_simulated_in_parts_are_as_straight_as_the_whole():
    whole = straightness(euler(VelocityView(), curved, noise(5), 10))
    parts = [Bends.of(euler(VelocityView(), curved, part, 10)) for part in noise(5).split(2)]
    joined = Bends(
        torch.cat([part.deviations for part in parts]), torch.cat([part.lengths for part in parts]), parts[0].times
    )
    found = straightness(joined)
    assert found.value == pytest.approx(whole.value, rel=1e-6) and found.value > 0
    assert found.relative == pytest.approx(whole.relative, rel=1e-6)
    assert np.array(found.profile) == pytest.approx(np.array(whole.profile))


def test_what_paths_add_tells_how_far_chance_carries_their_means():
    """Half the width of the interval of 400 draws of 32 paths is what each draw's own paths say, within a sixth."""

    def wavy(x, timestep):
        return 3 * torch.sin(x * (1 + timestep.view(-1, 1, 1, 1) / 300))

    def drawn(seed: int):
        start = torch.randn(32, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
        return straightness(euler(VelocityView(), wavy, start, 8))

    draws = [drawn(seed) for seed in range(400)]
    for name in ("value", "relative"):
        means = np.array([getattr(one, name) for one in draws])
        paths = [(one.paths if name == "value" else one.paths_relative).numpy() for one in draws]
        assert [float(own.mean()) for own in paths] == pytest.approx(means.tolist(), rel=1e-5)
        told = np.mean([of_mean(own) for own in paths])
        assert told == pytest.approx(stdtrit(31, 0.975) * means.std(ddof=1), rel=1 / 6)


def test_of_paths_that_are_all_alike_chance_is_nothing():
    result = straightness(euler(VelocityView(), curved, noise(), 10))
    assert of_mean(result.paths.numpy()) == pytest.approx(0, abs=1e-5)
    still = straightness(euler(VelocityView(), lambda x, timestep: torch.zeros_like(x), noise(), 5))
    assert still.paths_relative.tolist() == [0.0] * len(noise())
