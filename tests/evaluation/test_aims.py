"""What an experiment aimed at: the verdict follows the figures, of one report and of several seeds'."""

import json
import math
from dataclasses import replace

import pytest

from instaflow.evaluation.aims import outcome_json, outcomes, summary
from instaflow.evaluation.findings import result
from instaflow.evaluation.markdown import markdown
from instaflow.evaluation.page import page
from instaflow.evaluation.report import Report, report_json
from instaflow.evaluation.saved import read_report
from instaflow.sections import Aim
from tests.evaluation.example import full_report

REAL, TEACHER, ACCURACY = "frechet_distance_real", "frechet_distance_teacher", "prompt_accuracy"


def report(*aims: Aim, **figures: float | None) -> Report:
    """The example, its one-step student with these figures; its teacher has 0.271 and 99.55% in 25 steps."""
    base = full_report()
    rows = [replace(row, **figures) if row.label == "student" else row for row in base.rows]
    return replace(base, rows=rows, aims=aims)


def aim(figure: str = REAL, **bound: object) -> Aim:
    return Aim(model="student", num_steps=1, figure=figure, **bound)


@pytest.mark.parametrize(
    ("figure", "came", "bound", "reached"),
    [
        (REAL, 0.30, {"value": 0.30}, True),
        (REAL, 0.31, {"value": 0.30}, False),
        (ACCURACY, 0.99, {"value": 0.99}, True),
        (ACCURACY, 0.989, {"value": 0.99}, False),
        ("clip_score", 0.31, {"value": 0.30}, True),
        ("clip_score", 0.29, {"value": 0.30}, False),
        (REAL, 0.325, {"times_reference": 1.2}, True),  # 0.3252
        (REAL, 0.326, {"times_reference": 1.2}, False),
        (ACCURACY, 0.996, {"times_reference": 1.0}, True),
        (ACCURACY, 0.995, {"times_reference": 1.0}, False),
        (REAL, 0.377, {"better_than": "direct"}, True),  # 0.378
        (REAL, 0.378, {"better_than": "direct"}, False),  # as good is not better
        (TEACHER, 0.083, {"better_than": "direct"}, True),  # 0.084
        (ACCURACY, 0.992, {"better_than": "direct"}, True),  # 0.991
        (ACCURACY, 0.990, {"better_than": "direct"}, False),
    ],
)
def test_an_aim_is_reached_by_what_is_better_of_its_figure(figure, came, bound, reached):
    (found,) = outcomes({0: report(aim(figure, **bound), **{figure: came})})
    assert (found.is_reached, found.verdict) == (reached, "reached" if reached else "missed")


@pytest.mark.parametrize("missing", [{REAL: None}, {REAL: math.nan}])
def test_what_was_not_measured_is_neither_reached_nor_missed(missing):
    (found,) = outcomes({0: report(aim(value=1.0), **missing)})
    assert (found.is_reached, found.verdict, found.found) == (None, "not measured", "–")
    asked = "Fréchet distance to real of `student` in 1 step at most 1.00"
    assert summary([found]) == ["No aim is reached.", f"Not measured: {asked} (–)."]


def test_over_seeds_the_means_decide_and_pairs_tell_apart():
    seeds = {seed: report(aim(better_than="direct"), **{REAL: 0.378 - gain}) for seed, gain in enumerate((0.1, 0.11))}
    (found,) = outcomes(seeds)
    assert found.verdict == "reached"
    assert found.short.mean == pytest.approx(-0.105)
    assert found.found == "0.273 against 0.378, apart by 0.105 ± 0.064".replace(" ±", "\xa0±").replace("± ", "±\xa0")
    seeds[2] = report(aim(better_than="direct"), **{REAL: 0.378 + 0.15})
    (found,) = outcomes(seeds)
    assert found.verdict == "reached, not told apart"  # by 0.02 in the mean, of a deviation of 0.15
    assert summary([found]) == ["The aim is reached, not told apart from chance."]
    assert summary([found, found, *outcomes({0: report(aim(value=1.0))})]) == [
        "All 3 aims are reached, 2 of them not told apart from chance."
    ]
    seeds[2] = report(aim(better_than="direct"), **{REAL: 0.378 + 0.3})
    assert outcomes(seeds)[0].verdict == "missed, not told apart"


