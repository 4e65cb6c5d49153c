"""Scores over a training: which make up a curve, and how the pages show them."""

import json
import re
from dataclasses import asdict, replace

from instaflow.evaluation.card import Card
from instaflow.evaluation.page import page, score_rules
from instaflow.evaluation.report import report_json
from instaflow.evaluation.scores import FILE, WATCH, curve_of, score_curves, scored, training_of
from instaflow.evaluation.watch_page import watch_page
from instaflow.files import write_json
from instaflow.rundir import append_stats
from tests.evaluation.example import ROWS, SPREAD_ROWS, full_report, row

CARD = Card(
    model="student",
    model_content="finished",
    weights="ema",
    num_steps=1,
    guidance_scale=1.0,
    sampler="DDIMScheduler",
    protocol="digits",
    num_samples=2000,
    prompts="2,000 prompts",
    seed=0,
    noise="Philox",
    dtype="float32",
    image_size="32×32",
    image_encoding="none",
    features="64 pixels",
    reference="1,797 digits",
    batch_size=250,
    processes=1,
    hardware="two cores",
)


def test_a_curve_is_of_one_training_and_one_protocol(tmp_path):
    assert training_of(tmp_path / "student") is None and curve_of(tmp_path, CARD) is None
    (tmp_path / "student").mkdir()
    write_json(tmp_path / "student" / "stage.json", {"identity": {"seed": 0}})
    own = curve_of(tmp_path, CARD)
    assert own == curve_of(tmp_path, replace(CARD, model_content="other", processes=8))
    others = [replace(CARD, **change) for change in ({"num_steps": 4}, {"num_samples": 9}, {"weights": "raw"})]
    assert len({own, *(curve_of(tmp_path, card) for card in others)}) == 4
    write_json(tmp_path / "student" / "stage.json", {"identity": {"seed": 1}})
    assert curve_of(tmp_path, CARD) != own

    (tmp_path / "report" / WATCH).mkdir(parents=True)
    for curve, seen, distance in ((own, 64, 0.5), ("other", 32, 9.0), (own, 32, 0.7)):
        line = {**asdict(row("student", 1, distance, None, 0.9)), "samples_seen": seen, "curve": curve, "at": "noon"}
        append_stats(tmp_path / "report" / WATCH / FILE, line)
    append_stats(tmp_path / "report" / WATCH / FILE, {"samples_seen": 96})  # of no curve
    with open(tmp_path / "report" / WATCH / FILE, "a") as file:
        file.write('{"samples_seen": 128, "cu')  # a kill cut it short
    (found,) = score_curves(tmp_path / "report", [own, None, "missing"], None)
    assert (found.samples_seen, [one.frechet_distance_real for one in found.rows]) == ([32, 64], [0.7, 0.5])
    assert found.label == "student"


def test_a_curve_has_one_reference_and_no_distance_to_one_that_is_not_told(tmp_path):
    (tmp_path / WATCH).mkdir()
    teacher = replace(CARD, model="teacher", model_content="a", num_steps=25)
    retrained, finer = replace(teacher, model_content="b"), replace(teacher, num_steps=50)
    scored_beside = [(teacher.subject(), 32), (retrained.subject(), 64), (finer.subject(), 96), (None, 128)]
    for reference, seen in scored_beside:
        line = {**asdict(row("student", 1, 0.5, 0.01 * seen, 0.9)), "samples_seen": seen, "curve": "one"}
        append_stats(tmp_path / WATCH / FILE, {**line, "reference": reference})
    earlier = {**asdict(row("student", 1, 0.4, 0.1, 0.9)), "samples_seen": 160, "curve": "one"}
    append_stats(tmp_path / WATCH / FILE, {key: value for key, value in earlier.items() if key != "card"})

    def to_teacher(reference: Card | None) -> dict[int, float | None]:
        return {seen: one.frechet_distance_teacher for seen, one in scored(tmp_path, "one", reference).items()}

    assert to_teacher(teacher) == {32: 0.32, 128: None, 160: None}
    assert to_teacher(replace(retrained, model="renamed", batch_size=9)) == {64: 0.64, 128: None, 160: None}
    assert to_teacher(finer) == {96: 0.96, 128: None, 160: None}
    assert to_teacher(None) == dict.fromkeys((32, 64, 96, 128, 160))
    found = scored(tmp_path, "one", teacher)
    assert found[32].card["dtype"] == "float32" and found[160].card == {}


def test_scores_have_their_cards_on_demand():
    report = full_report()
    own = [
        replace(
            one, card={**one.card, "hardware": name, "batch_size": 250, "processes": 2, "versions": {"torch": name[-1]}}
        )
        for one, name in zip(report.scores[0].rows, ("card 1", "card 2"), strict=True)
    ]
    report = replace(report, scores=[replace(report.scores[0], rows=own)])
    for shown in (page(report), watch_page(replace(report, rows=ROWS[:1]), [], "noon")):
        cards = shown[shown.index("<summary>The cards of these scores") :]
        cards = cards[: cards.index("</details>")]
        for number in (1, 2):
            assert f"<dd>card {number}; batches of 250; processes: 2; torch {number}</dd>" in cards
    untold = replace(report, scores=[replace(report.scores[0], rows=[replace(one, card={}) for one in own])])
    assert "The cards of these scores" not in page(untold)


def test_the_report_draws_scores_with_what_to_compare_them(tmp_path):
    report = full_report()
    assert [name for name, _ in score_rules(report)] == ["teacher, 25 steps", "student in the end"]
    shown = page(report)
    part = shown[shown.index("<h3>Score over training</h3>") : shown.index("<h3>Checks before")]
    assert part.count("<svg viewBox") == 3 + 1  # distances, prompts drawn right, and the legend's sign
    assert "student at 1,280 samples: 0.466" in part and "student at 640 samples: 95.1" in part
    assert part.count("student at 1,280") == 2  # nobody read its prompts
    assert "Score over training" not in page(replace(report, scores=[]))


def test_a_watch_s_page_has_each_score_and_stands_alone():
    report = replace(full_report(), rows=ROWS[:1])
    shown = watch_page(report, ["`student` after 1,280 of 5,000 training samples."], "2026-11-26 12:00:00 UTC")
    assert "<b>student</b> after 1,280 of 5,000" in shown and "12:00:00" in shown
    table = shown[shown.index("Every score") :]
    cells = re.findall("<td>([^<]*)<", table[: table.index("</tbody>")])
    assert {"640", "1,280", "0.702", "0.466", "0.271"} <= {*cells}
    assert "±" not in shown
    spread = watch_page(replace(report, rows=SPREAD_ROWS[:1]), [], "noon")
    assert "<td>0.271<small>± 0.011</small></td>" in spread and "half of the figure’s 95" in spread
    assert "src=" not in shown and "<script" not in shown
    early = watch_page(replace(report, scores=[], rows=[]), ["`student` has no score yet."], "noon")
    assert "Score over training" not in early and "Every score" not in early


def test_scores_are_in_the_report_s_json():
    (curve,) = json.loads(json.dumps(report_json(full_report())))["scores"]
    assert curve["samples_seen"] == [640, 1280] and curve["rows"][1]["frechet_distance_real"] == 0.466
