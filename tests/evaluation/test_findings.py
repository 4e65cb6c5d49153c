from dataclasses import replace

import numpy as np
import pytest

from instaflow.evaluation import findings
from instaflow.evaluation.chance import interval_of_difference, is_chance, order
from instaflow.evaluation.markdown import markdown
from instaflow.evaluation.page import page
from instaflow.evaluation.ranking import ranking
from instaflow.evaluation.report import Row, Stage
from instaflow.evaluation.wording import number
from instaflow.sections import Aim
from tests.evaluation.example import ROWS, full_report, with_distance
from tests.evaluation.test_page import Reader


def told(sentences: list[str]) -> str:
    return " ".join(sentences).replace("\N{NO-BREAK SPACE}", " ")


def changed(model: str, num_steps: int, **figures) -> list[Row]:
    return [replace(row, **figures) if (row.model, row.num_steps) == (model, num_steps) else row for row in ROWS]


@pytest.mark.parametrize(
    ("student", "verdict"),
    [
        (0.312, "`student` is the nearer, so here reflow helps"),
        (0.37, "the same within 5%, so here reflow makes no difference"),
        (0.5, "`direct` is the nearer, so here reflow before distillation does not help"),
    ],
)
def test_the_control_speaks_for_whichever_is_nearer(student, verdict):
    text = told(findings.control(with_distance("student", student)))
    assert f"{student:.3f} for `student`, 0.378 for `direct`; {verdict}" in text
    assert sum(word in text for word in ("`student` is the nearer", "`direct` is the nearer", "the same within")) == 1


def with_halved(real: float):
    """The report with a model of progressive distillation beside the others."""
    report = full_report()
    row = replace(ROWS[-1], model="halved", kind="progressive", frechet_distance_real=real)
    stage = Stage(name="halved", kind="distill", method="progressive", parents=["teacher", "pairs"], samples=580_000)
    return replace(report, rows=[*report.rows, row], stages=[*report.stages, stage])


@pytest.mark.parametrize(
    ("halved", "verdict"),
    [
        (0.4, "`student` is the nearer, so here training on couplings leads further"),
        (0.32, "the same within 5%, so here both roads lead as far"),
        (0.2, "`halved` is the nearer, so here halving the steps leads further"),
    ],
)
def test_progressive_distillation_is_compared_with_the_student(halved, verdict):
    report = with_halved(halved)
    text = told(findings.progressive(report))
    assert f"0.312 for `student`, {number(halved)} for `halved`; {verdict}." in text
    assert "580,000 and 580,000." in text and "`direct`" not in text
    assert findings.result(report).model == "student" and findings.control(report) == findings.control(full_report())
    assert "Another road: progressive distillation" in page(report) and "Another road" not in page(full_report())
    assert findings.progressive(full_report()) == []


@pytest.mark.parametrize(
    ("matched", "verdict"),
    [
        (0.4, "`student` is the nearer, so here training on couplings alone leads further"),
        (0.32, "the same within 5%, so here both roads lead as far"),
        (0.2, "`matched` is the nearer, so here matching distributions leads further"),
    ],
)
def test_distribution_matching_is_compared_with_the_student(matched, verdict):
    report = full_report()
    row = replace(ROWS[-1], model="matched", kind="dmd", frechet_distance_real=matched)
    stage = Stage(name="matched", kind="distill", method="dmd", parents=["teacher", "pairs"], samples=580_000)
    report = replace(report, rows=[*report.rows, row], stages=[*report.stages, stage])
    text = told(findings.dmd(report))
    assert f"0.312 for `student`, {number(matched)} for `matched`; {verdict}." in text
    assert findings.result(report).model == "student" and findings.dmd(full_report()) == []
    assert "Another road: distribution matching" in page(report)
    alone = replace(report, rows=[row for row in report.rows if row.kind not in ("student", "flow")])
    assert findings.result(alone).model == "matched" and "for `direct`" in told(findings.dmd(alone))


