from itertools import pairwise

import torch

from instaflow.flow.paths import interpolate, slerp, velocity


def pair(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(5, 2, 3, 3, generator=generator, dtype=dtype) for _ in range(2))


def test_a_path_leads_from_noise_to_data():
    noise, data = pair()
    zero, one = torch.zeros(5), torch.ones(5)
    assert torch.equal(interpolate(noise, data, zero), noise)
    assert torch.equal(interpolate(noise, data, one), data)


def test_velocity_is_the_derivative_of_the_path():
    noise, data = pair()
    t, h = torch.linspace(0.1, 0.9, 5, dtype=torch.float64), 1e-3
    difference = (interpolate(noise, data, t + h) - interpolate(noise, data, t - h)) / (2 * h)
    torch.testing.assert_close(velocity(noise, data), difference, rtol=0, atol=1e-12)


def test_each_sample_has_its_own_time():
    noise, data = pair()
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    for index in range(5):
        alone = interpolate(noise[index : index + 1], data[index : index + 1], t[index : index + 1])
        assert torch.equal(interpolate(noise, data, t)[index], alone[0])


def test_slerp_keeps_the_norm_and_the_pace():
    noise, other = (one[0] for one in pair())
    noise, other = noise / noise.norm(), other / other.norm()
    way = [slerp(noise, other, step / 4) for step in range(5)]
    torch.testing.assert_close(way[0], noise)
    torch.testing.assert_close(way[4], other)
    for point in way:
        torch.testing.assert_close(point.norm(), torch.ones((), dtype=torch.float64))
    angles = torch.stack([(first * last).sum().acos() for first, last in pairwise(way)])
    torch.testing.assert_close(angles, angles[:1].expand(4))
    torch.testing.assert_close(slerp(noise, noise, 0.3), noise)  # no circle, and no division by 0
    assert torch.isfinite(slerp(noise, -noise, 0.3)).all()
