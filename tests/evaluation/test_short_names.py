"""Models that are folders are shown by the end of their path, and the cards tell all of it."""

import re
from dataclasses import replace

import pytest

from instaflow.evaluation.markdown import markdown
from instaflow.evaluation.page import page
from instaflow.evaluation.report import Report, Row, report_json
from instaflow.evaluation.short_names import with_short_names
from instaflow.sections import Aim
from tests.evaluation.example import ROWS, full_report

FOLDER = "/data/experiments/night/teacher/model"


def called(row: Row, name: str, **changes) -> Row:
    return replace(row, model=name, card={**row.card, "model": name}, **changes)


def of_folder() -> Report:
    """The full report, its teacher a folder wherever it is named."""
    base = full_report()
    assert base.gallery and base.gaps

    def named(one):
        return replace(one, model=FOLDER) if one.model == "teacher" else one

    return replace(
        base,
        rows=[called(one, FOLDER) if one.model == "teacher" else one for one in ROWS],
        stages=[replace(s, parents=[FOLDER if name == "teacher" else name for name in s.parents]) for s in base.stages],
        aims=[Aim(model="student", figure="frechet_distance_real", better_than=FOLDER)],
        gallery=replace(base.gallery, rows=[named(one) for one in base.gallery.rows]),
        gaps=replace(base.gaps, teacher=FOLDER),
        straightness=[named(one) for one in base.straightness],
        trajectories=[named(one) for one in base.trajectories],
    )


def test_a_folder_is_shown_by_its_last_two_parts_and_whole_in_its_card():
    content = page(of_folder())
    before, _, card = content.partition("The protocol card")
    assert FOLDER not in before and before.count("teacher/model") > 20
    assert re.search(r"<td>teacher/model<br><span[^>]*>" + FOLDER, card)
    assert "than that of <b>teacher/model</b>" in before
    text = markdown(of_folder())
    table, _, rows = text.partition("Protocol:")
    assert "| teacher/model | 25 |" in table and FOLDER not in table and f"- teacher/model ({FOLDER}): " in rows
    assert report_json(of_folder())["rows"][0]["model"] == FOLDER


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["/a/b/c", "/a/d/c"], ["b/c", "d/c"]),
        (["/a/b/c", "/e/b/c", "/e/f/c"], ["/a/b/c", "/e/b/c", "f/c"]),
        (["org/name", "student", "b/c", "/a/b/c"], ["org/name", "student", "b/c", "/a/b/c"]),
    ],
)
def test_names_stay_distinct(names, expected):
    report = replace(full_report(), rows=[called(ROWS[5], name) for name in names])
    assert [row.model for row in with_short_names(report).rows] == expected


def test_raw_weights_guidance_and_the_earlier_report_are_still_told():
    raw, swept = called(ROWS[0], FOLDER, weights="raw"), called(ROWS[0], FOLDER, swept=True)
    earlier = replace(raw, model=f"night/run: {FOLDER}", beside=True)
    report = replace(full_report(), rows=[raw, swept, earlier, ROWS[5]])
    assert [row.label for row in with_short_names(report).rows] == [
        "teacher/model (raw)",
        "teacher/model (guidance 2)",
        "night/run: teacher/model (raw)",
        "student",
    ]


def test_the_student_is_short_wherever_it_stands():
    base, folder = full_report(), "/data/night/student/model"
    assert base.gaps and base.neighbours

    def named(row: Row) -> Row:
        return called(row, folder) if row.model == "student" else row

    report = replace(
        base,
        rows=[named(row) for row in ROWS],
        scores=[replace(curve, rows=[named(row) for row in curve.rows]) for curve in base.scores],
        gaps=replace(
            base.gaps,
            student=folder,
            distances={folder if name == "student" else name: far for name, far in base.gaps.distances.items()},
        ),
        neighbours=replace(base.neighbours, model=folder),
    )
    short = with_short_names(report)
    assert short.gaps and short.gaps.student in short.gaps.distances and short.gaps.student == "student/model"
    assert short.neighbours and short.neighbours.model == "student/model"
    assert {row.model for curve in short.scores for row in curve.rows} <= {"student/model", "2rf", "teacher", "direct"}


def test_a_report_without_paths_is_left_as_it_is():
    report = full_report()
    assert with_short_names(report) is report
