import numpy as np
import pytest
import torch

from instaflow.digits.captions import digits_named
from instaflow.digits.grid_captions import cells_named
from instaflow.digits.images import features, real_digits, tiled
from instaflow.digits.protocol import PROTOCOLS


@pytest.fixture(scope="module")
def protocols():
    return {name: made(400) for name, made in PROTOCOLS.items()}


def obedient(protocol) -> torch.Tensor:
    """Real digits as the protocol's prompts ask for them; anything where a prompt leaves it open."""
    digits, labels = real_digits(32 // protocol.side)
    by_label = [digits[labels == label] for label in range(10)]
    rng = np.random.default_rng(0)
    cells = []
    for named in protocol.named:
        for allowed in named:
            choice = by_label[rng.choice(sorted(allowed if allowed is not None else range(10)))]
            cells.append(choice[rng.integers(len(choice))])
    return tiled(torch.stack(cells).unflatten(0, (-1, protocol.side**2)))


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_images_as_their_prompts_ask_are_right_and_others_are_not(protocols, name):
    protocol = protocols[name]
    images = obedient(protocol)
    assert images.shape[1:] == protocol.real_images.shape[1:]
    right = protocol.accuracy(protocol.readings(images))
    assert right.all > 0.98
    assert right.unseen > 0.95
    chance = protocol.accuracy(protocol.readings(images.roll(1, 0)))
    assert chance.all < 0.35


def test_a_grid_is_read_cell_by_cell_in_the_order_of_reading(protocols):
    digits, labels = real_digits(16)
    grids = tiled(digits[:400].unflatten(0, (100, 4)))
    read = np.array(protocols["digits-grid"].readings(grids))
    assert read.shape == (100, 4)
    assert (read.flatten() == labels[:400].numpy()).mean() > 0.98


def test_only_named_cells_count(protocols):
    """All named cells right, and all open ones wrong; then one named cell wrong."""
    protocol = protocols["digits-grid"]
    said = [cells_named(prompt) for prompt in protocol.prompts]
    readings = [tuple(-1 if digit is None else digit for digit in cells) for cells in said]
    assert protocol.accuracy(readings).all == 1
    total = sum(digit is not None for cells in said for digit in cells)
    first = next(place for place, cells in enumerate(said) if None not in cells)
    readings[first] = (-1, *readings[first][1:])
    assert protocol.accuracy(readings).all == pytest.approx(1 - 1 / total)
    assert protocol.accuracy(readings).unseen == 1


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_the_parts_of_a_share_are_those_of_the_images(protocols, name):
    protocol = protocols[name]
    observed = {"readings": np.random.default_rng(0).integers(0, 10, (400, protocol.side**2))}
    parts, figures = protocol.parts(observed), protocol.figures(observed)
    assert {key: own.mean() for key, own in parts.items()} == pytest.approx(figures)
    assert len(parts["prompt_accuracy"]) == 400 and len(parts["prompt_accuracy_unseen"]) == protocol.unseen.sum()
    place = int(parts["prompt_accuracy"].argmax())
    observed["readings"][place] = -1  # what no prompt allows
    changed = protocol.parts(observed)["prompt_accuracy"] != parts["prompt_accuracy"]
    assert changed.nonzero()[0].tolist() == [place]


def test_a_grid_s_features_are_those_of_its_digits(protocols):
    digits, _ = real_digits()
    protocol = protocols["digits-grid"]
    np.testing.assert_allclose(protocol.features(protocol.real_images), features(digits[:1796]), atol=1e-6)
    np.testing.assert_array_equal(protocols["digits"].features(digits), features(digits))


def test_readings_are_told_row_by_row(protocols):
    readings = {"readings": np.array([[1, 0, 0, 0], [7, 2, 4, 9]])}
    assert protocols["digits"].told({"readings": np.array([[3], [7]])}, 1) == "7"
    assert protocols["digits-grid"].told(readings, 1) == "7 2 / 4 9"


@pytest.mark.parametrize(("name", "fixed"), [("digits", [1, 1, 1, 1, 0, 0, 0, 0]), ("digits-grid", None)])
def test_the_gallery_is_a_mixture_of_different_prompts(protocols, name, fixed):
    protocol = protocols[name]
    places = protocol.gallery(10)
    assert len({protocol.prompts[place] for place in places}) == 10
    assert protocol.unseen[places].tolist() == [False] * 8 + [True] * 2
    if fixed:
        assert [len(digits_named(protocol.prompts[place])) == 1 for place in places[:8]] == [bool(f) for f in fixed]
    else:
        named = [sum(digit is not None for digit in cells_named(protocol.prompts[place])) for place in places[:8]]
        assert named == sorted(named, reverse=True)
        assert set(named) == {4, 2, 1, 0}