def with_intervals(half: float, figure: str = "frechet_distance_real", **figures):
    """The report with one interval of a figure in every row, and other figures of the student."""
    rows = [replace(row, intervals={figure: half}) for row in changed("student", 1, **figures)]
    return replace(full_report(), rows=rows)


def test_a_small_difference_of_accuracies_is_called_chance_and_a_large_one_is_not():
    text = told(findings.control(with_intervals(0.004, "prompt_accuracy")))
    assert "99.2 % and 99.1 %; a difference that 2,000 samples cannot tell from chance." in text
    worse = with_intervals(0.004, "prompt_accuracy", prompt_accuracy=0.96)
    assert "96.0 % and 99.1 %; `direct` is the better." in told(findings.control(worse))
    assert "99.1 % and 99.1 %; the same." in told(findings.control(with_intervals(0.004, prompt_accuracy=0.9910)))


CHANCE = "a difference that 2,000 samples cannot tell from chance."


@pytest.mark.parametrize(
    ("half", "student", "verdict"),
    [
        (0.04, 0.312, "`student` is the nearer, so here reflow helps the one-step model."),
        (0.05, 0.312, CHANCE),  # 0.066 apart, 0.071 by chance
        (0.001, 0.37, "the same within 5%, so here reflow makes no difference to the one-step model."),
        (0.03, 0.37, CHANCE),  # within 5 %, but chance may hide more
        (0.004, 0.376, "the same within 5%, so here reflow makes no difference to the one-step model."),
        (0.03, 0.5, "`direct` is the nearer, so here reflow before distillation does not help."),
    ],
)
def test_what_chance_may_have_made_is_no_finding(half, student, verdict):
    text = told(findings.control(with_intervals(half, frechet_distance_real=student)))
    assert f"for `student`, 0.378 for `direct`; {verdict} " in text


def test_rows_of_the_same_noise_are_compared_image_by_image():
    """What both share is in no difference: their own intervals would hide it."""
    rng = np.random.default_rng(0)
    shared, own = 10 * rng.standard_normal(400), 0.1 * rng.standard_normal((2, 400))
    near, far = ({"frechet_distance_real": shared + mine} for mine in own)
    intervals = {"frechet_distance_real": 1.0}
    a = replace(ROWS[4], frechet_distance_real=0.5, intervals=intervals)
    b = replace(ROWS[5], frechet_distance_real=0.6, intervals=intervals)
    assert is_chance(a, b) and order(a, b) == 0
    assert interval_of_difference(a, b, "frechet_distance_real") == pytest.approx(2**0.5)
    a, b = replace(a, parts=near), replace(b, parts=far)
    assert interval_of_difference(a, b, "frechet_distance_real") == pytest.approx(0.0139, rel=0.1)
    assert not is_chance(a, b) and order(a, b) == -1
    bare = replace(ROWS[5], frechet_distance_real=0.6, intervals={"frechet_distance_real": None})  # as JSON may hold it
    assert interval_of_difference(a, bare, "frechet_distance_real") == 1.0
    fewer = replace(b, parts={"frechet_distance_real": far["frechet_distance_real"][:10]})
    assert is_chance(a, fewer)  # those are not of the same prompts


def test_of_a_single_prompt_nothing_is_told():
    rows = [replace(row, parts={"diversity": np.ones(1)}) for row in changed("student", 1, diversity=0.1)]
    [said] = findings.diversity(replace(full_report(), rows=rows))
    assert said.endswith("; a difference that so few prompts cannot tell from chance.")


def test_the_nearest_of_all_is_told_with_those_that_chance_may_have_put_behind():
    rows = [replace(row, intervals={"frechet_distance_real": 0.05}) for row in changed("student", 1)]
    near = [replace(rows[5], model=name, frechet_distance_real=real) for name, real in (("a", 0.33), ("b", 0.30))]
    report = replace(full_report(), rows=[*[replace(row, frechet_distance_real=0.9) for row in rows], *near])
    report = replace(report, aims=[Aim(model="student", figure="frechet_distance_real", value=1.0)])
    assert "Of the models made for few steps `b` comes nearest in one step, not told apart from `a`: 0.300." in told(
        findings.headline(report)
    )
    exact = replace(report, rows=[replace(row, intervals={}) for row in report.rows])
    assert "`b` comes nearest in one step: 0.300." in told(findings.headline(exact))


