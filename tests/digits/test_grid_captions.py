import itertools
import random
import string
from collections import Counter
from pathlib import Path

import pytest

from instaflow.digits.grid_captions import (
    ARTICLED,
    TRAINED,
    UNSEEN,
    caption_for,
    cells_named,
    evaluation_prompts,
    is_unseen,
    training_prompts,
)

TEMPLATES = [template for kinds in (TRAINED, UNSEEN) for templates in kinds.values() for template in templates]


@pytest.mark.parametrize(
    ("caption", "cells"),
    [
        ("an eight and a two above a four and a nine", (8, 2, 4, 9)),
        ("an eight above a two beside a four above a nine", (8, 4, 2, 9)),
        ("at the top an eight and a two and at the bottom a four and a nine", (8, 2, 4, 9)),
        ("on the left an eight above a two and on the right a four above a nine", (8, 4, 2, 9)),
        ("a seven and a two in the bottom row", (None, None, 7, 2)),
        ("at the top a seven and a two", (7, 2, None, None)),
        ("a seven above a two on the right", (None, 7, None, 2)),
        ("in the left column a seven and a two", (7, None, 2, None)),
        ("a three in the top left corner", (3, None, None, None)),
        ("in the bottom left corner a three and in the top right corner a five", (None, 5, 3, None)),
        ("on the right a two above a seven", (None, 2, None, 7)),
        ("four digits", (None, None, None, None)),
    ],
)
def test_captions_name_the_cells_that_they_say(caption, cells):
    assert cells_named(caption) == cells


@pytest.mark.parametrize("labels", [(0, 1, 2, 3), (8, 8, 4, 9), (5, 6, 7, 8)])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_caption_says_what_its_template_was_filled_with(template, labels):
    used = {int(field) for _, field, _, _ in string.Formatter().parse(template) if field}
    said = cells_named(template.format(*(ARTICLED[label] for label in labels)))
    assert said == tuple(label if cell in used else None for cell, label in enumerate(labels))


def test_no_two_templates_make_one_caption():
    made = Counter(template.format(*("a three",) * 4) for template in TEMPLATES)
    doubles = {caption for caption, count in made.items() if count > 1}
    assert not doubles


@pytest.mark.parametrize("caption", ["a handwritten seven", "a eight at the top left", "a two above a four", ""])
def test_an_unknown_caption_is_refused_by_name(caption):
    with pytest.raises(ValueError, match=f"the caption '{caption}'"):
        cells_named(caption)


def test_captions_of_grids_are_true_varied_and_half_open():
    rng = random.Random(0)
    named = 0
    for labels in itertools.islice(itertools.product(range(10), repeat=4), 0, None, 7):
        said = cells_named(caption := caption_for(list(labels), rng))
        assert all(digit in (None, label) for digit, label in zip(said, labels, strict=True))
        assert not is_unseen(caption)
        named += sum(digit is not None for digit in said)
    assert 0.5 < named / (4 * 1429) < 0.57


def test_training_prompts_ask_for_every_digit_about_equally_often():
    counts = [Counter[int | None]() for _ in range(4)]
    for prompt in training_prompts():
        for cell, digit in enumerate(cells_named(prompt)):
            counts[cell][digit] += 1
    assert all(120 < count[digit] < 205 for count in counts for digit in range(10))  # 3,000 · 15/28 / 10 = 161


def test_the_packaged_prompt_file_is_the_training_prompts():
    file = Path(__file__).parents[2] / "configs" / "digits-grid-prompts.txt"
    assert file.read_text(encoding="utf-8").splitlines() == training_prompts()


def test_evaluation_prompts_are_fixed_and_hold_unseen_phrases_of_known_words():
    prompts = evaluation_prompts(800)
    assert prompts[:100] == evaluation_prompts(100)
    unseen = [prompt for prompt in prompts if is_unseen(prompt)]
    assert len(unseen) == 100
    trained = training_prompts()
    assert not set(unseen) & set(trained)
    known = {word for caption in trained for word in caption.split()}
    assert all(word in known for caption in unseen for word in caption.split())
