"""The comparison's page: its rows in order, what it says of differences, and that it spoils nothing."""

import math
import re
from collections import Counter
from dataclasses import replace

import pytest

from instaflow.evaluation.comparison import Comparison, compare
from instaflow.evaluation.comparison_page import comparison_page
from instaflow.evaluation.comparison_plot import dot_plot
from instaflow.evaluation.comparison_words import ends, headline
from tests.evaluation.example import full_report
from tests.evaluation.test_comparison import SEEDS, reports
from tests.evaluation.test_page import Reader, scopes


def names(content: str) -> list[str]:
    """The models of the ranking, in its order."""
    table = content[content.index("<table>") : content.index("</table>")]
    return re.findall(r'<span class="rank">[^<]*</span><svg.*?</svg>([^<]*)</td>', table)


def test_the_tables_heads_say_what_they_head():
    found = scopes(comparison_page(compare(reports(), "real")))
    assert len(found) > 8 and {*found} == {"col"}


@pytest.mark.parametrize("by", ["real", "teacher", "accuracy"])
def test_the_page_has_the_rows_in_ranked_order_and_asks_for_nothing_else(by):
    comparison = compare(reports(), by)
    content = comparison_page(comparison)
    reader = Reader(content)
    assert names(content) == [row.label for row in comparison.rows]
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in reader.tags}
    assert "//" not in content and "url(" not in content
    for part in ("seeds 0, 1, 3, 7", "run3 (seed 3)", "0.118", "2,000 prompts", "580,000", "3 degrees of freedom"):
        assert part in reader.text
    for row in comparison.one_step:  # each seed's dot
        assert all(f"{row.label}, seed {seed}: " in reader.text for seed in SEEDS)


def test_the_page_tells_what_is_ahead_and_what_is_not_told_apart():
    near = {3: 0.31, 0: 0.29, 7: 0.3, 1: 0.295}
    behind = {seed: value + 0.02 for seed, value in near.items()}
    behind[3] += 0.001
    rival = {3: 0.30, 0: 0.30, 7: 0.31, 1: 0.29}
    comparison = compare(reports(student=near, direct=rival, **{"2rf": behind}), "real")
    content = comparison_page(comparison)
    text = re.sub(r"\s+", " ", Reader(content).text)
    assert "student comes nearest to the real images in one step, at a Fréchet distance of 0.299 ± 0.014" in text
    assert "Not told apart from it: direct . It is ahead of 2rf by 0.02025 ± 0.00080, and of 1 more." in text
    assert "student is ahead of 2rf by 0.02025 ± 0.00080 (4 seeds)." in text
    assert "student and direct are not told apart: 0.001 ± 0.016 (4 seeds)." in text
    assert '<span class="best">0.299' in content and '<span class="near">0.300' in content
    assert '<span class="apart">0.02025<small>± 0.00080</small></span>' in content
    assert '<span class="same">0.001<small>± 0.016</small></span>' in content


def test_figures_that_are_missing_are_dashes_and_spoil_no_drawing():
    some = {3: 0.3, 0: math.nan, 7: 0.31, 1: 0.29}
    found = reports(student=some, direct=dict.fromkeys(SEEDS, math.inf), **{"2rf": {**dict.fromkeys(SEEDS), 3: 0.4}})
    content = comparison_page(compare(found, "real"))
    text = Reader(content).text
    assert not re.search(r"\b(nan|inf|None)\b", content)
    assert "–" in text and "(3 of 4 seeds)" in text


@pytest.mark.parametrize("keep", [lambda row: row.num_steps > 1, lambda row: row.model == "student"])
def test_rows_of_one_sort_make_a_page(keep):
    found = {place: replace(one, rows=[r for r in one.rows if keep(r)]) for place, one in reports().items()}
    comparison = compare(found, "real")
    content = comparison_page(comparison)
    assert names(content) == [row.label for row in comparison.rows]
    assert "Which differences hold" not in content and "for scale</td>" not in content


def test_a_row_far_off_keeps_the_others_apart():
    content = comparison_page(compare(reports(), "real"))
    assert re.search(r'text-anchor="end">6\.4\d* ± 0\.\d+</text>', content.replace("\N{NO-BREAK SPACE}", " "))
    assert not re.search(r"teacher, seed 3: 6\.", content)


def test_two_seeds_and_mixed_machines_are_said():
    found = reports((0, 1))
    found["run1"] = replace(found["run1"], hardware="a toaster", versions={"torch": "1.0"})
    text = Reader(comparison_page(compare(found, "real"))).text
    assert "Two seeds tell little" in text and "1 degree of freedom" in text
    assert "made on different hardware" in text and "different versions of torch." in text
    assert "Two seeds" not in Reader(comparison_page(compare(reports(), "real"))).text


