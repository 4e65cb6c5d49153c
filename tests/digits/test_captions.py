import random
from collections import Counter
from pathlib import Path

import pytest

from instaflow.digits.captions import (
    DIGITS,
    OPEN,
    TRAINED,
    UNSEEN,
    caption_for,
    digits_named,
    evaluation_prompts,
    training_prompts,
)


@pytest.mark.parametrize(
    ("caption", "digits"),
    [
        ("a handwritten seven", {7}),
        ("the digit 0", {0}),
        ("a handwritten digit", set(range(10))),
        ("an odd digit", {1, 3, 5, 7, 9}),
        ("a digit below five", {0, 1, 2, 3, 4}),
        ("a four or a nine", {4, 9}),
        ("a handwritten even number", {0, 2, 4, 6, 8}),
    ],
)
def test_captions_name_the_digits_that_they_say(caption, digits):
    assert digits_named(caption) == digits


def test_an_unknown_caption_is_refused_by_name():
    with pytest.raises(ValueError, match="a photograph of a horse"):
        digits_named("a photograph of a horse")


def test_captions_of_images_are_true_varied_and_half_open():
    rng = random.Random(0)
    drawn = [(label, caption_for(label, rng)) for label in range(10) for _ in range(500)]
    assert all(label in digits_named(caption) for label, caption in drawn)
    assert {caption for _, caption in drawn} == set(TRAINED)
    assert 0.45 < sum(caption in OPEN for _, caption in drawn) / len(drawn) < 0.55


def test_training_prompts_ask_for_every_digit_equally_often():
    weight: Counter[int] = Counter()
    prompts = training_prompts()
    for caption in prompts:
        for digit in digits_named(caption):
            weight[digit] += 2520 // len(digits_named(caption))
    assert len(set(weight.values())) == 1
    assert 0.4 < sum(caption in OPEN for caption in prompts) / len(prompts) < 0.6


def test_the_packaged_prompt_file_is_the_training_prompts():
    file = Path(__file__).parents[2] / "configs" / "digits-prompts.txt"
    assert file.read_text(encoding="utf-8").splitlines() == training_prompts()


def test_evaluation_prompts_are_fixed_and_hold_unseen_phrases_of_known_words():
    prompts = evaluation_prompts(2000)
    assert len(prompts) == 2000
    assert prompts == evaluation_prompts(2000)
    assert prompts[:100] == evaluation_prompts(100)
    assert set(UNSEEN) <= set(prompts)
    assert not set(UNSEEN) & set(training_prompts())
    known = {word for caption in TRAINED for word in caption.split()}
    assert all(word in known for caption in UNSEEN for word in caption.split())
    assert all(digits_named(prompt) <= DIGITS for prompt in prompts)
