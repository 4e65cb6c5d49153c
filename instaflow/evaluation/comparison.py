"""One experiment with several seeds: each figure's mean and spread, the ranking, and which differences hold."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from scipy.special import stdtrit

from instaflow.evaluation.costs import training_samples
from instaflow.evaluation.report import Protocol, Report, Row, labelled
from instaflow.evaluation.saved import FIGURES
from instaflow.evaluation.wording import is_number, steps

RANKINGS = {"real": "frechet_distance_real", "teacher": "frechet_distance_teacher", "accuracy": "prompt_accuracy"}
LOWER, HIGHER = 1, -1
BETTER = {
    "frechet_distance_real": LOWER,
    "frechet_distance_teacher": LOWER,
    "prompt_accuracy": HIGHER,
    "prompt_accuracy_unseen": HIGHER,
}
"""The figures of quality, by which pairs are compared, and which way is better."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over seeds; those where it is missing or not finite don't count, and with one there is no spread.

    standard_deviation: with n - 1; standard_error: of the mean. interval: half the width of the mean's 95% interval,
    by Student's t with n - 1 degrees of freedom, as if what the seeds change were normal.
    """

    by_seed: Mapping[int, float | None]
    count: int
    mean: float | None
    standard_deviation: float | None
    standard_error: float | None
    interval: float | None
    minimum: float | None
    maximum: float | None

    @property
    def values(self) -> list[float]:
        return [value for value in self.by_seed.values() if value is not None]

    @property
    def is_told_apart(self) -> bool:
        """Whether the 95% interval leaves out 0."""
        return self.mean is not None and self.interval is not None and abs(self.mean) > self.interval


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two rows by one figure. behind: how far `behind` falls short of `ahead`, seed by seed, where both have it.

    Rows of one seed share teacher and noise; what those change is in both rows, and not in their difference.
    """

    figure: str
    ahead: str
    behind: str
    difference: Spread


@dataclass(frozen=True, kw_only=True)
class ComparedRow:
    """One model at one number of steps, over all seeds.

    rank: from 1, among the one-step rows or among the others, which are there for scale; equals share it, and None is
    for a row without the figure. training_samples: seen after the teacher, on the whole way to this model.
    """

    rank: int | None
    model: str
    weights: str
    num_steps: int
    kind: str
    description: str
    guidance_scale: float | None
    swept: bool
    num_samples: int
    training_samples: int
    figures: Mapping[str, Spread]

    @property
    def label(self) -> str:
        return labelled(self.model, self.weights, self.guidance_scale if self.swept else None)

    @property
    def name(self) -> str:
        """The label, with the number of steps where that isn't one."""
        return self.label if self.num_steps == 1 else f"{self.label}, {steps(self.num_steps)}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The runs of one experiment. rows: the one-step rows by rank, then the others by theirs."""

    config: str
    by: str  # a key of RANKINGS
    runs: Mapping[int, str]  # seed -> place
    hardware: Mapping[int, str]
    versions: Mapping[int, Mapping[str, str]]
    protocol: Protocol
    floors: Mapping[str, Spread]
    rows: Sequence[ComparedRow]
    pairs: Sequence[Pair]

    @property
    def figure(self) -> str:
        return RANKINGS[self.by]

    @property
    def one_step(self) -> list[ComparedRow]:
        return [row for row in self.rows if row.num_steps == 1]

    def pair(self, figure: str, a: ComparedRow, b: ComparedRow) -> Pair | None:
        """The two rows compared, whichever is ahead."""
        names = {a.name, b.name}
        return next((p for p in self.pairs if p.figure == figure and {p.ahead, p.behind} == names), None)

    def best(self, figure: str) -> ComparedRow | None:
        """The one-step row with the best mean; of equals the one with the better rank."""
        found = [row for row in self.one_step if row.figures[figure].mean is not None]
        return min(found, key=lambda row: order(row, figure), default=None)

    def not_told_apart(self, figure: str) -> list[ComparedRow]:
        """The one-step rows whose difference from the best one may be chance."""
        best = self.best(figure)
        if best is None:
            return []
        pairs = [(row, self.pair(figure, best, row)) for row in self.one_step if row is not best]
        return [row for row, pair in pairs if pair and not pair.difference.is_told_apart]


def compare(reports: Mapping[str, Report], by: str) -> Comparison:
    """Reports of one experiment by their place, each of another seed; they have the same rows.

    Figures of a perceptual network that each seed trained for itself are left out: they have no common measure.
    """
    if len({row.card.get("perceptual", "") for report in reports.values() for row in report.rows}) > 1:
        reports = {place: without_looks(report) for place, report in reports.items()}
    runs = {report.seed: place for place, report in sorted(reports.items(), key=lambda item: item[1].seed)}
    by_seed = {seed: reports[place] for seed, place in runs.items()}
    first = next(iter(by_seed.values()))
    rows = {key(row): {seed: keyed(report)[key(row)] for seed, report in by_seed.items()} for row in first.rows}
    compared = [compared_row(first, found) for found in rows.values()]
    single = ranked([row for row in compared if row.num_steps == 1], RANKINGS[by])
    return Comparison(
        config=first.config,
        by=by,
        runs=runs,
        hardware={seed: report.hardware for seed, report in by_seed.items()},
        versions={seed: report.versions for seed, report in by_seed.items()},
        protocol=seedless(first),
        floors={
            name: spread({seed: getattr(report.floors, name) for seed, report in by_seed.items()})
            for name in vars(first.floors)
        },
        rows=[*single, *ranked([row for row in compared if row.num_steps > 1], RANKINGS[by])],
        pairs=[pair for figure in BETTER for a, b in combinations(single, 2) if (pair := paired(figure, a, b))],
    )


