import numpy as np
import pytest

from instaflow.couplings.contact_sheet import (
    GAP,
    MARGIN,
    TILE,
    Pair,
    colours,
    contact_sheet,
    cut,
    fitted,
    font,
    wrapped,
)


def pair(index=0, prompt="a seven", size=8, shape=(64, 96, 3)):
    noise = np.random.default_rng(index).standard_normal((4, size, size * shape[1] // shape[0])).astype(np.float16)
    return Pair(index, prompt, colours(noise), np.full(shape, 100 + index, np.uint8))


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 3, 2), (7, 3, 3)])
def test_each_pair_has_its_place(count, columns, rows):
    sheet = np.asarray(contact_sheet("t", "s", [pair(index) for index in range(count)]))
    height, across, top = round(TILE * 2 / 3), 2 * TILE + GAP + MARGIN, MARGIN + 3 * 24
    assert sheet.shape[1] == MARGIN + columns * across
    down = (sheet.shape[0] - top) // rows
    for place in range(count):
        x, y = MARGIN + place % 3 * across, top + place // 3 * down
        noise, image = sheet[y : y + height, x : x + TILE], sheet[y : y + height, x + TILE + GAP :][:, :TILE]
        assert (image == 100 + place).all()
        np.testing.assert_array_equal(noise, np.asarray(fitted(pair(place).left)))


def test_prompt_and_index_are_written_beneath():
    plain, other, longer = (
        np.asarray(contact_sheet("t", "s", [pair(prompt=prompt)])) for prompt in ("a seven", "a nine", "long " * 30)
    )
    assert plain.shape == other.shape and (plain != other).any()
    assert longer.shape[0] == plain.shape[0] + 24


def test_noise_is_grey_at_zero_and_its_first_three_channels_are_the_colours():
    assert (colours(np.zeros((4, 2, 2))) == 128).all()
    noise = np.zeros((4, 1, 3), np.float16)
    noise[0, 0, 0], noise[1, 0, 1], noise[2, 0, 2] = 9, -9, 3
    assert colours(noise).tolist() == [[[255, 128, 128], [128, 0, 128], [128, 128, 255]]]
    assert colours(np.full((1, 1, 1), 3.0)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("shape", [(8, 8), (64, 64), (96, 64), (512, 512), (512, 768), (2000, 1)])
def test_the_longer_side_is_a_tile_s(shape):
    image = fitted(np.zeros((*shape, 3), np.uint8))
    assert max(image.size) == TILE and abs(image.width / image.height - shape[1] / shape[0]) < 0.01


def test_small_images_keep_their_pixels():
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    np.testing.assert_array_equal(np.asarray(fitted(pixels)), pixels.repeat(32, 0).repeat(32, 1))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        (" \n ", []),
        ("two\nlines", ["two lines"]),
        ("seven " * 4, ["seven seven", "seven seven"]),
        ("seven, " * 9, ["seven, seven,", "seven…"]),
        ("x" * 500, ["xxxxxxxxxx…"]),
        ("x" * 100_000_000, ["xxxxxxxxxx…"]),
    ],
)
def test_prompts_are_wrapped_and_cut_at_a_word(text, lines):
    assert wrapped(text, 115) == lines


def test_what_fits_is_not_cut():
    width = font(16).getlength("naïve café — Привет")
    assert cut("naïve café — Привет", width) == "naïve café — Привет"
    assert cut("naïve café — Привет", width - 1) == "naïve café…"
