import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from instaflow.errors import InstaFlowError
from instaflow.evaluation.kernel_distance import SEED, kernel_distance


def features(count, shift=0.0, seed=0):
    return (np.random.default_rng(seed).standard_normal((count, 16)) + shift).astype(np.float32)


def by_hand(x, y):
    """The unbiased estimate, pair by pair."""
    k = [[(a @ b / x.shape[1] + 1) ** 3 for b in [*x, *y]] for a in np.array([*x, *y], dtype=np.float64)]
    k, n = np.array(k), len(x)
    within = sum((part.sum() - np.trace(part)) / (n * (n - 1)) for part in (k[:n, :n], k[n:, n:]))
    return within - 2 * k[:n, n:].mean()


def test_a_subset_of_all_samples_is_the_unbiased_estimate():
    x, y = features(40), features(40, 0.5, seed=1)
    found = kernel_distance(x, y, subsets=3, subset_size=40)
    assert found.mean == pytest.approx(by_hand(x, y), rel=1e-10)
    assert found.std == pytest.approx(0, abs=1e-12)


def test_mean_and_deviation_are_torch_fidelity_s_on_the_same_features():
    x, y = features(300), features(350, 0.1, seed=1)
    expected = kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subsets=20, kid_subset_size=100, rng_seed=SEED, verbose=False
    )
    found = kernel_distance(x, y, subsets=20, subset_size=100)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3)
    assert found == kernel_distance(x, y, subsets=20, subset_size=100)
    assert found.mean != kernel_distance(x, y, subsets=20, subset_size=100, seed=1).mean
    assert str(found) == "20 subsets of 100, seed 2020"


def test_two_sets_of_one_distribution_are_zero_apart_on_average():
    found = kernel_distance(features(4000), features(4000, seed=1), subsets=50, subset_size=200)
    assert abs(found.mean) < 4 * found.std / 50**0.5
    assert kernel_distance(features(4000), features(4000, 0.3, seed=1), subsets=50).mean > 10 * found.std


def test_too_few_samples_are_refused():
    with pytest.raises(InstaFlowError, match="subsets of 1,000 needs as many samples on each side, not 999"):
        kernel_distance(features(1200), features(999))
