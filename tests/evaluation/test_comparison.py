"""Means, spreads, ranks and paired differences over seeds, against numpy's and scipy's own."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats

from instaflow.evaluation.comparison import (
    BETTER,
    Comparison,
    compare,
    comparison_json,
    paired,
    seedless,
    spread,
)
from instaflow.evaluation.report import Protocol, Report
from tests.evaluation.example import full_report

SEEDS = (3, 0, 7, 1)


def reports(seeds: tuple[int, ...] = SEEDS, **changes: dict[int, float | None]) -> dict[str, Report]:
    """The example report once a seed, with noise on its figures; changes: one-step model -> its distance by seed."""
    base = full_report()
    found = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        common = rng.normal(scale=0.05)  # what the seed changes in all rows
        rows = []
        for row in base.rows:
            real = (row.frechet_distance_real or 0) + common + rng.normal(scale=0.004)
            if row.num_steps == 1 and row.model in changes:
                real = changes[row.model][seed]
            rows.append(replace(row, frechet_distance_real=real, prompt_accuracy=0.98 + rng.normal(scale=0.003)))
        found[f"run{seed}"] = replace(base, seed=seed, rows=rows)
    return found


def row_of(comparison: Comparison, name: str):
    return next(row for row in comparison.rows if row.name == name)


@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_a_spread_is_that_of_the_textbook(count):
    values = np.random.default_rng(count).normal(0.3, 0.01, count)
    found = spread(dict(enumerate(values.tolist())))
    assert found.mean == pytest.approx(values.mean())
    assert found.standard_deviation == pytest.approx(np.std(values, ddof=1))
    assert found.standard_error == pytest.approx(scipy.stats.sem(values))
    low, high = scipy.stats.t.interval(0.95, count - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    assert (found.mean - found.interval, found.mean + found.interval) == pytest.approx((low, high))
    assert (found.minimum, found.maximum, found.count) == (values.min(), values.max(), count)


@pytest.mark.parametrize(("values", "count"), [([0.3, None, 0.4], 2), ([0.3, math.nan, math.inf], 1), ([None] * 3, 0)])
def test_figures_that_are_missing_or_not_finite_do_not_count(values, count):
    found = spread(dict(enumerate(values)))
    known = [value for value in values if value is not None and math.isfinite(value)]
    assert (found.count, found.values) == (count, known)
    assert found.mean == (pytest.approx(np.mean(known)) if known else None)
    assert (found.standard_deviation is None) == (found.interval is None) == (count < 2)
    assert not (found.count < 2 and found.is_told_apart)


def test_a_difference_is_paired_by_seed():
    """What a seed changes in all rows drowns the difference of the means, and is not in the paired one."""
    by_seed = {3: 0.50, 0: 0.30, 7: 0.41, 1: 0.22}
    shifted = {seed: value + 0.010 + 0.001 * place for place, (seed, value) in enumerate(by_seed.items())}
    comparison = compare(reports(student=by_seed, direct=shifted), "real")
    student, direct = row_of(comparison, "student"), row_of(comparison, "direct")
    pair = comparison.pair("frechet_distance_real", direct, student)
    assert (pair.ahead, pair.behind) == ("student", "direct")
    test = scipy.stats.ttest_rel([shifted[s] for s in by_seed], [by_seed[s] for s in by_seed])
    low, high = test.confidence_interval(0.95)
    difference = pair.difference
    assert (difference.mean - difference.interval, difference.mean + difference.interval) == pytest.approx((low, high))
    assert difference.mean == pytest.approx(0.0115) and difference.is_told_apart
    assert student.figures["frechet_distance_real"].interval > difference.mean  # the means alone would not tell


@pytest.mark.parametrize("offset", [0.0, 0.004, 0.008, 0.012])
def test_told_apart_is_a_p_value_below_5_percent(offset):
    noise = [0.006, -0.004, 0.003, -0.005]
    base = dict.fromkeys(SEEDS, 0.3)
    other = {seed: 0.3 + offset + error for seed, error in zip(SEEDS, noise, strict=True)}
    comparison = compare(reports(student=base, direct=other), "real")
    pair = comparison.pair("frechet_distance_real", row_of(comparison, "student"), row_of(comparison, "direct"))
    p = scipy.stats.ttest_1samp([other[s] - base[s] for s in SEEDS], 0).pvalue
    assert pair.difference.is_told_apart == (p < 0.05)


def test_a_pair_counts_the_seeds_that_both_have():
    some = {3: 0.30, 0: None, 7: 0.32, 1: 0.31}
    comparison = compare(reports(student=some, direct={3: 0.4, 0: 0.41, 7: None, 1: 0.43}), "real")
    pair = comparison.pair("frechet_distance_real", row_of(comparison, "student"), row_of(comparison, "direct"))
    assert pair.difference.by_seed == {1: pytest.approx(0.12), 3: pytest.approx(0.10)}
    nothing = compare(reports(student=dict.fromkeys(SEEDS), direct=some), "real")
    assert paired("frechet_distance_real", row_of(nothing, "student"), row_of(nothing, "direct")) is None


@pytest.mark.parametrize("figure", BETTER)
def test_by_every_figure_the_example_s_student_is_ahead_of_one_step_of_its_teacher(figure):
    """Its distances are smaller, and more of its images are what was asked for."""
    comparison = compare({f"run{seed}": replace(full_report(), seed=seed) for seed in SEEDS}, "real")
    pair = comparison.pair(figure, row_of(comparison, "teacher"), row_of(comparison, "student"))
    assert (pair.ahead, pair.behind) == ("student", "teacher") and pair.difference.mean > 0
    assert comparison.best(figure).name == "student"


@pytest.mark.parametrize("by", ["real", "teacher", "accuracy"])
def test_the_best_mean_comes_first_one_step_rows_before_the_others(by):
    comparison = compare(reports(), by)
    counts = [row.num_steps for row in comparison.rows]
    assert counts.index(25) == 4 and set(counts[:4]) == {1}
    for group in (comparison.rows[:4], comparison.rows[4:]):
        means = [row.figures[comparison.figure].mean for row in group if row.rank]
        assert means == sorted(means, reverse=by == "accuracy")
        assert [row.rank for row in group if row.rank] == list(range(1, len(means) + 1))


def test_ties_share_a_rank_and_rows_without_the_figure_have_none():
    same = {seed: 0.1 + seed / 100 for seed in SEEDS}
    tied = {"2rf": same, "student": same, "direct": dict.fromkeys(SEEDS, math.nan)}
    comparison = compare(reports(**tied), "real")
    ranks = {row.name: row.rank for row in comparison.one_step}
    assert ranks == {"2rf": 1, "student": 1, "teacher": 3, "direct": None}
    pair = comparison.pair("frechet_distance_real", row_of(comparison, "2rf"), row_of(comparison, "student"))
    assert (pair.difference.mean, pair.difference.interval, pair.difference.is_told_apart) == (0, 0, False)
    assert [row.name for row in comparison.not_told_apart("frechet_distance_real")] == ["student"]


def test_samples_after_the_teacher_are_counted_once_over_the_whole_way():
    comparison = compare(reports(), "real")
    found = {row.name: row.training_samples for row in comparison.rows if row.num_steps == 1}
    assert found == {"teacher": 0, "2rf": 320_000, "student": 580_000, "direct": 580_000}


def test_the_protocol_is_without_seed_and_hardware():
    card = Protocol(noise="keyed by seed 1 and 'evaluate'", timing="batches of 100, 2 CPU cores", samples="seed 11")
    report = replace(full_report(), seed=1, hardware="2 CPU cores", protocol=card)
    found = seedless(report)
    assert found.noise == "keyed by the run’s seed and 'evaluate'"
    assert (found.timing, found.samples) == ("batches of 100", "seed 11")


def test_the_file_is_strict_json_and_tells_all():
    comparison = compare(reports(direct=dict.fromkeys(SEEDS, math.inf)), "real")
    content = json.loads(json.dumps(comparison_json(comparison), allow_nan=False))
    assert [run["seed"] for run in content["runs"]] == sorted(SEEDS)
    assert [(row["rank"], row["model"]) for row in content["rows"]] == [(r.rank, r.model) for r in comparison.rows]
    student = next(row for row in content["rows"] if row["model"] == "student")["figures"]["frechet_distance_real"]
    values = [student["by_seed"][str(seed)] for seed in sorted(SEEDS)]
    assert student["mean"] == pytest.approx(np.mean(values))
    assert np.mean(student["interval_95"]) == pytest.approx(student["mean"])
    direct = next(row for row in content["rows"] if row["model"] == "direct")["figures"]["frechet_distance_real"]
    assert direct["mean"] is None and direct["interval_95"] is None and direct["count"] == 0
    names = {(pair["figure"], *sorted((pair["ahead"], pair["behind"]))) for pair in content["pairs"]}
    assert len(names) == len(content["pairs"]) == 6 * len(BETTER) - 3  # direct has no distance to real
    assert all(a <= b for a, b in pairwise(r.rank for r in comparison.one_step if r.rank))


def test_a_difference_below_zero_is_told_apart_as_one_above():
    values = {seed: 0.1 + 0.001 * seed for seed in range(4)}
    assert spread(values).is_told_apart
    assert spread({seed: -value for seed, value in values.items()}).is_told_apart
    assert not spread({seed: (-1) ** seed * value for seed, value in values.items()}).is_told_apart


def test_raw_rows_and_scales_of_guidance_are_rows_of_their_own():
    changed = {}
    for place, report in reports().items():
        student = next(row for row in report.rows if row.model == "student")
        raw = replace(student, weights="raw", frechet_distance_real=9.0)
        swept = [
            replace(student, swept=True, guidance_scale=scale, frechet_distance_real=scale) for scale in (5.0, 6.0)
        ]
        changed[place] = replace(report, rows=[*report.rows, raw, *swept])
    comparison = compare(changed, "real")
    assert row_of(comparison, "student").figures["frechet_distance_real"].mean < 1
    expected = {"student (raw)": 9, "student (guidance 5)": 5, "student (guidance 6)": 6}
    for name, value in expected.items():
        assert row_of(comparison, name).figures["frechet_distance_real"].mean == value


def test_a_pair_is_of_the_figure_that_was_asked_for():
    comparison = compare(reports(), "real")
    student, direct = (row_of(comparison, name) for name in ("student", "direct"))
    pairs = {figure: comparison.pair(figure, student, direct) for figure in BETTER}
    assert all(pair is None or pair.figure == figure for figure, pair in pairs.items())
    assert len([pair for pair in pairs.values() if pair]) > 1


@pytest.mark.parametrize("same", [True, False])
def test_figures_of_networks_that_each_seed_trained_are_left_out(same):
    found = {}
    for seed, (place, report) in enumerate(reports().items()):
        network = "one for all" if same else f"that of seed {seed}"
        found[place] = replace(report, rows=[replace(r, card={**r.card, "perceptual": network}) for r in report.rows])
    figures = row_of(compare(found, "real"), "student").figures
    assert figures["pixel_gap"].count == len(SEEDS)
    assert figures["perceptual_gap"].count == figures["diversity"].count == (len(SEEDS) if same else 0)
