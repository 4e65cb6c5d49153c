"""The report as Markdown: rows as the page ranks them, their intervals, what each one was."""

from dataclasses import replace

from instaflow.evaluation.markdown import markdown
from instaflow.evaluation.report import Report
from tests.evaluation.example import ROWS, SPREAD_ROWS, spread_report


def table(report: Report) -> list[list[str]]:
    """The cells, the head's first."""
    lines = [line for line in markdown(report).splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in (lines[0], *lines[2:])]


def test_the_rows_stand_by_rank_those_of_one_step_first():
    head, *rows = table(spread_report())
    assert head[:4] == ["rank", "model", "steps", "guidance"]
    assert [cells[:3] for cells in rows] == [
        ["1", "student", "1"],
        ["2", "direct", "1"],
        ["3", "2rf", "1"],
        ["4", "teacher", "1"],
        ["1", "teacher", "25"],
        ["2", "2rf", "25"],
        ["3", "teacher", "4"],
    ]
    text = markdown(spread_report())
    assert "Ranked by the Fréchet distance to the real images; the rows of one step first, then the others" in text
    assert "then the others" not in markdown(replace(spread_report(), rows=SPREAD_ROWS[4:]))


def test_figures_have_their_intervals():
    head, student, *_ = table(spread_report())
    told = dict(zip(head, student, strict=True))
    assert told["Fréchet distance to real"] == "0.312 ± 0.012"
    assert told["drawn right"] == "99.25 ± 0.39 %"
    assert "±: half of the figure’s 95 % interval over prompts and noise" in markdown(spread_report())
    assert "±" not in markdown(replace(spread_report(), rows=[replace(one, intervals={}) for one in SPREAD_ROWS]))


def test_the_reference_is_no_distance_from_itself():
    reference = replace(ROWS[0], frechet_distance_teacher=0.0, pixel_gap=0.0, intervals={"pixel_gap": 0.0})
    head, *lines = table(replace(spread_report(), rows=[reference, *SPREAD_ROWS[1:]]))
    told = [dict(zip(head, line, strict=True)) for line in lines]
    [own] = [line for line in told if line["model"] == "teacher" and line["steps"] == "25"]
    assert own["to teacher"] == own["gap to teacher, pixels"] == "itself"
    assert sum("itself" in line.values() for line in told) == 1


def test_the_card_and_what_each_row_was():
    rows = [replace(one, card={**one.card, "sampler": f"Scheduler{one.num_steps}"}) for one in SPREAD_ROWS]
    rows[-1] = replace(rows[-1], card={**rows[-1].card, "hardware": "a GPU", "versions": {"torch": "2.9"}})
    lines = markdown(replace(spread_report(), rows=rows)).splitlines()
    assert lines[0] == "# One-step digits"
    assert "- num samples: 2000" in lines and "- dtype: float32" in lines
    assert "- direct, 1 step: a GPU; batches of 100; processes: 1; torch 2.9" in lines
    [others] = [line for line in lines if line.endswith(": 2 CPU cores; batches of 100; processes: 1; torch 2.15.0")]
    assert others.startswith("- student, 1 step; 2rf, 1 step; teacher, 1 step; ")
    told = [line for line in lines if "content 0123456789abcdef" in line]
    assert len(told) == len(SPREAD_ROWS)
    assert told[4].startswith("- teacher: content 0123456789abcdef, weights ema, steps 25, guidance 2, ")
    assert "scheduler Scheduler25, precision float32" in told[4]
    assert (
        "- Made on: 2 CPU cores; batches of 100; processes: 1; torch 2.15.0" in markdown(spread_report()).splitlines()
    )
    assert "Protocol" not in markdown(replace(spread_report(), rows=[replace(one, card={}) for one in SPREAD_ROWS]))


def test_no_name_breaks_the_table():
    rows = [replace(SPREAD_ROWS[0], model="a|b\nc"), *SPREAD_ROWS[1:]]
    names = [line for line in markdown(replace(spread_report(), rows=rows)).splitlines() if line.startswith("| ")]
    assert len(names) == 2 + len(rows) and sum("a\\|b c" in line for line in names) == 1


def test_a_column_without_a_figure_is_left_out():
    head, *_ = table(replace(spread_report(), rows=[replace(one, prompt_accuracy=None) for one in SPREAD_ROWS]))
    assert "drawn right" in table(spread_report())[0] and "drawn right" not in head
    nothing = {"frechet_distance_real": None, "frechet_distance_teacher": None, "prompt_accuracy": None}
    unranked = replace(spread_report(), rows=[replace(one, **nothing) for one in SPREAD_ROWS])
    assert table(unranked)[0][0] == "model" and "Ranked" not in markdown(unranked)
