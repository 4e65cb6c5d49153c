"""The rows of earlier reports, shown beside a report's own."""

from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

from instaflow.errors import ConfigError
from instaflow.evaluation.card import OF_LOOKS, check_alike, difference
from instaflow.evaluation.costs import told_cost
from instaflow.evaluation.report import Row
from instaflow.evaluation.saved import read_report
from instaflow.rundir import StageFolder
from pipelines.measuring import straightness_in_words, timed_here, timing_in_words
from pipelines.observing import Subject


def rows_beside(stage: StageFolder, subject: Subject) -> list[Row]:
    """The rows of reports that were made before, without the figures that go by this one's own circumstances.

    Raises ConfigError where their protocol is another one, DataError where one is no report.
    """
    found = []
    places = [Path(place) for place in stage.stage.beside]
    for place, name in zip(places, told_apart([place.resolve().parent.parent for place in places]), strict=True):
        if place.resolve() == (stage.folder / "report.json").resolve():
            raise ConfigError(f"'{place}', given beside this report, is this report", "Leave it out of 'beside'")
        report = read_report(place, "Name the report.json of an earlier evaluation, or leave it out of 'beside'")
        for row in report.rows:
            own, other = asdict(subject.card), row.card
            check_alike([(f"'{subject.label}'", own), (f"'{row.model}' in '{place}'", other)], but=OF_LOOKS)
            row = replace(row, cost=told_cost(report, row))
            row = replace(row, model=f"{name}: {row.model}", beside=True, frechet_distance_teacher=None)
            row = replace(row, pixel_gap=None, perceptual_gap=None)  # they were to another teacher
            if difference(own, other):
                row = replace(row, diversity=None, card={**other, **dict.fromkeys(OF_LOOKS, "")})
            if report.protocol.straightness != straightness_in_words(stage):
                row = replace(row, straightness=None, straightness_relative=None)
            if report.protocol.timing != timing_in_words(stage) or not timed_here(subject, other):
                row = replace(row, seconds_per_image=None)
            found.append(row)
    return found


def told_apart(folders: list[Path]) -> list[str]:
    """A name for each folder: its own, with those above it as far as another one's ends alike."""
    names = []
    for folder in folders:
        others = [other.parts for other in folders if other != folder]
        length = next(
            n for n in count(1) if n >= len(folder.parts) or folder.parts[-n:] not in {o[-n:] for o in others}
        )
        names.append("/".join(folder.parts[-length:]))
    return names
