"""How different images look, on sets with known answers."""

from itertools import combinations

import numpy as np
import pytest
import torch

from instaflow.evaluation import perception as module
from instaflow.evaluation.perception import IMAGES, PROMPTS, Perception, of_one_prompt
from instaflow.training.perceptual import PerceptualNetwork, small_layers


@pytest.fixture(scope="module")
def perception() -> Perception:
    torch.manual_seed(0)
    network = PerceptualNetwork(small_layers([3, 4, 6], [1, 2]), [2, 4], of_imagenet=False)
    return Perception("a small network", "0123456789", network, torch.device("cpu"))


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 8, 8, 3), np.uint8)


def test_the_same_image_again_is_no_distance_away_and_another_is(perception):
    one = images(2, 1)
    assert np.array_equal(perception.apart(np.repeat(one, 4, axis=1)), np.zeros((2, 6), np.float32))
    assert (perception.apart(images(2, 4)) > 0).all()


def test_each_two_images_are_compared_by_the_network_s_distance(perception, monkeypatch):
    groups = images(5, 3)
    found = perception.apart(groups)
    as_floats = torch.from_numpy(groups).permute(0, 1, 4, 2, 3) / 127.5 - 1
    network = perception.network
    for place, (one, other) in enumerate(combinations(range(3), 2)):
        expected = network.distance(network(as_floats[:, one]), network(as_floats[:, other]))
        np.testing.assert_allclose(found[:, place], expected, rtol=1e-5)
    monkeypatch.setattr(module, "BATCH", 6)
    np.testing.assert_allclose(perception.apart(groups), found, rtol=1e-6)  # a part at a time


def test_its_line_on_the_card_has_the_hash(perception):
    assert str(perception) == "a small network, weights 01234567"


def test_images_that_are_there_are_taken_and_others_drawn_beyond_the_last():
    prompts = ["a", "b", "a", "a", "b", "a", "a", "c"]
    assert of_one_prompt(prompts, 8) == [("a", [0, 2, 3, 5]), ("b", [1, 4, 8, 9]), ("c", [7, 10, 11, 12])]
    assert of_one_prompt(prompts, 2) == [("a", [0, 8, 9, 10]), ("b", [1, 11, 12, 13]), ("c", [14, 15, 16, 17])]


def test_no_more_prompts_are_asked_than_are_counted():
    groups = of_one_prompt([str(place) for place in range(PROMPTS + 9)], PROMPTS + 9)
    assert [prompt for prompt, _ in groups] == [str(place) for place in range(PROMPTS)]
    places = [place for _, own in groups for place in own]
    assert len(set(places)) == IMAGES * PROMPTS