def with_accuracies(values: list[float]) -> Comparison:
    """Seeds 0 to 2, the student with these prompt accuracies."""
    found = {}
    for seed, value in enumerate(values):
        base = full_report()
        rows = [replace(row, prompt_accuracy=value) if row.model == "student" else row for row in base.rows]
        found[f"run{seed}"] = replace(base, seed=seed, rows=rows)
    return compare(found, "accuracy")


def test_an_interval_of_a_share_ends_at_100_percent():
    comparison = with_accuracies([0.99, 0.995, 1.0])  # 0.995 ± 4.303 · 0.005 / √3
    content = comparison_page(comparison).replace("\N{NO-BREAK SPACE}", " ")
    assert '<span class="best">99.5 (98.3 to 100) %</span>' in content and "99.5 ± 1.2" not in content
    assert "ends at 0 or 100 %" in content
    student = next(row for row in comparison.rows if row.model == "student").figures["prompt_accuracy"]
    assert ends("prompt_accuracy", student) == pytest.approx([98.258, 100], abs=1e-3)
    assert ends("frechet_distance_real", student) == pytest.approx([0.98258, 1.00742], abs=1e-5)
    within = comparison_page(with_accuracies([0.90, 0.91, 0.92])).replace("\N{NO-BREAK SPACE}", " ")
    assert "91.0 ± 2.5 %" in within and "ends at 0 or 100 %" not in within
    same = comparison_page(with_accuracies([1.0, 1.0, 1.0])).replace("\N{NO-BREAK SPACE}", " ")
    assert '<span class="best">100 ± 0 %</span>' in same


def test_an_interval_that_goes_on_beyond_the_axis_ends_in_a_head():
    def heads(**figures) -> list[str]:
        """The side that each points to."""
        comparison = compare(reports(**figures), "real")
        plot = dot_plot(comparison, comparison.figure, Counter())
        bands = [[float(end) for end in band] for band in re.findall(r'class="band [^"]*" d="M(\S+) \S+H(\S+)"', plot)]
        assert all(0 < left < right < 440 for left, right in bands)  # within the plot
        drawn = re.findall(r'<path class="line [^"]*" d="M(\S+) \S+L(\S+) ', plot)
        edges = {"left": min(left for left, _ in bands), "right": max(right for _, right in bands)}
        sides = ["left" if float(tip) < float(end) else "right" for end, tip in drawn]
        assert all(float(tip) == edges[side] for side, (_, tip) in zip(sides, drawn, strict=True) if len(drawn) > 1)
        return sides

    spread = {seed: 0.4 + 0.02 * place for place, seed in enumerate(SEEDS)}
    assert heads(student=spread) == ["right"]  # the teacher, which is off the axis
    two = dict.fromkeys(SEEDS, math.nan) | {SEEDS[0]: 0.4, SEEDS[1]: 0.5}  # an interval of 12.7 times their deviation
    assert sorted(heads(student=two)) == ["left", "right", "right"]


def test_the_headline_counts_the_seeds_that_have_the_figure():
    student = dict.fromkeys(SEEDS, math.nan) | {SEEDS[0]: 0.20, SEEDS[1]: 0.21}
    assert f"(mean of 2 of {len(SEEDS)} seeds)." in headline(compare(reports(student=student), "real"))[0]
    assert f"(mean of {len(SEEDS)} seeds)." in headline(compare(reports(), "real"))[0]


def test_a_dash_for_straightness_is_explained():
    assert "of the others a dash" in comparison_page(compare(reports(), "real"))
    curved = {
        place: replace(one, rows=[row for row in one.rows if row.model in ("teacher", "2rf")])
        for place, one in reports().items()
    }
    assert "a dash" not in comparison_page(compare(curved, "real"))


def test_what_users_wrote_is_shown_and_never_run():
    evil = "<script>alert('1')</script>\"&"
    found = {
        place: replace(
            one,
            config=evil,
            hardware=evil,
            rows=[replace(r, model=evil + r.model, kind=evil) for r in one.rows],
            stages=[replace(s, name=evil + s.name, description=evil) for s in one.stages],
        )
        for place, one in reports().items()
    }
    content = comparison_page(compare({evil + place: one for place, one in found.items()}, "real"))
    assert "<script" not in content and evil in Reader(content).text


def test_nothing_to_rank_has_no_headline():
    found = {place: replace(one, rows=one.rows[:1]) for place, one in reports().items()}
    assert headline(compare(found, "real")) == []
