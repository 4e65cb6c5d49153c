import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from instaflow.errors import InstaFlowError
from instaflow.evaluation import frechet, intervals
from instaflow.evaluation.frechet import Gaussian, frechet_distance, influence


def random_gaussian(rng: np.random.Generator, size: int) -> Gaussian:
    half = rng.standard_normal((size, size))
    return Gaussian(rng.standard_normal(size), half @ half.T)


def test_equal_covariances_leave_the_squared_distance_of_the_means():
    a = random_gaussian(np.random.default_rng(0), 7)
    shift = np.arange(7.0)
    assert frechet_distance(a, Gaussian(a.mean + shift, a.covariance)) == pytest.approx(shift @ shift, rel=1e-9)


def test_commuting_covariances_leave_the_squared_difference_of_their_roots():
    mean, rotation = np.zeros(4), np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0]
    first, second = np.array([9.0, 4.0, 1.0, 0.0]), np.array([1.0, 4.0, 16.0, 25.0])
    a, b = (Gaussian(mean, (rotation * variances) @ rotation.T) for variances in (first, second))
    assert frechet_distance(a, b) == pytest.approx((3 - 1) ** 2 + 0 + (1 - 4) ** 2 + 5**2, rel=1e-9)


def test_agrees_with_the_matrix_root_of_the_product():
    rng = np.random.default_rng(2)
    a, b = random_gaussian(rng, 12), random_gaussian(rng, 12)
    trace = np.trace(a.covariance + b.covariance - 2 * np.real(scipy.linalg.sqrtm(a.covariance @ b.covariance)))
    assert frechet_distance(a, b) == pytest.approx(np.sum((a.mean - b.mean) ** 2) + trace, rel=1e-8)


@pytest.mark.parametrize("count", [50, 400])  # fewer samples than the 64 features, and more
def test_agrees_with_torch_fidelity_on_the_same_features(count):
    rng = np.random.default_rng(6)
    mixing = rng.standard_normal((64, 64)) / 8
    a, b = rng.standard_normal((count, 64)) @ mixing, np.abs(rng.standard_normal((count + 7, 64)))
    theirs = [fid_features_to_statistics(torch.from_numpy(side)) for side in (a, b)]
    expected = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_features_give_the_gaussian_of_their_mean_and_unbiased_covariance():
    features = np.random.default_rng(3).standard_normal((50, 5))
    gaussian = Gaussian.of(features)
    assert np.allclose(gaussian.covariance, np.cov(features, rowvar=False), atol=1e-12)
    other = features[::-1] * 2 + 1
    assert frechet_distance(features, other) == frechet_distance(gaussian, Gaussian.of(other))


@pytest.mark.parametrize("count", [3, 40, 500])  # 3 samples of 16 features: far from full rank
def test_zero_on_itself_symmetric_and_invariant_under_rotation(count):
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((count, 16)), rng.standard_normal((count, 16)) * np.linspace(0, 2, 16) + 0.3
    a[:, 3] = b[:, 3] = 0.0  # constant, as the border pixels of digits are
    rotation = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    distance = frechet_distance(a, b)
    assert distance > 0.1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(distance, rel=1e-9)


def test_rounding_makes_no_distance_negative():
    """Without the bound, four of these six come out below 0."""
    for seed in range(6):
        features = np.random.default_rng(seed).standard_normal((40, 16))
        assert frechet_distance(features, features) >= 0


def test_float32_features_are_compared_in_float64():
    features = np.random.default_rng(5).standard_normal((200, 6)).astype(np.float32) + np.float32(1000)
    assert frechet_distance(features, features + np.float32(0.5)) == pytest.approx(6 * 0.25, rel=1e-3)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (np.zeros((1, 4)), "at least 2 samples"),
        (np.zeros((9, 3)), "3 and 4 features"),
        (np.zeros(9), r"\[N, D\]"),
        (np.array([[0.0, 1, 2, 3], [0, np.nan, 0, 0], [1, 2, np.inf, 3]]), "2 of 3 samples"),
    ],
)
def test_what_cannot_be_compared_is_refused(broken, message):
    with pytest.raises(InstaFlowError, match=message):
        frechet_distance(broken, np.eye(4))


def drawn(rng: np.random.Generator, count: int, scale: float = 1.0) -> np.ndarray:
    """Samples [count, 6] with heavier tails than a Gaussian's."""
    values = rng.standard_normal((count, 6)) * np.sqrt(rng.chisquare(8, (count, 1)) / 8)
    return values @ (scale * np.linspace(0.2, 1.5, 36).reshape(6, 6) + np.eye(6)) + 0.3 * scale


def weighted(features: np.ndarray, weights: np.ndarray) -> Gaussian:
    mean = weights @ features
    return Gaussian(mean, (features - mean).T @ ((features - mean) * weights[:, None]))


@pytest.mark.parametrize("count", [4, 50])  # fewer than the features, and more
def test_the_influence_of_a_sample_is_what_its_weight_changes(count):
    rng = np.random.default_rng(8)
    features, other = drawn(rng, count), Gaussian.of(drawn(rng, 400, 1.4))
    even, little = np.full(count, 1 / count), 1e-6
    own = weighted(features, even)
    found = influence(features, own, other)
    for place in range(count):
        more = (1 - little) * even + little * np.eye(count)[place]
        changed = (frechet_distance(weighted(features, more), other) - frechet_distance(own, other)) / little
        assert found[place] - found.mean() == pytest.approx(changed, rel=1e-3, abs=1e-3)


def test_influences_are_the_same_block_by_block(monkeypatch):
    features = drawn(np.random.default_rng(8), 50)
    sides = Gaussian.of(features), Gaussian.of(drawn(np.random.default_rng(9), 90))
    whole = influence(features, *sides)
    monkeypatch.setattr(frechet, "BLOCK", 7)
    assert whole.shape == (50,) and influence(features, *sides) == pytest.approx(whole, rel=1e-9)


def test_intervals_of_influences_are_those_of_many_draws():
    rng = np.random.default_rng(9)
    teacher, found, halves = Gaussian.of(drawn(rng, 4000, 1.4)), [], []
    for _ in range(200):
        features = drawn(rng, 500)
        own = Gaussian.of(features)
        found.append(frechet_distance(own, teacher))
        halves.append(intervals.of_mean(influence(features, own, teacher)))
    assert np.mean(halves) == pytest.approx(1.96 * np.std(found), rel=0.15)
    inside = np.abs(np.array(found) - np.mean(found)) <= halves
    assert 0.91 <= inside.mean() <= 0.99


def test_two_sides_of_the_same_noise_vary_together():
    """Both are drawn anew, from noise that they share: their influences add up before they are averaged."""
    rng = np.random.default_rng(10)
    found, halves = [], []
    for _ in range(200):
        noise = rng.standard_normal((500, 6))
        sides = noise @ np.diag(np.linspace(1, 2, 6)), 1.1 * noise + 0.1 * rng.standard_normal((500, 6)) + 0.5
        one, another = (Gaussian.of(side) for side in sides)
        found.append(frechet_distance(one, another))
        both = influence(sides[0], one, another) + influence(sides[1], another, one)
        halves.append(intervals.of_mean(both))
    assert np.mean(halves) == pytest.approx(1.96 * np.std(found), rel=0.15)
