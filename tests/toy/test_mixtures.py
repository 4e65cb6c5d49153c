import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from instaflow.toy.mixtures import Mixture, apart, energy_distance, even_noise, labelled, remote, unbalanced


@pytest.mark.parametrize("mixture", [remote(), unbalanced()], ids=["remote", "unbalanced"])
def test_expected_data_give_the_gradient_of_the_log_density(mixture: Mixture) -> None:
    means, weights = mixture.means.double(), mixture.weights.double()
    exact = Mixture(means, mixture.std, weights, mixture.labels)
    generator = torch.Generator().manual_seed(0)
    for level in (0.98, 0.5, 0.02):
        t = 1 - level
        z = t * exact.sample(torch.randn(64, 2, generator=generator, dtype=torch.float64))
        z = (z + level * torch.randn(64, 2, generator=generator, dtype=torch.float64)).requires_grad_()
        deviation = torch.full_like(means, ((t * mixture.std) ** 2 + level**2) ** 0.5)
        density = MixtureSameFamily(Categorical(weights), Independent(Normal(t * means, deviation), 1))
        (score,) = torch.autograd.grad(density.log_prob(z).sum(), z)
        assert torch.allclose((t * exact.expected_data(z, t, None) - z) / level**2, score, rtol=1e-9, atol=1e-9)


def test_each_point_may_have_its_own_time() -> None:
    mixture, z = remote(), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    times = [0.1, 0.5, 0.9]
    together = mixture.expected_data(z, torch.tensor(times)[:, None], None)
    alone = [mixture.expected_data(z[i : i + 1], t, None) for i, t in enumerate(times)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_a_mode_holds_the_samples_that_it_reaches_and_is_nearest_to() -> None:
    mixture = remote()
    data = mixture.sample(even_noise(2000, 2, seed=0))
    assert mixture.shares(data).tolist() == pytest.approx([0.2] * 5, abs=0.005)
    far = mixture.means[4]
    points = torch.stack([far, far + mixture.reach * 0.99 * torch.tensor([1.0, 0.0]), far + mixture.reach * 1.01, far])
    assert mixture.shares(points).tolist() == [0, 0, 0, 0, 0.75]
    assert mixture.off_modes(points, torch.zeros(4, dtype=torch.long)) == 0.25


def test_expected_data_are_those_of_a_single_gaussian() -> None:
    """z = t data + (1 - t) noise: E[data | z] = μ + t s² / (t² s² + (1 - t)²) (z - t μ)."""
    mean, std, t = torch.tensor([[0.5, -1.0]]), 0.3, 0.7
    mixture = Mixture(mean, std, torch.ones(1), torch.zeros(1, dtype=torch.long))
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    expected = mean + t * std**2 / ((t * std) ** 2 + (1 - t) ** 2) * (z - t * mean)
    assert torch.allclose(mixture.expected_data(z, t, None), expected, atol=1e-5)


def test_guidance_leads_away_from_other_labels() -> None:
    mixture = labelled()
    z, labels = torch.zeros(4, 2), torch.arange(4)
    x, timestep = z[:, :, None, None], torch.full((4,), 500)
    one, three, none = (mixture.output(x, timestep, labels, scale).flatten(1) for scale in (1.0, 3.0, 0.0))
    assert torch.allclose(three, none + 3 * (one - none), atol=1e-4)
    assert torch.allclose(none, ((z - mixture.expected_data(z, 0.5, None)) / 0.5), atol=1e-5)


def test_the_energy_distance_of_two_places_is_that_between_them() -> None:
    points, elsewhere = torch.zeros(1, 3, 2), torch.tensor([3.0, 4.0]).expand(1, 5, 2)
    assert energy_distance(points, elsewhere, apart(elsewhere)) == pytest.approx(10**0.5)
    assert energy_distance(points, points, apart(points)) == 0