@pytest.mark.parametrize(
    ("half", "student", "verdict"),
    [
        (0.01, 0.35, "reached"),
        (0.03, 0.35, "reached, not told apart"),  # 0.028 apart, and 0.042 by chance
        (0.03, 0.40, "missed, not told apart"),
        (0.01, 0.40, "missed"),
        (None, 0.377, "reached"),
    ],
)
def test_of_one_report_prompts_and_noise_tell_apart(half, student, verdict):
    one = report(aim(better_than="direct"), aim(value=0.5), **{REAL: student})
    intervals = {} if half is None else {REAL: half}
    one = replace(one, rows=[replace(row, intervals=intervals) for row in one.rows])
    found, bound = outcomes({0: one})
    assert (found.verdict, bound.verdict) == (verdict, "reached")
    assert (half is None) == ("±" not in found.found) and "±" not in bound.found
    bare = [replace(row, intervals={} if row.label == "direct" else row.intervals) for row in one.rows]
    assert outcomes({0: replace(one, rows=bare)})[0].chance is None
    both = outcomes(dict.fromkeys((0, 1), one))[0]  # of two seeds, theirs tells
    assert both.apart == 0 and both.verdict == verdict.split(",")[0]


def test_a_multiple_is_of_the_reference_of_each_seed():
    seeds = {0: report(aim(times_reference=1.2), **{REAL: 0.3})}
    teacher = [replace(row, **{REAL: 0.1}) if row.num_steps == 25 else row for row in seeds[0].rows]
    seeds[1] = replace(seeds[0], rows=teacher)
    (found,) = outcomes(seeds)
    assert found.bound.by_seed == {0: pytest.approx(1.2 * 0.271), 1: pytest.approx(0.12)}
    assert found.verdict == "missed"
    assert found.asked == (
        "Fréchet distance to real of `student` in 1 step at most 1.2 times that of `teacher` in 25 steps"
    )
    assert found.found == "0.300, 1.62 times"  # of 0.1855, the mean


def test_the_average_counts_and_of_a_sweep_the_best_scale():
    base = report(aim(value=0.3), **{REAL: 0.31})
    (student,) = [row for row in base.rows if row.label == "student"]
    raw = replace(student, weights="raw", **{REAL: 0.1})
    assert outcomes({0: replace(base, rows=[*base.rows, raw])})[0].verdict == "missed"
    beside = replace(student, beside=True, **{REAL: 0.1})
    assert outcomes({0: replace(base, rows=[*base.rows, beside])})[0].verdict == "missed"
    other = replace(student, guidance_scale=2.0, swept=True, **{REAL: 0.29})
    assert outcomes({0: replace(base, rows=[*base.rows, other])})[0].came.mean == 0.29


def test_the_page_is_about_the_model_of_its_first_aim():
    base = full_report()
    assert result(base).label == "student"
    first = Aim(model="direct", num_steps=1, figure=REAL, value=1.0)
    about = result(replace(base, aims=[first, aim(value=1.0)]))
    assert (about.label, about.num_steps) == ("direct", 1)


def test_page_markdown_and_file_tell_the_aims(tmp_path):
    aims = (aim(value=0.2, source="table <2>"), aim(ACCURACY, value=0.99))
    own = report(*aims, **{REAL: 0.312, ACCURACY: 0.9925})
    shown = page(own)
    assert "<h2>What was aimed at</h2>" in shown
    line = "Fréchet distance to real of <b>student</b> in 1 step at most 0.200 (table &lt;2&gt;)"
    assert f"<dt>{line}</dt><dd><b>missed</b> · 0.312</dd>" in shown
    assert f"1 of 2 aims is reached. Missed: {line} (0.312)." in shown
    assert "of student in 1 step at least 99.0 %: reached (99.2 %)" in markdown(own).replace("`", "").replace(
        "\xa0", " "
    )
    assert "What was aimed at" not in page(full_report())
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report_json(own)))
    assert tuple(read_report(file).aims) == aims


def test_an_outcome_is_strict_json():
    (found,) = outcomes({0: report(aim(better_than="direct"), **{REAL: None})})
    content = outcome_json(found)
    json.dumps(content, allow_nan=False)
    assert content["reached"] is None and content["better_than"] == "direct" and "`" not in content["asked"]
