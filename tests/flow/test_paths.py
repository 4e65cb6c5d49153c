import torch

from instaflow.flow.paths import interpolate, velocity


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
