"""The rows of a report in order: those of one step by rank, then the others by theirs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from instaflow.evaluation.aims import BETTER_WAY
from instaflow.evaluation.chance import whose
from instaflow.evaluation.comparison import HIGHER, LOWER
from instaflow.evaluation.report import Row
from instaflow.evaluation.row_words import is_itself, parted, told
from instaflow.evaluation.wording import is_number

RANKED_BY = {
    "frechet_distance_real": "Fréchet distance to the real images",
    "frechet_distance_teacher": "Fréchet distance to the {}’s images",
    "prompt_accuracy": "prompt accuracy",
    "clip_score": "CLIP score",
}
"""The figures that rank, the first one that any row has, and what they are called."""
WAYS = {
    **BETTER_WAY,
    "kernel_distance": LOWER,
    "precision": HIGHER,
    "recall": HIGHER,
    "pixel_gap": LOWER,
    "perceptual_gap": LOWER,
}
"""The figures that have a best value, and which way that is."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """rank: from 1, among the rows of one step or among the others; None for a row without the figure."""

    rank: int | None
    row: Row


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """figure: by what is ranked, a key of RANKED_BY; "" where no row has any of them, and none has a rank."""

    figure: str
    reference: str
    one_step: Sequence[Ranked]
    several: Sequence[Ranked]

    @property
    def rows(self) -> list[Ranked]:
        return [*self.one_step, *self.several]

    @property
    def explained(self) -> str:
        """Ranked by the Fréchet distance to the real images"""
        article = "the " if self.figure.startswith("frechet") else ""
        return f"Ranked by {article}{RANKED_BY[self.figure].format(self.reference)}" if self.figure else ""


def ranking(rows: Sequence[Row]) -> Ranking:
    figure = next((name for name in RANKED_BY if any(math.isfinite(order(row, name)) for row in rows)), "")
    return Ranking(
        figure=figure,
        reference=whose(rows),
        one_step=_ranked([row for row in rows if row.num_steps == 1], figure),
        several=_ranked([row for row in rows if row.num_steps != 1], figure),
    )


def _ranked(rows: Sequence[Row], figure: str) -> list[Ranked]:
    """Best first. Rows whose figures read alike share a rank; those without one keep their order, at the end."""
    found: list[Ranked] = []
    for place, row in enumerate(sorted(rows, key=lambda row: order(row, figure)), start=1):
        alike = found and shown(row, figure) == shown(found[-1].row, figure)
        rank = found[-1].rank if alike else place
        found.append(Ranked(rank=rank if math.isfinite(order(row, figure)) else None, row=row))
    return found


def order(row: Row, figure: str) -> float:
    """Smaller is better; infinite without the figure."""
    value = getattr(row, figure) if figure else None
    if value is None or not is_number(value) or is_itself(row, figure):
        return math.inf
    return WAYS[figure] * float(value)


def shown(row: Row, figure: str) -> str:
    """A figure as it is read, without its interval."""
    return parted(told(row, figure))[0] if figure else ""
