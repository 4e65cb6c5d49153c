"""The report's table: in which order its rows stand, how its figures read, and which of them are marked."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from instaflow.evaluation.chance import is_chance
from instaflow.evaluation.page import page
from instaflow.evaluation.ranking import ranking
from instaflow.evaluation.report import Report, Row
from tests.evaluation.example import SPREAD_ROWS, spread_report


def of(rows: list[Row]) -> Report:
    return replace(spread_report(), rows=rows)


def cells(report: Report) -> list[list[str]]:
    """The HTML of the table's cells, line by line, a heading over rows among the lines."""
    content = page(report).replace("\N{NO-BREAK SPACE}", " ")
    table = content[content.index('<table class="ranked') :]
    lines = re.findall("<tr.*?</tr>", table[: table.index("</table>")])
    return [re.findall("<t[dh][^>]*>(.*?)</t[dh]>", line) for line in lines]


def column(report: Report, title: str) -> list[str]:
    """A column's cells below its head, without the headings over rows."""
    head, *lines = cells(report)
    return [line[head.index(title)] for line in lines if len(line) == len(head)]


def names(report: Report) -> list[str]:
    return [re.sub("<svg.*?</svg>", "", cell) for cell in column(report, "Model")]


def ranks(rows: list[Row]) -> list[tuple[int | None, str, int]]:
    return [(one.rank, one.row.label, one.row.num_steps) for one in ranking(rows).rows]


def test_rows_of_one_step_stand_first_each_sort_by_its_rank():
    beside = replace(SPREAD_ROWS[5], model="night/student", beside=True, frechet_distance_real=0.35)
    lost = replace(SPREAD_ROWS[5], model="lost", frechet_distance_real=None)
    assert ranks([*SPREAD_ROWS[:6], lost, beside, SPREAD_ROWS[6]]) == [
        (1, "student", 1),
        (2, "night/student", 1),
        (3, "direct", 1),
        (4, "2rf", 1),
        (5, "teacher", 1),
        (None, "lost", 1),
        (1, "teacher", 25),
        (2, "2rf", 25),
        (3, "teacher", 4),
    ]


def test_rows_that_read_alike_share_a_rank():
    near = {"a": 0.31201, "b": 0.31199, "c": 0.3134}
    rows = [
        replace(SPREAD_ROWS[5], model=name, frechet_distance_real=value, intervals={}) for name, value in near.items()
    ]
    assert ranks([*rows, SPREAD_ROWS[6]]) == [(1, "b", 1), (1, "a", 1), (3, "c", 1), (4, "direct", 1)]


@pytest.mark.parametrize(
    ("missing", "first", "said"),
    [
        ([], "x", "Ranked by the Fréchet distance to the real images"),
        (["frechet_distance_real"], "y", "Ranked by the Fréchet distance to the teacher’s images"),
        (["frechet_distance_real", "frechet_distance_teacher"], "z", "Ranked by prompt accuracy"),
        (["frechet_distance_real", "frechet_distance_teacher", "prompt_accuracy"], "w", "Ranked by CLIP score"),
    ],
)
def test_what_ranks_is_the_first_figure_that_there_is(missing, first, said):
    figures = ("frechet_distance_real", "frechet_distance_teacher", "prompt_accuracy", "clip_score")
    good, bad = (0.1, 0.1, 0.9, 0.4), (0.2, 0.2, 0.8, 0.3)
    rows = [
        replace(
            SPREAD_ROWS[5],
            model=model,
            intervals={},
            **{
                name: None if name in missing else (good if model == best else bad)[place]
                for place, (name, best) in enumerate(zip(figures, "xyzw", strict=True))
            },
        )
        for model in "wzyx"
    ]
    found = ranking(rows)
    assert found.rows[0].row.model == first and [one.rank for one in found.rows] == [1, 2, 2, 2]
    assert found.explained == said and f"<h3>{said}</h3>" in page(of(rows))


def test_the_page_has_ranks_headings_and_each_row_its_name():
    report = spread_report()
    lines = cells(report)
    assert lines[0][:2] == ["Rank", "Model"]
    assert [line[0] for line in lines[1:]] == [
        *("<span>In one step</span>", "1", "2", "3", "4"),
        *("<span>In several steps, for scale</span>", "1", "2", "3"),
    ]
    assert names(report) == ["student", "direct", "2rf", "teacher", "teacher", "2rf", "teacher"]
    assert all("<svg" in cell for cell in column(report, "Model"))
    assert column(report, "S(Z)") == ["–", "–", "4.03", "36.9", "36.9", "4.03", "36.9"]
    assert column(report, "Fréchet distance to teacher")[4] == "itself"
    alone = of(SPREAD_ROWS[4:])
    assert [line[0] for line in cells(alone)[1:]] == ["1", "2", "3"]


def test_without_a_figure_to_rank_by_there_are_no_ranks():
    rows = [
        replace(one, frechet_distance_real=None, frechet_distance_teacher=None, prompt_accuracy=None)
        for one in SPREAD_ROWS
    ]
    assert cells(of(rows))[0][0] == "Model" and "Ranked by" not in page(of(rows))
    assert names(of(rows)) == ["teacher", "2rf", "student", "direct", "teacher", "teacher", "2rf"]


