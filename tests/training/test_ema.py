import pytest
import torch
from torch import nn

from instaflow.training.ema import Ema


class Weights(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, generator=torch.Generator().manual_seed(0)).to(dtype))
        self.register_buffer("mean", torch.zeros(3, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False]))


def step(module, seed):
    with torch.no_grad():
        module.weight.copy_(torch.randn(7, generator=torch.Generator().manual_seed(seed)))
        module.mean.fill_(seed)
        module.count.fill_(2**30 + seed)  # beyond float32's whole numbers
        module.mask.logical_not_()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_average_is_the_closed_form_sum(decay):
    """After N updates: sum over k of (1 - d_k) times the product of later d's times theta_k."""
    module = Weights()
    ema = Ema(module, decay)
    thetas, means, decays = [module.weight.detach().double().clone()], [0.0], [0.0]
    for n in range(30):
        step(module, n + 1)
        ema.update(module)
        thetas.append(module.weight.detach().double().clone())
        means.append(n + 1.0)
        decays.append(min(decay, (1 + n) / (10 + n)))
    shares = [(1 - d) * torch.tensor(decays[k + 1 :], dtype=torch.float64).prod() for k, d in enumerate(decays)]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * theta for share, theta in zip(shares, thetas, strict=True))
    torch.testing.assert_close(ema.weights["weight"].double(), expected, rtol=1e-5, atol=1e-6)
    mean = sum(float(share) * value for share, value in zip(shares, means, strict=True))
    torch.testing.assert_close(ema.weights["mean"], torch.full((3,), mean), rtol=1e-5, atol=1e-6)


def test_the_first_weights_are_soon_forgotten():
    module = Weights()
    start = module.weight.detach().clone()
    ema = Ema(module, 0.9999)
    step(module, 1)
    ema.update(module)
    torch.testing.assert_close(ema.weights["weight"], 0.1 * start + 0.9 * module.weight.detach())


def test_whole_numbers_are_taken_as_they_are():
    module = Weights()
    ema = Ema(module, 0.9)
    for seed in (1, 2, 3):
        step(module, seed)
        ema.update(module)
    assert ema.weights["count"].dtype == torch.int64 and int(ema.weights["count"]) == 2**30 + 3
    assert ema.weights["mask"].dtype == torch.bool and torch.equal(ema.weights["mask"], module.mask)
    module.load_state_dict(ema.weights)


def test_an_average_of_bfloat16_weights_is_float32_and_moves():
    module = Weights(torch.bfloat16)
    with torch.no_grad():
        module.weight.fill_(1.0)
    ema = Ema(module, 0.9999)
    ema.updates = 10**6
    with torch.no_grad():
        module.weight.fill_(2.0)
    for _ in range(100):
        ema.update(module)
    assert ema.weights["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.weights["weight"], torch.full((7,), 2 - 0.9999**100), rtol=0, atol=1e-5)


def test_the_average_is_a_copy():
    module = Weights()
    ema = Ema(module, 0.5)
    before = {name: value.clone() for name, value in ema.weights.items()}
    step(module, 1)
    assert all(torch.equal(before[name], value) for name, value in ema.weights.items())


def test_an_average_goes_on_where_it_was_left():
    module, other = Weights(), Weights()
    whole, first = Ema(module, 0.9), Ema(module, 0.9)
    for seed in range(1, 6):
        step(module, seed)
        whole.update(module)
        if seed <= 3:
            first.update(module)
    rest = Ema(other, 0.9)
    rest.load(first.weights, first.updates)
    for seed in (4, 5):
        step(other, seed)
        rest.update(other)
    assert torch.equal(rest.weights["weight"], whole.weights["weight"]) and rest.updates == whole.updates
