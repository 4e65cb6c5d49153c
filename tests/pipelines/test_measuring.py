"""What each image adds to a row's figures, and the intervals that follow."""

from types import SimpleNamespace

import numpy as np
import pytest

from instaflow.evaluation import intervals
from instaflow.evaluation.frechet import Gaussian, frechet_distance, influence
from pipelines.measuring import Measure, half_widths

COUNT, CELLS, SIZE = 40, 4, 6


def made(seed: int) -> np.ndarray:
    """Features of COUNT images of CELLS cells each; those of an image are alike."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((COUNT, 1, SIZE)) + 0.1 * rng.standard_normal((COUNT, CELLS, SIZE))).reshape(-1, SIZE)


@pytest.fixture
def measure():
    """Beside a reference and real images; nothing is read in the images."""
    protocol = SimpleNamespace(parts=lambda observed: {"clip_score": observed["scores"]})
    real, taught = np.random.default_rng(5).standard_normal((300, SIZE)), made(6)
    return Measure(protocol, real, Gaussian.of(real), object(), taught, Gaussian.of(taught), "teacher")


def parts_of(measure: Measure, features: np.ndarray, **seen) -> dict[str, np.ndarray]:
    m = SimpleNamespace(
        subject=SimpleNamespace(images=SimpleNamespace(count=COUNT)),
        **{"pixel_gaps": [], "gaps": None, "own": None} | seen,
    )
    return measure.parts(m, {"scores": np.arange(COUNT) / 100}, features, Gaussian.of(features))


def test_cells_of_an_image_count_together_and_vary_with_those_of_the_reference(measure):
    features = made(7)
    own = Gaussian.of(features)
    found = parts_of(measure, features)
    to_real = influence(features, own, measure.of_real)
    to_teacher = influence(features, own, measure.of_taught) + influence(measure.taught, measure.of_taught, own)
    assert [*found] == ["frechet_distance_real", "frechet_distance_teacher", "clip_score"]
    assert np.allclose(found["frechet_distance_real"], to_real.reshape(COUNT, CELLS).mean(axis=1))
    assert np.allclose(found["frechet_distance_teacher"], to_teacher.reshape(COUNT, CELLS).mean(axis=1))
    assert np.array_equal(found["clip_score"], np.arange(COUNT) / 100)


def test_the_interval_of_images_of_several_cells_is_that_of_many_draws(measure):
    found, halves = [], []
    for seed in range(100, 220):
        features = made(seed)
        found.append(frechet_distance(features, measure.of_real))
        halves.append(half_widths(parts_of(measure, features))["frechet_distance_real"])
    inside = np.abs(np.array(found) - np.mean(found)) <= halves
    assert inside.mean() >= 0.9 and np.mean(halves) < 1.5 * 1.96 * np.std(found)


def test_gaps_are_an_image_s_and_diversity_a_prompt_s(measure):
    pairs = np.random.default_rng(1).random((10, 6))
    found = parts_of(measure, made(7), pixel_gaps=np.arange(5.0), gaps=np.arange(5.0) / 2, own=pairs)
    assert found["pixel_gap"].tolist() == [0, 1, 2, 3, 4] and found["perceptual_gap"].tolist() == [0, 0.5, 1, 1.5, 2]
    assert np.allclose(found["diversity"], pairs.mean(axis=1))
    assert half_widths(found)["diversity"] == pytest.approx(intervals.of_mean(pairs.mean(axis=1)))


def test_without_a_reference_nothing_is_to_it(measure):
    alone = Measure.by(measure.protocol, measure.real, None)
    assert "frechet_distance_teacher" not in parts_of(alone, made(7))


def test_a_share_has_wilson_s_interval_and_a_single_prompt_none():
    found = half_widths({"prompt_accuracy": np.ones(50), "diversity": np.ones(1), "clip_score": np.arange(3.0)})
    assert found == {"prompt_accuracy": intervals.of_share(1.0, 50), "clip_score": intervals.of_mean(np.arange(3.0))}
