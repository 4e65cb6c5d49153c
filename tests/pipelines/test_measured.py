"""How rows are compared: by the batch, so that no row's images are in memory at once."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from instaflow.digits.protocol import distances, unrelated_distance
from instaflow.evaluation.observations import Observations
from pipelines.observing import Measured, Subject

COUNT, SIZE, KEPT, SIDE = 52, 4, 38, 128
BATCH_BYTES = SIZE * SIDE * SIDE * 3


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> tuple[list[Subject], list[np.ndarray]]:
    """Two rows with the images that are kept of them."""
    folder, rng = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    subjects, images = [], [rng.integers(0, 255, (KEPT, SIDE, SIDE, 3), np.uint8) for _ in range(2)]
    for number, own in enumerate(images):
        kept = Observations(folder / str(number), COUNT, SIZE)
        kept.begin({})
        for batch in kept.batches:
            places = np.arange(batch.start, batch.stop)
            kept.write(batch, {"images": own[batch], "features": places[:, None, None].repeat(3, 2), "seconds": places})
        entry = SimpleNamespace(model="a", weights="ema", scales=[None])
        subjects.append(Subject(entry, SimpleNamespace(num_steps=1, guidance_scale=1.0), kept, None))
    return subjects, images


def test_gaps_are_those_of_the_kept_images_to_the_bit(rows):
    [reference, other], images = rows
    found = Measured.of(other, reference)
    whole = distances(images[1], images[0])
    assert found.pixel_gaps.dtype == whole.dtype == np.float32 and np.array_equal(found.pixel_gaps, whole)
    assert found.kept == KEPT and found.pixel_gaps.mean() == whole.mean()
    itself = Measured.of(reference, reference)
    assert itself.kept == KEPT and not itself.pixel_gaps.any()


def test_no_more_than_a_batch_of_each_is_in_memory(rows):
    subjects, images = rows
    tracemalloc.start()
    try:
        measured = [Measured.of(subject, subjects[0]) for subject in subjects]
        observed = [m.observed() for m in measured]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [one.keys() for one in observed] == [{"features", "seconds"}] * 2
    assert observed[1]["seconds"].tolist() == [*range(COUNT)]
    assert BATCH_BYTES < peak < 6 * BATCH_BYTES < images[0].nbytes  # a file, its content and its arrays, of two


def test_images_are_read_where_they_are_asked_for(rows):
    [reference, other], images = rows
    found = Measured.of(other, reference)
    assert np.array_equal(found.images([37, 0, 5]), images[1][[37, 0, 5]]) and len(found.images([])) == 0
    protocol = SimpleNamespace(told=lambda observed, place: str(observed["seconds"][place]))
    assert [found.told(protocol, place) for place in (0, 5, 43)] == ["0", "5", "43"]


def test_what_comes_after_the_kept_images_is_not_read(rows, monkeypatch):
    [reference, _], read, begun = rows[0], Observations.read, list[int]()
    monkeypatch.setattr(Observations, "read", lambda self, batch: begun.append(batch.start) or read(self, batch))
    Measured.of(reference, reference)
    assert begun == [*range(0, 44, 4)]  # the last of them keeps none


@pytest.mark.parametrize("at_a_time", [1, 4, 100])
def test_unrelated_images_are_those_of_one_prompt(rows, at_a_time):
    [reference, _], [images, _] = rows
    prompts = [f"prompt {place % 15}" for place in range(KEPT)]
    expected = np.median(distances(images[:-15], images[15:]))
    assert unrelated_distance(Measured(reference).images, prompts, at_a_time) == expected
    assert unrelated_distance(Measured(reference).images, prompts[:15], at_a_time) is None