def test_every_verdict_on_distances_minds_chance():
    wide = with_intervals(9.0, frechet_distance_real=0.7)
    wide = replace(wide, rows=[*wide.rows, replace(wide.rows[5], weights="raw", frechet_distance_real=0.1)])
    flows = findings.reflow(wide)
    assert f"With many steps: 0.341 for `2rf` at 25 steps, 0.271 for `teacher`; {CHANCE}" in flows
    for part in (findings.few_steps, findings.distillation, findings.averaging):
        [said] = part(wide)
        assert said.endswith(f"; {CHANCE}"), part
    assert "comes nearest" not in told(findings.headline(wide))
    assert "comes nearest" in told(findings.headline(with_intervals(0.0, frechet_distance_real=0.7)))
    assert flows[1].endswith(f"6.41 for `teacher`, 0.523 for `2rf`; {CHANCE}")


def test_the_control_states_both_budgets_and_whom_they_favour():
    report = full_report()
    text = told(findings.control(report))
    assert "580,000 and 580,000." in text
    assert "3 min 27 s and 3 min 00 s" in text  # 41 + 78 + 22 + 66, and 41 + 139
    stages = [replace(s, samples=400_000) if s.name == "direct" else s for s in report.stages]
    assert "580,000 and 400,000, which favours `student`." in told(findings.control(replace(report, stages=stages)))


def test_the_headline_gives_the_result_its_teacher_and_the_speed():
    text = told(findings.headline(full_report()))
    assert "`student`, made from the diffusion model `teacher`, draws an image in one step, at" in text
    assert "at a Fréchet distance of 0.312 from the real images; `teacher` reaches" in text
    assert "`teacher` reaches 0.271 in 25 steps and 6.41 in one step." in text
    assert "99.2 % of prompts are drawn right (`teacher`: 99.6 %)." in text
    assert "An image takes 2.70 ms; `teacher` at 25 steps takes about 25 times as long." in text


def test_without_real_images_the_distance_to_the_teacher_is_named_as_such():
    rows = [replace(row, frechet_distance_real=None) for row in ROWS]
    text = told(findings.headline(replace(full_report(), rows=rows)))
    assert "0.0710 from the teacher’s images." in text


@pytest.mark.parametrize(
    ("flow", "verdict"),
    [(0.03, "the paths are straighter"), (0.28, "as straight as before"), (0.4, "no straighter: reflow missed")],
)
def test_reflow_is_said_to_straighten_only_if_it_did(flow, verdict):
    rows = [replace(row, straightness_relative=flow) if row.model == "2rf" else row for row in ROWS]
    assert verdict in told(findings.reflow(replace(full_report(), rows=rows)))
    for half, chance in ((0.2, True), (0.001, False)):
        few = [replace(row, intervals={"straightness_relative": half}) for row in rows]
        text = told(findings.reflow(replace(full_report(), rows=few)))
        assert ("a difference that so few paths cannot tell from chance." in text) == chance == (verdict not in text)


@pytest.mark.parametrize(
    ("at_25_steps", "verdict"),
    [
        (0.2, "the flow is even the nearer one"),
        (0.272, "reflow cost nothing there"),
        (0.9, "falls short of its teacher"),
    ],
)
def test_reflow_states_its_price_at_many_steps(at_25_steps, verdict):
    rows = changed("2rf", 25, frechet_distance_real=at_25_steps)
    assert verdict in told(findings.reflow(replace(full_report(), rows=rows)))


