import torch

from instaflow.toy.nets import Couplings, Nets, couple, distill_error, one_hot, parts, train


def test_networks_side_by_side_compute_what_each_does_alone() -> None:
    nets = Nets.fresh([0, 1], width=8, dimension=3)
    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(2, 5, 3, generator=generator), one_hot(torch.zeros(2, 5, dtype=torch.long))
    together = nets.one_step(noise, labels)
    for i in range(2):
        alone = Nets.fresh([i], width=8, dimension=3).one_step(noise[i : i + 1], labels[i : i + 1])
        assert torch.allclose(together[i], alone[0], atol=1e-6)
    assert not torch.allclose(together[0] - noise[0], together[1] - noise[1], atol=1e-3)


def test_each_network_learns_its_own_couplings_at_its_own_rate() -> None:
    start = Nets.fresh([0, 1, 2], width=16, dimension=2)
    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(256, 2, generator=generator), one_hot(torch.zeros(256, dtype=torch.long))
    tables = [torch.cat([noise, data, labels], 1)[:count] for data, count in ((noise + 2, 256), (-noise, 64))]
    rates = torch.tensor([1e-2, 1e-2, 0.0])
    nets = train(distill_error, start, Couplings([*tables, tables[0]]), rates, samples=2**15, seed=0)
    ends = nets.one_step(noise.expand(3, -1, -1), labels.expand(3, -1, -1))
    assert (ends[0] - (noise + 2)).square().mean() < 0.02
    assert (ends[1] + noise).square().mean() < 0.05
    assert torch.equal(nets.flat[2], start.flat[2])


def test_coupling_again_keeps_noise_and_labels() -> None:
    nets = Nets.fresh([0, 1], width=8, dimension=2)
    tables = [torch.cat([torch.randn(count, 4), one_hot(torch.arange(count) % 4)], 1) for count in (7, 3)]
    again = couple(nets, tables, num_steps=4)
    for old, new in zip(map(parts, tables), map(parts, again), strict=True):
        assert torch.equal(old[0], new[0]) and torch.equal(old[2], new[2])
    alone = couple(Nets(nets.flat[1:], 8, 2), tables[1:], num_steps=4)
    assert torch.allclose(again[1], alone[0], atol=1e-6)
