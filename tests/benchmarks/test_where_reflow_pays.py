"""The map of where reflow pays: its toy data, its networks, and the program on two settings."""

from pathlib import Path

import pytest
import torch

from benchmarks.mixtures import Mixture, apart, energy_distance, even_noise
from benchmarks.reflow_map import METHODS, verdict
from benchmarks.small_nets import Couplings, Nets, couple, distill_error, one_hot, parts, train
from benchmarks.where_reflow_pays import (
    RATES,
    SHAPES,
    best_rates,
    interval,
    mixture_of,
    reference,
    settings,
)
from tests.benchmarks.programs import run


@pytest.mark.parametrize("data", [*SHAPES, "16 in 8"])
def test_the_exact_flow_leads_from_noise_to_the_data(data: str) -> None:
    mixture = mixture_of(data)
    noise, labels = even_noise(1024, mixture.dimension, seed=0), mixture.blocks(1024)
    reached = mixture.flow(noise, labels, guidance_scale=1.0, num_steps=100)
    by_label = [points.unflatten(0, (mixture.num_labels, -1)) for points in (noise, reached)]
    before, after = (energy_distance(points, *reference(data, 1.0, None)) for points in by_label)
    assert after < 0.05 < before
    assert mixture.off_modes(reached, labels) < 0.01
    data_points = mixture.sample(torch.randn(4096, mixture.dimension, generator=torch.Generator().manual_seed(0)))
    assert mixture.off_modes(data_points, mixture.blocks(4096)) < 0.003
    assert data_points.mean(0).abs().max() < 0.03
    assert data_points.square().mean() == pytest.approx(1, abs=0.03)


def test_expected_data_are_those_of_a_single_gaussian() -> None:
    """z = t data + (1 - t) noise: E[data | z] = μ + t s² / (t² s² + (1 - t)²) (z - t μ)."""
    mean, std, t = torch.tensor([[0.5, -1.0]]), 0.3, 0.7
    mixture = Mixture(mean, std, torch.ones(1), torch.zeros(1, dtype=torch.long))
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    expected = mean + t * std**2 / ((t * std) ** 2 + (1 - t) ** 2) * (z - t * mean)
    assert torch.allclose(mixture.expected_data(z, t, None), expected, atol=1e-5)


def test_guidance_leads_away_from_other_labels() -> None:
    mixture = SHAPES["labelled"]()
    z, labels = torch.zeros(4, 2), torch.arange(4)
    x, timestep = z[:, :, None, None], torch.full((4,), 500)
    one, three, none = (mixture.output(x, timestep, labels, scale).flatten(1) for scale in (1.0, 3.0, 0.0))
    assert torch.allclose(three, none + 3 * (one - none), atol=1e-4)
    assert torch.allclose(none, ((z - mixture.expected_data(z, 0.5, None)) / 0.5), atol=1e-5)


def test_the_energy_distance_of_two_places_is_that_between_them() -> None:
    points, elsewhere = torch.zeros(1, 3, 2), torch.tensor([3.0, 4.0]).expand(1, 5, 2)
    assert energy_distance(points, elsewhere, apart(elsewhere)) == pytest.approx(10**0.5)
    assert energy_distance(points, points, apart(points)) == 0


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


def test_intervals_and_verdicts() -> None:
    mean, half = interval(torch.tensor([1.0, 2.0, 3.0]))
    assert (mean, half) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-4))  # t of 2 degrees of freedom

    def row(mean: float) -> dict:
        return {"direct less": {"reflow": {"energy distance": (mean, 0.1)}}}

    assert [verdict(row(mean)) for mean in (-0.2, 0.05, 0.2)] == ["direct", "even", "reflow"]


def test_a_rate_that_diverged_for_one_seed_is_not_the_best() -> None:
    distances = torch.tensor([[[0.3, 0.3], [0.2, 0.3], [0.1, torch.nan], [9.0, 9.0]]])
    assert best_rates(distances).tolist() == pytest.approx([RATES[1]])


def test_no_setting_stands_twice_in_a_part() -> None:
    for part in settings().values():
        assert len(set(part)) == len(part)


def test_the_program_maps_two_settings(tmp_path: Path) -> None:
    said, result = run("where_reflow_pays", ["--quick", "--page", "map.html"], tmp_path)
    (rows,) = result["parts"].values()
    assert len(rows) == 2 and said.count("direct 0.") == 2
    for row in rows:
        one_step = {name: measures["energy distance"][0] for name, measures in row["measures"].items()}
        assert set(METHODS) < set(one_step)
        # Reflow straightens, so that one step of the 2-rectified flow is nearer to the data than one of the first.
        assert row["straightness"]["2rf"] < row["straightness"]["1rf"] / 3
        assert one_step["teacher"] < one_step["2rf"] < one_step["1rf"] / 1.5
        mean, half = row["direct less"]["reflow"]["energy distance"]
        assert mean == pytest.approx(one_step["direct"] - one_step["reflow"], abs=1e-4) and half > 0
    assert (tmp_path / "map.html").read_text().count("<tr>") == 3
