import pytest
import torch

from instaflow.evaluation.diversity import diversity
from instaflow.training.perceptual import PerceptualNetwork, small_layers


def difference(images, others):
    return (images - others).abs().mean((1, 2, 3))


def test_each_prompt_counts_alike_and_each_pair_within_it():
    levels = torch.tensor([0.0, 0.1, 0.4, 0.0, 0.5, 0.9])  # a: 0, 0.1, 0.4; b: 0, 0.5; c alone
    images = levels.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    expected = ((0.1 + 0.4 + 0.3) / 3 + 0.5) / 2
    for batch_size in (1, 3, 16):
        assert diversity(images, list("aaabbc"), difference, batch_size) == pytest.approx(expected)
    shuffled = [4, 0, 5, 2, 3, 1]
    assert diversity(images[shuffled], ["aaabbc"[i] for i in shuffled], difference) == pytest.approx(expected)


def test_without_two_images_of_one_prompt_there_is_none():
    assert diversity(torch.zeros(3, 3, 4, 4), list("abc"), difference) is None


def test_a_perceptual_network_measures_it():
    torch.manual_seed(0)
    network = PerceptualNetwork(small_layers([3, 4, 6], [1, 2]), [2, 4], of_imagenet=False)
    images = torch.rand(3, 3, 8, 8) * 2 - 1

    def distance(one, other):
        return network.distance(network(one), network(other))

    pairs = [float(distance(images[[i]], images[[j]])) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert diversity(images, ["p"] * 3, distance) == pytest.approx(sum(pairs) / 3, rel=1e-5)
    assert diversity(images[[0, 0]], ["p"] * 2, distance) == 0
