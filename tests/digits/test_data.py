import random

import pytest
import torch

from instaflow.digits.data import DATA
from instaflow.digits.grid_captions import cells_named
from instaflow.digits.images import cells_of, real_digits, real_images, tiled
from instaflow.digits.losses import encode_all
from instaflow.digits.networks import build_autoencoder

CPU = torch.device("cpu")


def test_four_digits_are_tiled_in_the_order_of_reading():
    digits, _ = real_digits()
    grids = tiled(digits[:8].unflatten(0, (2, 4)))
    assert grids.shape == (2, 3, 64, 64)
    corners = (slice(0, 32), slice(32, 64))
    for grid in range(2):
        for cell, (row, column) in enumerate((y, x) for y in corners for x in corners):
            assert torch.equal(grids[grid, :, row, column], digits[4 * grid + cell])
    assert torch.equal(cells_of(grids, 2).flatten(0, 1), digits[:8])


def test_a_grid_is_made_of_every_digit_once():
    assert torch.equal(cells_of(real_images(2), 2).flatten(0, 1), real_digits(16)[0][:1796])
    assert torch.equal(real_images(1), real_digits()[0])


@pytest.mark.parametrize("name", list(DATA))
def test_a_batch_is_a_function_of_its_position(name):
    data, again, other = DATA[name](3, CPU), DATA[name](3, CPU), DATA[name](4, CPU)
    whole, captions = data.images_at("denoiser", 440, 20), data.captions_at("denoiser", 440, 20)
    assert torch.equal(again.images_at("denoiser", 452, 8), whole[12:])
    assert again.captions_at("denoiser", 452, 8) == captions[12:]
    assert not torch.equal(other.images_at("denoiser", 440, 20), whole)
    assert not torch.equal(data.images_at("autoencoder", 440, 20), whole)
    assert other.captions_at("denoiser", 440, 20) != captions


def test_captions_are_true_of_the_cells_of_their_grid():
    """Cell by cell: each is a real scan whose label the caption says or leaves open."""
    digits, labels = real_digits(16)
    label_of = {digit.numpy().tobytes(): int(label) for digit, label in zip(digits, labels, strict=True)}
    data = DATA["digits-grid"](0, CPU)
    grids, captions = data.images_at("denoiser", 900, 200), data.captions_at("denoiser", 900, 200)
    named = 0
    for cells, caption in zip(cells_of(grids, 2), captions, strict=True):
        shown = [label_of[cell.numpy().tobytes()] for cell in cells]
        said = cells_named(caption)
        assert all(digit in (None, label) for digit, label in zip(said, shown, strict=True))
        named += sum(digit is not None for digit in said)
    assert named > 200


@pytest.mark.parametrize(
    ("name", "caption", "allowed"),
    [
        ("digits", "a four or a nine", [{4, 9}]),
        ("digits-grid", "at the top a seven and a two", [{7}, {2}, set(range(10)), set(range(10))]),
    ],
)
def test_what_a_caption_allows_is_known_of_each_cell(name, caption, allowed):
    assert DATA[name].allowed_by(caption) == allowed


def test_an_epoch_of_grids_shows_every_digit_once():
    data = DATA["digits-grid"](0, CPU)
    cells = cells_of(data.images_at("denoiser", 0, 450), 2).flatten(0, 1)
    digits, _ = real_digits(16)
    assert len({cell.numpy().tobytes() for cell in cells[:1797]}) == len({d.numpy().tobytes() for d in digits})


@pytest.mark.parametrize("name", list(DATA))
def test_latents_are_those_of_the_images(name):
    torch.manual_seed(0)
    vae, data = build_autoencoder(), DATA[name](0, CPU)
    latents = data.latents_by(vae)("denoiser", 5, 6)
    torch.testing.assert_close(latents, encode_all(vae, data.images_at("denoiser", 5, 6)), atol=1e-5, rtol=1e-4)


def test_captions_are_drawn_by_the_seed_they_are_given():
    labels = [1, 2, 3, 4]
    drawn = [DATA["digits-grid"].caption_for(labels, random.Random(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
