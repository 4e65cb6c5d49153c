"""What a comparison of several seeds says, in sentences that follow its figures."""

import math
from pathlib import Path

from instaflow.evaluation.comparison import Comparison, Pair, Spread
from instaflow.evaluation.row_words import TO_TEACHER
from instaflow.evaluation.wording import is_number, joined, named, plus_minus

TITLES = {
    "frechet_distance_real": "Fréchet distance to real",
    "frechet_distance_teacher": "Fréchet distance to teacher",
    "prompt_accuracy": "Prompt accuracy",
    "prompt_accuracy_unseen": "on an unseen template",
    "pixel_gap": "Gap to teacher, pixels",
    "perceptual_gap": "Gap to teacher, perceptual",
    "diversity": "Diversity",
    "seconds_per_image": "Milliseconds per image",
    "straightness_relative": "Straightness, relative",
}
UNITS = {"prompt_accuracy": (100, "\N{NO-BREAK SPACE}%"), "prompt_accuracy_unseen": (100, "\N{NO-BREAK SPACE}%")}
UNITS |= {"seconds_per_image": (1000, "")}
"""By what a figure is multiplied to be read, and its unit; of the others 1 and none."""


def title(comparison: Comparison) -> str:
    return f"{Path(comparison.config).stem}: {len(comparison.runs)} seeds"


def said(figure: str, spread: Spread) -> str:
    """A mean with its interval, in the figure's unit: 98.6 ± 1.2 %, or 99.5 (98.3 to 100) % where that ends."""
    scale, unit = UNITS.get(figure, (1, ""))
    if figure in TO_TEACHER and spread.count and not any(spread.values):
        return "itself"
    text = plus_minus(spread.mean, spread.interval, scale=scale)
    if is_cut(figure, spread):
        mean = text.partition("\N{NO-BREAK SPACE}±")[0]
        decimals = len(mean.partition(".")[2])
        shown = [f"{end:g}" if end in (0, scale) else f"{end:.{decimals}f}" for end in ends(figure, spread)]
        text = f"{mean} ({' to '.join(shown)})".replace(" ", "\N{NO-BREAK SPACE}")
    return text + (unit if spread.count else "")


def ends(figure: str, spread: Spread) -> list[float]:
    """A mean's 95% interval in the figure's unit; that of a share ends at 0 and 100 %. Empty where there is none."""
    if spread.mean is None or not is_number(spread.interval):
        return []
    scale, unit = UNITS.get(figure, (1, ""))
    low, high = (0.0, 1.0) if unit else (-math.inf, math.inf)
    half = spread.interval or 0.0
    return [scale * min(max(end, low), high) for end in (spread.mean - half, spread.mean + half)]


def is_cut(figure: str, spread: Spread) -> bool:
    """Whether Student's t would have a share beyond 0 or 100 %."""
    scale, unit = UNITS.get(figure, (1, ""))
    return bool(unit) and any(end in (0, scale) for end in ends(figure, spread)) and bool(spread.interval)


def difference(pair: Pair) -> str:
    """How far one row is ahead of another; of accuracies, in percentage points."""
    scale, unit = UNITS.get(pair.figure, (1, ""))
    points = "\N{NO-BREAK SPACE}points" if unit else ""
    return plus_minus(pair.difference.mean, pair.difference.interval, scale=scale) + points


def verdict(pair: Pair) -> str:
    """A is ahead of B by x ± y (4 seeds), or not told apart from it."""
    names, seeds = (named(pair.ahead), named(pair.behind)), f"{pair.difference.count} seeds"
    if pair.difference.is_told_apart:
        return f"{names[0]} is ahead of {names[1]} by {difference(pair)} ({seeds})."
    return f"{names[0]} and {names[1]} are not told apart: {difference(pair)} ({seeds})."


def headline(comparison: Comparison) -> list[str]:
    """The best one-step row, who may be as good, and the next that is not."""
    measure = comparison.figure
    best = comparison.best(measure)
    if best is None:
        return []
    reached = said(measure, best.figures[measure])
    texts = {
        "real": f"comes nearest to the real images in one step, at a Fréchet distance of {reached}",
        "teacher": f"comes nearest to the teacher’s images in one step, at a Fréchet distance of {reached}",
        "accuracy": f"follows its prompts best in one step, {reached} of them",
    }
    count, all_of = best.figures[measure].count, len(comparison.runs)
    seeds = f"{count} seeds" if count == all_of else f"{count} of {all_of} seeds"
    found = [f"{named(best.label)} {texts[comparison.by]} (mean of {seeds})."]
    near = comparison.not_told_apart(measure)
    if near:
        found.append(f"Not told apart from it: {joined([named(row.label) for row in near])}.")
    others = [row for row in comparison.one_step if row is not best and row not in near]
    pairs = [pair for row in others if (pair := comparison.pair(measure, best, row))]
    if pairs:
        others_too = f", and of {len(pairs) - 1} more" if pairs[1:] else ""
        found.append(f"It is ahead of {named(pairs[0].behind)} by {difference(pairs[0])}{others_too}.")
    return found


def caution(comparison: Comparison) -> list[str]:
    """What ± is, and what so few seeds can tell."""
    seeds = len(comparison.runs)
    found = [
        f"± is half of the 95\N{NO-BREAK SPACE}% interval of a mean over {seeds} seeds (Student’s t, {seeds - 1} "
        f"degree{'s' if seeds > 2 else ''} of freedom). Each seed makes anew all that the experiment makes, and "
        "draws the noise of the evaluation anew."
    ]
    if any(is_cut(name, spread) for row in comparison.rows for name, spread in row.figures.items()):
        found.append(
            "An interval of a share ends at 0 or 100\N{NO-BREAK SPACE}%: where ± would reach beyond, it is in brackets."
        )
    if seeds == 2:
        found.append("Two seeds tell little, and their intervals are wide: three or more are better.")
    return found


def notes(comparison: Comparison) -> list[str]:
    """What the runs don't have in common."""
    found = []
    if len(set(comparison.hardware.values())) > 1:
        found.append("The runs were made on different hardware, so their times do not compare.")
    names = [name for versions in comparison.versions.values() for name in versions]
    mixed = [n for n in dict.fromkeys(names) if len({v.get(n) for v in comparison.versions.values()}) > 1]
    if mixed:
        found.append(f"The runs were made with different versions of {joined(mixed)}.")
    return found
