"""Time densities against their formulas: quantiles, histograms, values at the ends and in the middle."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from instaflow.flow.densities import DENSITIES
from instaflow.stages import ReflowStage


def density(name, t):
    """p(t), written out."""
    if name == "uniform":
        return np.ones_like(t)
    if name == "u-shaped":
        return 4 * (np.exp(4 * t) + np.exp(4 * (1 - t))) / (2 * (math.e**4 - 1))
    return norm.pdf(np.log(t / (1 - t))) / (t * (1 - t))


def times(name, u):
    return DENSITIES[name](torch.as_tensor(u)).numpy()


MIDDLES = (np.arange(100_000) + 0.5) / 100_000


@pytest.mark.parametrize("name", DENSITIES)
def test_the_histogram_is_the_density(name):
    """Of evenly spread uniform numbers, the share in a bin is the density's integral over it."""
    shares, edges = np.histogram(times(name, MIDDLES), bins=20, range=(0, 1))
    for share, low, high in zip(shares / len(MIDDLES), edges, edges[1:], strict=False):
        inside = np.linspace(low, high, 2001)
        inside = (inside[1:] + inside[:-1]) / 2
        assert share == pytest.approx(density(name, inside).mean() * (high - low), abs=2e-5)


@pytest.mark.parametrize("name", DENSITIES)
def test_every_density_rises_over_the_whole_range_and_is_symmetric(name):
    found = times(name, MIDDLES)
    assert (np.diff(found) > 0).all() and 0 < found[0] < found[-1] < 1
    np.testing.assert_allclose(found + found[::-1], 1, atol=1e-12)  # so no end can be taken for the other
    ends = times(name, np.array([0.0, 1 - 2**-53])).astype(np.float32)
    assert np.isfinite(ends).all() and 0 <= ends[0] < ends[1] <= 1


def test_the_u_is_as_deep_as_the_paper_s():
    """The slope of the quantiles is one over the density: 2.07 at the ends, 0.55 in the middle."""
    u = np.array([0, 1e-6, 0.5 - 1e-6, 0.5 + 1e-6, 1 - 1e-6, 1])
    slopes = np.diff(times("u-shaped", u))[::2] / np.diff(u)[::2]
    np.testing.assert_allclose(1 / slopes, [2.0746, 0.5514, 2.0746], rtol=1e-4)


def test_its_quantiles_are_those_of_the_closed_form():
    t = times("u-shaped", MIDDLES)
    distribution = (np.exp(4 * t) - np.exp(4 * (1 - t)) + math.e**4 - 1) / (2 * (math.e**4 - 1))
    np.testing.assert_allclose(distribution, MIDDLES, atol=1e-12)
    np.testing.assert_allclose(norm.cdf(np.log(1 / (1 / times("logit-normal", MIDDLES) - 1))), MIDDLES, atol=1e-9)


def test_the_settings_know_the_same_densities():
    (known,) = (field.annotation for key, field in ReflowStage.model_fields.items() if key == "time_density")
    assert set(known.__args__) == set(DENSITIES)
