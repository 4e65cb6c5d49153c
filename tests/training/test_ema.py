import pytest
import torch

from instaflow.training.ema import Ema


def tensors(dtype=torch.float32):
    """A weight, and buffers: a mean, a count, a mask."""
    weight = torch.randn(7, generator=torch.Generator().manual_seed(0)).to(dtype)
    return [weight, torch.zeros(3, dtype=dtype), torch.zeros((), dtype=torch.int64), torch.tensor([True, False])]


def step(present, seed):
    weight, mean, count, mask = present
    weight.copy_(torch.randn(7, generator=torch.Generator().manual_seed(seed)))
    mean.fill_(seed)
    count.fill_(2**30 + seed)  # beyond float32's whole numbers
    mask.logical_not_()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_average_is_the_closed_form_sum(decay):
    """After N updates: sum over k of (1 - d_k) times the product of later d's times theta_k."""
    present = tensors()
    ema = Ema(present, decay)
    thetas, means, decays = [present[0].double()], [0.0], [0.0]
    for n in range(30):
        step(present, n + 1)
        ema.update(present)
        thetas.append(present[0].double())
        means.append(n + 1.0)
        decays.append(min(decay, (1 + n) / (10 + n)))
    shares = [(1 - d) * torch.tensor(decays[k + 1 :], dtype=torch.float64).prod() for k, d in enumerate(decays)]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * theta for share, theta in zip(shares, thetas, strict=True))
    torch.testing.assert_close(ema.averages[0].double(), expected, rtol=1e-5, atol=1e-6)
    mean = sum(float(share) * value for share, value in zip(shares, means, strict=True))
    torch.testing.assert_close(ema.averages[1], torch.full((3,), mean), rtol=1e-5, atol=1e-6)


def test_the_first_weights_are_soon_forgotten():
    present = tensors()
    start = present[0].clone()
    ema = Ema(present, 0.9999)
    step(present, 1)
    ema.update(present)
    torch.testing.assert_close(ema.averages[0], 0.1 * start + 0.9 * present[0])


def test_whole_numbers_are_taken_as_they_are():
    present = tensors()
    ema = Ema(present, 0.9)
    for seed in (1, 2, 3):
        step(present, seed)
        ema.update(present)
    _, _, count, mask = ema.averages
    assert count.dtype == torch.int64 and int(count) == 2**30 + 3
    assert mask.dtype == torch.bool and torch.equal(mask, present[3])


def test_an_average_of_bfloat16_weights_is_float32_and_moves():
    weight = torch.ones(7, dtype=torch.bfloat16)
    ema = Ema([weight], 0.9999)
    ema.updates = 10**6
    weight.fill_(2.0)
    for _ in range(100):
        ema.update([weight])
    assert ema.averages[0].dtype == torch.float32
    torch.testing.assert_close(ema.averages[0], torch.full((7,), 2 - 0.9999**100), rtol=0, atol=1e-5)


def test_the_average_is_a_copy():
    present = tensors()
    ema = Ema(present, 0.5)
    before = [value.clone() for value in ema.averages]
    step(present, 1)
    assert all(torch.equal(one, two) for one, two in zip(before, ema.averages, strict=True))
