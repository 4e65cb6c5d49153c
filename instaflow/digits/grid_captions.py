"""The grid's language: what is said about four digits in a square, and which cells it names.

A caption names all four digits, some or none of them, always with the place of each: by corner, row or column, and by
what stands above what. What it leaves open is any digit; that is about half. Cells count by rows: top left, top right,
bottom left, bottom right.
"""

import random
import re
from functools import cache
from itertools import permutations

from instaflow.digits.captions import WORDS

Cells = tuple[int | None, ...]  # a digit for each of the four cells, None where a caption leaves it open

ARTICLED = tuple(f"{'an' if word[0] == 'e' else 'a'} {word}" for word in WORDS)  # "an eight"
CORNERS = ("top left", "top right", "bottom left", "bottom right")
ROWS = {"top": (0, 1), "bottom": (2, 3)}
COLUMNS = {"left": (0, 2), "right": (1, 3)}

# In each, {0} to {3} are the digits of the cells. A kind is as likely as any other, and so is a template of its kind.
TRAINED: dict[str, tuple[str, ...]] = {
    "rows": (
        "{0} and {1} above {2} and {3}",
        "at the top {0} and {1} and at the bottom {2} and {3}",
    ),
    "columns": (
        "{0} above {2} beside {1} above {3}",
        "on the left {0} above {2} and on the right {1} above {3}",
    ),
    "row": tuple(
        template
        for row, (a, b) in ROWS.items()
        for template in (f"{{{a}}} and {{{b}}} in the {row} row", f"at the {row} {{{a}}} and {{{b}}}")
    ),
    "column": tuple(
        template
        for column, (a, b) in COLUMNS.items()
        for template in (
            f"{{{a}}} above {{{b}}} on the {column}",
            f"in the {column} column {{{a}}} and {{{b}}}",
        )
    ),
    "corners": tuple(
        f"in the {CORNERS[a]} corner {{{a}}} and in the {CORNERS[b]} corner {{{b}}}"
        for a, b in permutations(range(4), 2)
    ),
    "corner": tuple(
        template
        for cell, corner in enumerate(CORNERS)
        for template in (f"{{{cell}}} in the {corner} corner", f"at the {corner} {{{cell}}}")
    ),
    "open": ("four digits", "four handwritten digits", "four digits in a square"),
}

# Said only in the evaluation: every word is known, and so is each part of the phrase.
UNSEEN: dict[str, tuple[str, ...]] = {
    "row": tuple(f"in the {row} row {{{a}}} and {{{b}}}" for row, (a, b) in ROWS.items()),
    "column": tuple(f"on the {column} {{{a}}} above {{{b}}}" for column, (a, b) in COLUMNS.items()),
    "corner": tuple(f"in the {corner} corner {{{cell}}}" for cell, corner in enumerate(CORNERS)),
    "corners": tuple(
        f"at the {CORNERS[a]} {{{a}}} and at the {CORNERS[b]} {{{b}}}" for a, b in permutations(range(4), 2)
    ),
}


def cells_named(caption: str) -> Cells:
    """What `caption` says of each cell; ValueError if the grid has no such caption."""
    for pattern in (*_patterns("trained"), *_patterns("unseen")):
        if found := pattern.fullmatch(caption):
            said = {int(name[1:]): ARTICLED.index(text) for name, text in found.groupdict().items()}
            return tuple(said.get(cell) for cell in range(4))
    raise ValueError(f"no cells are known for the caption {caption!r}")


def is_unseen(caption: str) -> bool:
    """Whether a caption is phrased as no training stage saw it."""
    return any(pattern.fullmatch(caption) for pattern in _patterns("unseen"))


@cache
def _patterns(language: str) -> list[re.Pattern[str]]:
    kinds, digit = {"trained": TRAINED, "unseen": UNSEEN}[language], "|".join(ARTICLED)
    templates = [template for templates in kinds.values() for template in templates]
    return [re.compile(re.sub(r"{(\d)}", rf"(?P<c\1>{digit})", template)) for template in templates]


def caption_for(labels: list[int], rng: random.Random, kinds: dict[str, tuple[str, ...]] = TRAINED) -> str:
    """A true caption for a grid of the digits `labels` [4], of any kind."""
    templates = kinds[rng.choice(list(kinds))]
    return rng.choice(templates).format(*(ARTICLED[label] for label in labels))


def training_prompts() -> list[str]:
    """What the couplings are made of: 3,000 captions of grids of random digits."""
    return [_random_caption(random.Random(f"training/{place}")) for place in range(3000)]


def evaluation_prompts(count: int) -> list[str]:
    """`count` captions of other grids and, for one in eight, in a phrase that no training stage has seen."""
    return [
        _random_caption(random.Random(f"evaluation/{place}"), UNSEEN if place % 8 == 7 else TRAINED)
        for place in range(count)
    ]


def _random_caption(rng: random.Random, kinds: dict[str, tuple[str, ...]] = TRAINED) -> str:
    return caption_for(rng.choices(range(10), k=4), rng, kinds)
