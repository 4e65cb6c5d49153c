import numpy as np
import pytest

from instaflow.couplings.moments import Moments, moments_of


@pytest.mark.parametrize("draws", [1, 2, 32, 96, 4096, 10**6])
def test_moments_let_every_normal_sample_pass_and_find_what_is_none(draws):
    values = np.random.default_rng(draws).standard_normal((min(2000, 10**7 // draws), draws))
    assert not any(moments_of(sample).fault() for sample in values[:, :, None, None])
    if draws >= 4096:
        off = 12 / draws**0.5
        for wrong in (values[0] + off, values[0] - off, values[0] * (1 + off), values[0] * (1 - off)):
            assert moments_of(wrong[:, None, None, None]).fault()


def test_moments_are_sums_however_they_are_cut():
    noise = np.random.default_rng(0).standard_normal((200, 2, 3, 4)).astype(np.float16)
    whole = moments_of(noise)
    values = noise.astype(np.float64)
    np.testing.assert_allclose([whole.total, whole.squares], [values.sum(), (values**2).sum()])
    parts = moments_of(noise[:70]) + moments_of(noise[70:]) + Moments()
    np.testing.assert_allclose([parts.count, parts.total, parts.squares], [values.size, whole.total, whole.squares])
    assert Moments().fault() is None


def test_a_fault_tells_the_moments():
    fault = Moments(10_000, 5_000.0, 40_000.0).fault()
    assert fault == "of mean 0.5000 and mean square 4.0000, which is not N(0, 1) (z 50.0, 212.1)"
