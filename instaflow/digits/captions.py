"""The miniature's language: captions in words, and the set of digits that each of them names.

About half of what is said about an image leaves its digit open ("an odd digit"). That is what makes one noise's path to
its image depend on more than the caption, as it does for photographs: paths of different digits cross, and crossing
paths are what reflow straightens.
"""

import random

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = frozenset(range(10))

# Each names one digit, by its word and by its figure.
SPECIFIC = (
    "{word}",
    "a handwritten {word}",
    "a handwritten {figure}",
    "the digit {word}",
    "the digit {figure}",
    "the number {figure}",
    "the handwritten number {word}",
)

# Each leaves the digit open. Together they name every digit equally often.
OPEN: dict[str, frozenset[int]] = {
    "a handwritten digit": DIGITS,
    "a handwritten number": DIGITS,
    "an odd digit": frozenset({1, 3, 5, 7, 9}),
    "an even digit": frozenset({0, 2, 4, 6, 8}),
    "an odd number": frozenset({1, 3, 5, 7, 9}),
    "an even number": frozenset({0, 2, 4, 6, 8}),
    "a handwritten odd digit": frozenset({1, 3, 5, 7, 9}),
    "a handwritten even digit": frozenset({0, 2, 4, 6, 8}),
    "a digit below five": frozenset({0, 1, 2, 3, 4}),
    "a digit above four": frozenset({5, 6, 7, 8, 9}),
    "a three or an eight": frozenset({3, 8}),
    "a four or a nine": frozenset({4, 9}),
    "a one or a seven": frozenset({1, 7}),
    "a two or a five": frozenset({2, 5}),
    "a zero or a six": frozenset({0, 6}),
}

# Said only in the evaluation: every word is known, the phrase is not.
UNSEEN_SPECIFIC = ("the handwritten digit {word}",)
UNSEEN_OPEN: dict[str, frozenset[int]] = {
    "a handwritten odd number": frozenset({1, 3, 5, 7, 9}),
    "a handwritten even number": frozenset({0, 2, 4, 6, 8}),
}


def _filled(templates: tuple[str, ...]) -> dict[str, frozenset[int]]:
    return {
        template.format(word=WORDS[digit], figure=digit): frozenset({digit})
        for template in templates
        for digit in sorted(DIGITS)
    }


TRAINED = _filled(SPECIFIC) | OPEN
UNSEEN = _filled(UNSEEN_SPECIFIC) | UNSEEN_OPEN


def digits_named(caption: str) -> frozenset[int]:
    """The digits that `caption` is true of; ValueError if the miniature has no such caption."""
    named = (TRAINED | UNSEEN).get(caption)
    if named is None:
        raise ValueError(f"no digits are known for the caption {caption!r}")
    return named


def caption_for(label: int, rng: random.Random) -> str:
    """A true caption for an image of the digit `label`; half of the time one that leaves the digit open."""
    if rng.random() < 0.5:
        return rng.choice(SPECIFIC).format(word=WORDS[label], figure=label)
    return rng.choice([caption for caption, named in OPEN.items() if label in named])


def training_prompts() -> list[str]:
    """What the couplings are made of: specific captions and open ones, half and half, weighted by repetition.

    An open caption stands as often as it names digits, so every digit is asked for as often as any other.
    """
    repeated = [caption for caption, named in OPEN.items() for _ in named]
    return [*_filled(SPECIFIC), *repeated]


def evaluation_prompts(count: int) -> list[str]:
    """`count` prompts: the training prompts and, for one in eight, a caption that no training stage has seen."""
    unseen = [*_filled(UNSEEN_SPECIFIC), *[caption for caption in UNSEEN_OPEN for _ in range(5)]]
    prompts = [*training_prompts(), *unseen]
    order = random.Random(0)
    rounds = [order.sample(prompts, len(prompts)) for _ in range(-(-count // len(prompts)))]
    return [prompt for shuffled in rounds for prompt in shuffled][:count]