@pytest.mark.parametrize(
    ("student", "verdict"),
    [
        (0.261, "brings it 2.0 times nearer"),
        (0.4, "brings it 24 % nearer"),
        (0.52, "changes it by less than 5%"),
        (0.7, "makes it worse here"),
    ],
)
def test_distillation_is_judged_against_one_step_of_the_flow(student, verdict):
    assert f"distillation {verdict}" in told(findings.distillation(with_distance("student", student)))


def test_a_student_is_compared_with_the_flow_it_came_from_and_not_with_a_better_one():
    third = [replace(row, model="3rf", frechet_distance_real=0.2) for row in ROWS if row.model == "2rf"]
    report = replace(full_report(), rows=[*third, *ROWS])
    assert "0.523 for `2rf`, 0.312 for `student`" in told(findings.distillation(report))
    assert "`3rf`" not in told(findings.reflow(report))


def test_what_is_said_is_not_of_an_earlier_report_s_rows():
    report = full_report()
    far = {"frechet_distance_real": 0.01, "frechet_distance_teacher": None, "beside": True}
    rows = [replace(row, model=f"run/{row.model}", **far) for row in ROWS]
    both = replace(report, rows=[*rows, *report.rows, *rows])
    assert findings.headline(both) == findings.headline(report) and findings.reference(both) == ROWS[0]
    assert findings.best_in_one_step(both).model == "student" and findings.result(both) == findings.result(report)
    assert "run/student" in page(both)  # shown they are


def test_the_reference_is_the_teacher_without_a_distance_to_itself():
    for own in (None, 0.0):
        rows = [replace(ROWS[1], frechet_distance_teacher=own), replace(ROWS[0], frechet_distance_teacher=0.5)]
        assert findings.reference(replace(full_report(), rows=rows)).num_steps == 4


def test_of_a_sweep_the_reference_s_own_guidance_is_told():
    swept = [replace(row, swept=True) for row in ROWS if row.model == "teacher"]
    other = [replace(row, guidance_scale=6.0, frechet_distance_real=9.99) for row in swept]
    text = told(findings.headline(replace(full_report(), rows=[*swept, *other, *ROWS[3:]])))
    assert "reaches 0.271 in 25 steps and 6.41 in one step" in text and "9.99" not in text
    raw = [replace(row, weights="raw", frechet_distance_real=0.28) for row in swept[:1]]
    [said] = findings.averaging(replace(full_report(), rows=[*other, *swept, *raw]))
    assert "0.271 with the moving average" in said


def test_of_a_sweep_one_step_is_told_at_the_reference_s_guidance():
    swept = [replace(row, swept=True) for row in ROWS if row.model == "teacher"]
    nearer = [
        replace(row, guidance_scale=1.0, frechet_distance_real=0.9, frechet_distance_teacher=9.9) for row in swept
    ]
    report = replace(full_report(), rows=[*nearer, *swept, *ROWS[3:]])
    assert told(findings.few_steps(report)).endswith("0.271 at 25 steps, 6.41 at 1 step, 24 times as much.")
    assert "6.41 for `teacher (guidance 2)`, 0.523 for `2rf`" in told(findings.reflow(report))


def test_of_several_students_the_one_that_the_report_is_about_is_told():
    """Folders without a lineage are all of one kind."""
    rows = [replace(row, kind="student") if row.model == "direct" else row for row in changed("direct", 1)]
    rows = [replace(row, frechet_distance_real=0.2) if row.model == "direct" else row for row in rows]
    aim = Aim(model="student", figure="frechet_distance_real", value=1.0)
    report = replace(full_report(), rows=rows, aims=[aim])
    assert "0.523 for `2rf`, 0.312 for `student`" in told(findings.distillation(report))
    assert "0.523 for `2rf`, 0.200 for `direct`" in told(findings.distillation(replace(report, aims=[])))


def test_ema_rows_speak_for_a_model_that_also_has_raw_ones():
    raw = [replace(row, weights="raw", frechet_distance_real=0.1) for row in ROWS if row.model == "student"]
    best = findings.result(replace(full_report(), rows=[*raw, *ROWS]))
    assert best is not None and best.frechet_distance_real == 0.312


