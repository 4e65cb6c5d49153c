"""What an experiment aimed at, and what it came to: of one report, or of several seeds' by their means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instaflow.evaluation import findings
from instaflow.evaluation.chance import interval_of_difference
from instaflow.evaluation.comparison import BETTER, HIGHER, Spread, spread, spread_json
from instaflow.evaluation.comparison_words import TITLES, UNITS
from instaflow.evaluation.report import Report, Row
from instaflow.evaluation.wording import named, number, percent, plus_minus, steps
from instaflow.sections import Aim

BETTER_WAY = {**BETTER, "clip_score": HIGHER}
NAMES = {**TITLES, "clip_score": "CLIP score"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """An aim and what became of it.

    came, bound: the figure and what it was to be, by seed. short: by how much the figure misses, below 0 where it is
    better than asked. All three are without values where a figure is missing.
    chance: of a single report, how far prompts and noise may carry the two models of a `better_than` apart.
    """

    aim: Aim
    reference: str
    came: Spread
    bound: Spread
    short: Spread
    chance: float | None = None

    @property
    def apart(self) -> float | None:
        """Half the 95% interval of the difference that a `better_than` asks for: over seeds, else over noise."""
        return self.short.interval if self.short.count > 1 else self.chance

    @property
    def is_reached(self) -> bool | None:
        """By the means; None where nothing was measured. As good as another model is not better."""
        if self.short.mean is None:
            return None
        return self.short.mean < 0 if self.aim.better_than else self.short.mean <= 0

    @property
    def asked(self) -> str:
        """The aim in words."""
        aim, bound = self.aim, "at most" if BETTER_WAY[self.aim.figure] > 0 else "at least"
        if aim.better_than:
            asked = f"better than that of {named(aim.better_than)}"
        elif aim.times_reference:
            asked = f"{bound} {aim.times_reference:g} times that of {self.reference}"
        else:
            asked = f"{bound} {_said(aim.figure, aim.value)}"
        source = f" ({aim.source})" if aim.source else ""
        return f"{NAMES[aim.figure]} of {named(aim.model)} in {steps(aim.num_steps)} {asked}{source}"

    @property
    def found(self) -> str:
        """What it came to."""
        aim, came = self.aim, self.came.mean
        if came is None or self.bound.mean is None:
            return "–"
        text = _said(aim.figure, came)
        if aim.times_reference:
            return f"{text}, {number(came * aim.times_reference / self.bound.mean)} times"
        if aim.better_than:
            text += f" against {_said(aim.figure, self.bound.mean)}"
            if self.apart is not None:
                scale, unit = UNITS.get(aim.figure, (1, ""))
                apart = plus_minus(abs(self.short.mean or 0.0), self.apart, scale=scale)
                text += f", apart by {apart}{' points' if unit else ''}"
        return text

    @property
    def verdict(self) -> str:
        if self.is_reached is None:
            return "not measured"
        word = "reached" if self.is_reached else "missed"
        if self.aim.better_than and self.apart is not None and abs(self.short.mean or 0.0) <= self.apart:
            return f"{word}, not told apart"
        return word


def outcomes(reports: Mapping[int, Report]) -> list[Outcome]:
    """What became of the aims of one experiment's reports, by seed; they have the same aims."""
    first = next(iter(reports.values()))
    reference = findings.target(first)
    name = f"{named(reference.label)} in {steps(reference.num_steps)}" if reference else "the reference"
    return [outcome(aim, reports, name) for aim in first.aims]


def outcome(aim: Aim, reports: Mapping[int, Report], reference: str) -> Outcome:
    came = {seed: figure_of(aim, aim.model, report) for seed, report in reports.items()}
    bound = {seed: bound_of(aim, report) for seed, report in reports.items()}
    way = BETTER_WAY[aim.figure]
    pairs = {seed: (came[seed], bound[seed]) for seed in reports}
    short = {seed: way * (a - b) if a is not None and b is not None else None for seed, (a, b) in pairs.items()}
    spreads = {"came": spread(came), "bound": spread(bound), "short": spread(short)}
    chance = chance_of(aim, next(iter(reports.values()))) if len(reports) == 1 else None
    return Outcome(aim=aim, reference=reference, **spreads, chance=chance)


def chance_of(aim: Aim, report: Report) -> float | None:
    """Half the 95% interval of the difference of an aim's two models, over prompts and noise; None if unknown."""
    if not aim.better_than:
        return None
    own, other = (
        best_row(findings.rows_at(report, name, aim.num_steps), aim.figure) for name in (aim.model, aim.better_than)
    )
    if not own or not other or aim.figure not in {*own.intervals} & {*other.intervals}:
        return None
    return interval_of_difference(own, other, aim.figure)


def figure_of(aim: Aim, model: str, report: Report) -> float | None:
    """The aim's figure of a model's moving average; the best of its guidance scales."""
    row = best_row(findings.rows_at(report, model, aim.num_steps), aim.figure)
    return None if row is None else getattr(row, aim.figure)


def bound_of(aim: Aim, report: Report) -> float | None:
    """What the figure is to be."""
    if aim.better_than:
        return figure_of(aim, aim.better_than, report)
    if aim.times_reference:
        reference = findings.target(report)
        own = getattr(reference, aim.figure) if reference else None
        return None if own is None else aim.times_reference * own
    return aim.value


def best_row(rows: Sequence[Row], figure: str) -> Row | None:
    measured = [row for row in rows if getattr(row, figure) is not None]
    return min(measured, key=lambda row: BETTER_WAY[figure] * getattr(row, figure), default=None)


def summary(found: Sequence[Outcome]) -> list[str]:
    """How many aims are reached, and which are not."""
    if not found:
        return []
    reached = [one for one in found if one.is_reached]
    doubtful = [one for one in reached if one.verdict != "reached"]
    if len(reached) == len(found):
        count = "The aim is" if len(found) == 1 else f"All {len(found)} aims are"
    else:
        count = f"{len(reached)} of {len(found)} aims {'is' if len(reached) == 1 else 'are'}"
    text = f"{count} reached" if reached else "No aim is reached"
    if doubtful:
        text += f", {f'{len(doubtful)} of them ' if len(found) > 1 else ''}not told apart from chance"
    sentences = [f"{text}."]
    for word, group in (
        ("Missed", [one for one in found if one.is_reached is False]),
        ("Not measured", [one for one in found if one.is_reached is None]),
    ):
        if group:
            sentences.append(f"{word}: {'; '.join(f'{one.asked} ({one.found})' for one in group)}.")
    return sentences


def outcome_json(found: Outcome) -> dict[str, Any]:
    """An outcome as values that strict JSON can hold."""
    figures = {name: spread_json(getattr(found, name)) for name in ("came", "bound", "short")}
    words = {"asked": found.asked.replace("`", ""), "verdict": found.verdict}
    return {**found.aim.model_dump(), **words, "reached": found.is_reached, **figures}


def _said(figure: str, value: float | None) -> str:
    return percent(value) if UNITS.get(figure, (1, ""))[1] else number(value)
