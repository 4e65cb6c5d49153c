from statistics import NormalDist

import numpy as np
import pytest

from instaflow.evaluation import sketch


def test_the_drawn_flow_carries_the_noise_onto_the_data():
    """A flow of one dimension keeps the order, so that noise at a quantile ends at the same quantile of the data."""
    ends = sketch.flow_paths()[-1]
    low, high = (NormalDist(mode, sketch.SPREAD) for mode in sketch.MODES)
    reached = [(low.cdf(x) + high.cdf(x)) / 2 for x in ends]
    assert reached == pytest.approx([NormalDist().cdf(x) for x in sketch.NOISES], abs=0.03)


def test_the_velocity_is_the_mean_direction_of_the_lines_through_a_point():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(2_000_000)
    data = rng.choice(sketch.MODES, noise.size) + sketch.SPREAD * rng.standard_normal(noise.size)
    for t, x in ((0.3, 0.4), (0.7, -0.6)):
        near = np.abs((1 - t) * noise + t * data - x) < 0.01
        assert sketch.velocity(np.array([x]), t)[0] == pytest.approx((data - noise)[near].mean(), abs=0.05)


def test_one_step_of_the_curved_flow_ends_between_the_two_kinds_of_data():
    landing = sketch.NOISES + sketch.velocity(sketch.NOISES, 0.0)
    assert np.abs(landing).max() < 1e-9
