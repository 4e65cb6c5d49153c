import numpy as np
import pytest
from scipy.stats import binomtest

from instaflow.evaluation.intervals import of_mean, of_share


def test_the_interval_of_a_mean_covers_what_it_is_the_mean_of():
    rng = np.random.default_rng(0)
    draws = rng.exponential(size=(2000, 100))
    covered = [abs(draw.mean() - 1) <= (of_mean(draw) or 0) for draw in draws]
    assert 0.92 < np.mean(covered) < 0.96
    assert of_mean(np.ones(1)) is None and of_mean(np.ones(2)) == 0


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_few_values_leave_more_to_chance(count):
    draws = np.random.default_rng(1).standard_normal((4000, count))
    assert np.mean([abs(draw.mean()) <= (of_mean(draw) or 0) for draw in draws]) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(("right", "count"), [(200, 200), (0, 7), (150, 200), (1, 1)])
def test_the_interval_of_a_share_is_wilson_s(right, count):
    wilson = binomtest(right, count).proportion_ci(method="wilson")
    assert of_share(right / count, count) == pytest.approx((wilson.high - wilson.low) / 2, rel=1e-3)
