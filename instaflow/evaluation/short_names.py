"""Models' names as they are shown: of a long path its end."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath

from instaflow.evaluation.report import Report, Row

PARTS = 2  # of a path, that tell one model from another


def with_short_names(report: Report) -> Report:
    """`report` with the last two parts of a path in place of a model's name that is one, where no other ends so.

    Everywhere but in the cards and in the protocol's sentences, which say all of it.
    """
    rows = [*report.rows, *(row for curve in report.scores for row in curve.rows)]
    found = {row.model: short(row) for row in rows}
    times = Counter(found.values())
    models = {model: name for model, name in found.items() if times[name] == 1}
    if all(model == name for model, name in models.items()):
        return report

    def renamed(rows: Sequence[Row]) -> list[Row]:
        return [replace(row, model=models.get(row.model, row.model)) for row in rows]

    labels = {row.label: own.label for row, own in zip(rows, renamed(rows), strict=True)}

    def of(label: str) -> str:
        return labels.get(label, label)

    gallery, gaps, near = report.gallery, report.gaps, report.neighbours
    return replace(
        report,
        rows=renamed(report.rows),
        scores=[replace(curve, rows=renamed(curve.rows)) for curve in report.scores],
        stages=[replace(one, parents=[models.get(name, name) for name in one.parents]) for one in report.stages],
        aims=[
            aim.model_copy(
                update={
                    "model": models.get(aim.model, aim.model),
                    "better_than": models.get(aim.better_than or "", aim.better_than),
                }
            )
            for aim in report.aims
        ],
        gallery=gallery and replace(gallery, rows=[replace(row, model=of(row.model)) for row in gallery.rows]),
        gaps=gaps
        and replace(
            gaps,
            student=of(gaps.student),
            teacher=of(gaps.teacher),
            distances={of(label): values for label, values in gaps.distances.items()},
        ),
        neighbours=near and replace(near, model=of(near.model)),
        straightness=[replace(one, model=of(one.model)) for one in report.straightness],
        trajectories=[replace(one, model=of(one.model)) for one in report.trajectories],
    )


def short(row: Row) -> str:
    """The name of a row's model; of another report's, behind that one's name, which stays whole."""
    whole = str(row.card.get("model") or row.model)
    before = row.model.removesuffix(whole) if row.beside else ""
    parts = PurePath(row.model.removeprefix(before)).parts
    return before + "/".join(parts[-PARTS:]) if len(parts) > PARTS else row.model
