"""The map of where reflow pays: its toy data, and the program on two settings."""

from pathlib import Path

import pytest
import torch

from benchmarks.reflow_map import METHODS, verdict
from benchmarks.where_reflow_pays import (
    RATES,
    SHAPES,
    best_rates,
    interval,
    mixture_of,
    reference,
    settings,
)
from instaflow.toy.mixtures import energy_distance, even_noise
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