def without_looks(report: Report) -> Report:
    return replace(report, rows=[replace(row, perceptual_gap=None, diversity=None) for row in report.rows])


def seedless(report: Report) -> Protocol:
    """The protocol without what differs from seed to seed: the seed, and the hardware that times were taken on."""
    card = report.protocol
    noise = re.sub(rf"\bseed {report.seed}\b", "the run’s seed", card.noise)
    timing = card.timing.replace(report.hardware, "").rstrip(", ") if report.hardware else card.timing
    return replace(card, noise=noise, timing=timing)


def key(row: Row) -> tuple[str, str, int, float | None]:
    return row.model, row.weights, row.num_steps, row.guidance_scale if row.swept else None


def keyed(report: Report) -> dict[tuple[str, str, int, float | None], Row]:
    return {key(row): row for row in report.rows}


def compared_row(report: Report, rows: Mapping[int, Row]) -> ComparedRow:
    """One row over the seeds, not ranked yet. report: any of theirs."""
    row = next(iter(rows.values()))
    return ComparedRow(
        rank=None,
        model=row.model,
        weights=row.weights,
        num_steps=row.num_steps,
        kind=row.kind,
        description=next((stage.description for stage in report.stages if stage.name == row.model), ""),
        guidance_scale=row.guidance_scale,
        swept=row.swept,
        num_samples=row.num_samples,
        training_samples=training_samples(report, row),
        figures={name: spread({seed: getattr(own, name) for seed, own in rows.items()}) for name in FIGURES},
    )


def spread(by_seed: Mapping[int, float | None]) -> Spread:
    found = {seed: float(value) if value is not None and is_number(value) else None for seed, value in by_seed.items()}
    values = np.array([value for value in found.values() if value is not None])
    count = len(values)
    deviation = float(values.std(ddof=1)) if count > 1 else None
    error = deviation / math.sqrt(count) if deviation is not None else None
    return Spread(
        by_seed=found,
        count=count,
        mean=float(values.mean()) if count else None,
        standard_deviation=deviation,
        standard_error=error,
        interval=float(stdtrit(count - 1, 0.975)) * error if error is not None else None,
        minimum=float(values.min()) if count else None,
        maximum=float(values.max()) if count else None,
    )


def order(row: ComparedRow, figure: str) -> float:
    """Smaller is better; a row without the figure is last."""
    mean = row.figures[figure].mean
    return math.inf if mean is None else BETTER[figure] * mean


def ranked(rows: Sequence[ComparedRow], figure: str) -> list[ComparedRow]:
    """The rows, best mean first; equals share a rank and keep their order."""
    places = [order(row, figure) for row in rows]
    ranks = [1 + sum(other < place for other in places) if math.isfinite(place) else None for place in places]
    best_first = sorted(range(len(rows)), key=places.__getitem__)
    return [replace(rows[i], rank=ranks[i]) for i in best_first]


def paired(figure: str, a: ComparedRow, b: ComparedRow) -> Pair | None:
    """The difference of two rows, seed by seed; None where no seed has both."""
    ahead, behind = sorted((a, b), key=lambda row: order(row, figure))
    sides = ahead.figures[figure].by_seed, behind.figures[figure].by_seed
    both = {seed: (x, y) for (seed, x), y in zip(sides[0].items(), sides[1].values(), strict=True)}
    short = {seed: BETTER[figure] * (y - x) for seed, (x, y) in both.items() if x is not None and y is not None}
    if not short:
        return None
    return Pair(figure=figure, ahead=ahead.name, behind=behind.name, difference=spread(short))


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """`comparison` as values that strict JSON can hold."""
    return {
        "config": comparison.config,
        "by": comparison.by,
        "runs": [
            {"seed": seed, "run": run, "hardware": comparison.hardware[seed], "versions": comparison.versions[seed]}
            for seed, run in comparison.runs.items()
        ],
        "protocol": vars(comparison.protocol),
        "floors": {name: spread_json(found) for name, found in comparison.floors.items()},
        "rows": [
            {**vars(row), "figures": {name: spread_json(found) for name, found in row.figures.items()}}
            for row in comparison.rows
        ],
        "pairs": [
            {
                "figure": pair.figure,
                "ahead": pair.ahead,
                "behind": pair.behind,
                **spread_json(pair.difference),
                "told_apart": pair.difference.is_told_apart,
            }
            for pair in comparison.pairs
        ],
    }


def spread_json(found: Spread) -> dict[str, Any]:
    """A spread as strict JSON holds it. interval_95: mean minus and plus half its width."""
    known = found.mean is not None and found.interval is not None
    ends = [found.mean - found.interval, found.mean + found.interval] if known else None  # type: ignore[operator]
    rest = {name: value for name, value in vars(found).items() if name not in ("by_seed", "interval")}
    return {**rest, "interval_95": ends, "by_seed": {str(seed): value for seed, value in found.by_seed.items()}}