@pytest.mark.parametrize(
    ("raw", "verdict"),
    [(0.4, "the average is the nearer"), (0.313, "the same within 5%"), (0.2, "the raw weights are the nearer")],
)
def test_raw_weights_are_compared_with_their_average(raw, verdict):
    rows = [*ROWS, replace(ROWS[5], weights="raw", frechet_distance_real=raw)]
    text = told(findings.averaging(replace(full_report(), rows=rows)))
    assert text == (
        "`student` at 1 step, Fréchet distance to the real images: 0.312 with the moving average of its weights, "
        f"{raw:.3f} with the raw ones; {verdict}."
    )
    assert findings.averaging(full_report()) == []


def test_the_worst_gaps_are_put_in_proportion():
    text = told(findings.gaps(full_report()))
    assert "Of 100 images of `student`, half lie within 0.505 of the teacher’s and 95 % within 0.951" in text
    assert "The 1 shown are the worst 1.0 %." in text


@pytest.mark.parametrize("missing", ["teacher", "2rf", "student", "direct"])
def test_a_missing_model_leaves_sentences_out_and_names_no_number(missing):
    report = replace(full_report(), rows=[row for row in ROWS if row.model != missing])
    parts = (findings.headline, findings.few_steps, findings.reflow, findings.distillation, findings.control)
    text = told([sentence for part in parts for sentence in part(report)])
    assert f"`{missing}`" not in text
    assert "nan" not in text and "–" not in text


def test_the_nearest_one_step_model_is_named_where_it_is_another():
    assert "comes nearest" not in told(findings.headline(full_report()))
    text = told(findings.headline(with_distance("direct", 0.2)))
    assert "Of the models made for few steps `direct` comes nearest in one step: 0.200." in text
    assert "comes nearest" not in told(findings.headline(with_distance("direct", 0.31)))  # as good as the same


def test_of_a_reference_that_is_no_teacher_no_teacher_is_told():
    rows = [replace(row, compared_with="reference", frechet_distance_real=None) for row in ROWS]
    report = replace(full_report(), rows=rows, scores=[])
    assert "0.0710 from the reference’s images." in told(findings.headline(report))
    shown = Reader(page(report)).text
    for words in ("to the teacher", "to teacher", "the teacher’s images"):
        assert words not in shown and words.replace("teacher", "reference") in shown
    text = markdown(report)
    assert "| to reference |" in text and "gap to reference, pixels" in text and "to teacher" not in text
    assert "to the teacher’s images" in ranking([replace(row, compared_with="teacher") for row in rows]).explained


@pytest.mark.parametrize(
    ("student", "verdict"),
    [(0.30, "is less varied: look for what"), (0.35, "is as varied."), (0.41, "is more varied.")],
)
def test_a_collapsed_student_is_told(student, verdict):
    report = replace(full_report(), rows=changed("student", 1, diversity=student))
    text = told(findings.diversity(report))
    assert f"look {number(student)} apart as `student` draws them, and 0.360 as `teacher` does" in text
    assert f"; `student` {verdict}" in text
    assert findings.diversity(replace(report, rows=changed("student", 1, diversity=None))) == []
    [said] = findings.diversity(with_intervals(0.2, "diversity", diversity=student))
    assert said.endswith("; a difference that so few prompts cannot tell from chance.")


def test_of_a_sweep_s_flow_the_guidance_that_is_named_is_told():
    flows = [replace(row, swept=True, guidance_scale=1.0) for row in ROWS if row.model == "2rf"]
    other = [replace(row, guidance_scale=2.0, frechet_distance_real=9.99) for row in flows]
    plain = told(findings.reflow(full_report()))
    for rows in ([*flows, *other], [*flows[::-1], *other]):
        text = told(findings.reflow(replace(full_report(), rows=[row for row in ROWS if row.model != "2rf"] + rows)))
        assert "9.99" not in text and "guidance 1" in text
    assert plain.partition("With many steps: ")[2].partition(" for")[0] in text