def test_figures_have_half_of_their_interval_below_and_in_the_charts():
    report = spread_report()
    real, accuracy = column(report, "Fréchet distance to real"), column(report, "Prompt accuracy")
    assert real[1] == "0.378<small>± 0.015</small>" and "<small>± 0.39</small>" in accuracy[0]
    assert ">99.25 %<" in accuracy[0]
    assert column(report, "Diversity")[0] == "0.3000<small>± 0.0045</small>"
    content = page(report).replace("\N{NO-BREAK SPACE}", " ")
    assert "<title>direct, 1 step: 0.378 ± 0.015</title>" in content
    assert "<title>direct, 1 step: 0.90 ± 0.42 %</title>" in content
    assert "±: half of the figure’s 95 % interval over prompts and noise" in content
    assert "±" not in page(of([replace(one, intervals={}) for one in SPREAD_ROWS]))


def test_the_reference_has_no_rank_by_its_distance_to_itself():
    """Nor is it the best of the one-step rows by that."""
    own = replace(SPREAD_ROWS[4], frechet_distance_teacher=0.0, pixel_gap=0.0, perceptual_gap=0.0)
    rows = [replace(one, frechet_distance_real=None) for one in [own, *SPREAD_ROWS[5:]]]
    assert ranks(rows) == [(1, "student", 1), (2, "direct", 1), (None, "2rf", 1)]
    assert column(of(rows), "Fréchet distance to teacher")[2] == "itself"
    assert column(of(rows), "Gap to teacher, pixels")[2] == "itself"
    assert 'class="best"' in column(of(rows), "Gap to teacher, pixels")[0]


def test_one_step_rows_not_told_apart_from_the_best_are_marked():
    def marks(rival: float, half: float | None) -> list[str]:
        intervals = {} if half is None else {"frechet_distance_real": half}
        other = replace(SPREAD_ROWS[6], frechet_distance_real=rival, intervals=intervals)
        found = column(of([*SPREAD_ROWS[:6], other]), "Fréchet distance to real")
        return [mark for cell in found for mark in re.findall('class="(best|near)"', cell)]

    # The student's is 0.312 ± 0.01248: with 0.03 on the other side the two are apart from 0.0325 on.
    assert marks(0.344, 0.03) == ["best", "near"]
    assert marks(0.345, 0.03) == ["best"]
    assert marks(0.325, None) == ["best"]  # one that tells no interval is taken as exact
    assert not any("class=" in cell for cell in column(spread_report(), "Prompt accuracy")[4:])  # of several steps
    assert "those not told apart from it are marked too" in page(spread_report())
    plain = of([replace(one, intervals={}) for one in SPREAD_ROWS])
    assert "the best of the one-step rows." in page(plain) and "not told apart" not in page(plain)


@pytest.mark.parametrize(
    ("figure", "title", "better", "worse"),
    [
        ("frechet_distance_real", "Fréchet distance to real", 0.2, 0.4),
        ("frechet_distance_teacher", "Fréchet distance to teacher", 0.2, 0.4),
        ("prompt_accuracy", "Prompt accuracy", 0.4, 0.2),
        ("prompt_accuracy_unseen", "on an unseen template", 0.4, 0.2),
        ("kernel_distance", "KID × 1,000", 0.2, 0.4),
        ("precision", "Precision", 0.4, 0.2),
        ("recall", "Recall", 0.4, 0.2),
        ("clip_score", "CLIP score", 0.4, 0.2),
        ("pixel_gap", "Gap to teacher, pixels", 0.2, 0.4),
        ("perceptual_gap", "Gap to teacher, perceptual", 0.2, 0.4),
    ],
)
def test_what_is_better_of_a_figure_is_marked(figure, title, better, worse):
    rows = [replace(SPREAD_ROWS[5], model=str(value), intervals={}, **{figure: value}) for value in (worse, better)]
    told = dict(zip(names(of(rows)), column(of(rows), title), strict=True))
    assert 'class="best"' in told[str(better)] and "class=" not in told[str(worse)]
    single = [rows[0], replace(rows[1], **{figure: None})]
    assert not any("class=" in cell for cell in column(of(single), title))  # nothing to be better than


def test_what_an_earlier_report_s_rows_lack_is_explained():
    words = "Rows of earlier reports bear those reports’ names; what was measured otherwise is left out."
    earlier = replace(SPREAD_ROWS[5], model="night/student", beside=True)
    assert words in page(of([*SPREAD_ROWS, earlier])) and words not in page(spread_report())


def test_kernel_distances_are_read_a_thousandfold():
    rows = [replace(SPREAD_ROWS[5], kernel_distance=0.00235)]
    assert column(of(rows), "KID × 1,000") == ["2.35"]


def test_two_figures_are_told_apart_beyond_both_intervals_or_image_by_image():
    def is_told_apart(a: Row, b: Row, figure: str) -> bool:
        return not is_chance(a, b, figure, same=0.0)

    rows = [
        replace(SPREAD_ROWS[5], clip_score=score, intervals={"clip_score": half}) for score, half in ((1, 3), (6, 4))
    ]
    assert not is_told_apart(*rows, "clip_score")
    assert is_told_apart(rows[0], replace(rows[1], clip_score=6.01), "clip_score")
    assert is_told_apart(*(replace(row, intervals={}) for row in rows), "clip_score")
    assert is_told_apart(rows[0], replace(rows[1], intervals={"clip_score": math.nan}), "clip_score")
    varied = np.linspace(0, 9, 100)  # much the same of both rows
    assert is_told_apart(*(replace(r, parts={"clip_score": varied + r.clip_score}) for r in rows), "clip_score")
