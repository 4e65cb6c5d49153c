"""Which of two rows has the better figure, and whether chance may have made it so."""

import math
from collections.abc import Sequence

from instaflow.evaluation.intervals import of_mean
from instaflow.evaluation.report import Row
from instaflow.evaluation.wording import is_number

TIE = 0.05  # two Fréchet distances within 5 % of one another are called the same
DISTANCES = {"frechet_distance_real": "the real images", "frechet_distance_teacher": "the {}’s images"}


def distances(*rows: Row) -> tuple[str, list[float]] | None:
    """(to what, Fréchet distances): to the real images where all rows have that, else to the teacher's, else None."""
    if not (key := by_which(*rows)):
        return None
    return DISTANCES[key].format(whose(rows)), [float(getattr(row, key)) for row in rows]


def whose(rows: Sequence[Row]) -> str:
    """What the rows' reference is called: the teacher, or else the reference; that of the report's own rows."""
    return next((row.compared_with for row in rows if not row.beside), "teacher")


def by_which(*rows: Row) -> str | None:
    """The Fréchet distance by which these rows compare, the first of DISTANCES that all have."""
    return next((key for key in DISTANCES if all(is_number(getattr(row, key)) for row in rows)), None)


def comparison(a: float, b: float) -> int:
    """-1 if `a` is the smaller, 1 if the larger, 0 if they are the same within TIE."""
    return 0 if abs(a - b) <= TIE * max(abs(a), abs(b)) else (-1 if a < b else 1)


def order(a: Row, b: Row, figure: str | None = None) -> int:
    """-1 if `a` has the smaller figure, 1 if the larger, 0 if they are the same within TIE or chance may part them.

    figure: else the distance by which they compare.
    """
    figure = figure or by_which(a, b) or ""
    return 0 if is_chance(a, b, figure) else comparison(getattr(a, figure), getattr(b, figure))


def is_chance(a: Row, b: Row, figure: str | None = None, *, same: float = TIE) -> bool:
    """Whether other prompts and noises might turn the order of two rows, and not merely move them within `same`."""
    figure = figure or by_which(a, b) or ""
    apart, largest = abs(getattr(a, figure) - getattr(b, figure)), max(getattr(a, figure), getattr(b, figure))
    half = interval_of_difference(a, b, figure)
    return apart <= half and apart + half > same * largest


def interval_of_difference(a: Row, b: Row, figure: str) -> float:
    """Half the width of the 95 % interval of the difference of two rows' figures, over prompts and noise.

    Rows share both: their images are compared one by one, where what each adds is known. Without that the rows are
    taken as if they were independent, which makes it wider; one that tells no interval is taken as exact.
    """
    ours, theirs = (row.parts.get(figure) for row in (a, b))
    if ours is not None and theirs is not None and len(ours) == len(theirs):
        half = of_mean(ours - theirs)
        return math.inf if half is None else half  # of a single prompt nothing can be told
    return math.hypot(*(row.intervals.get(figure) or 0.0 for row in (a, b)))


def tie(a: Row, b: Row) -> str:
    """Why nothing follows from the distances of two rows."""
    return by_chance(a) if is_chance(a, b) else f"the same within {TIE:.0%}"


def by_chance(row: Row) -> str:
    return f"a difference that {row.num_samples:,} samples cannot tell from chance"
