"""What a report takes from the folders of the stages before it."""

import pytest

from instaflow.evaluation.history import description, loss_curves, preview_curves, stages_so_far
from instaflow.evaluation.report import model_kind
from tests.experiments import HALVED, SMALL, folders, mark_done, write


def test_losses_and_previews_are_told_apart(tmp_path):
    stages = folders(write(tmp_path), run=tmp_path / "run")
    for name in ("teacher", "pairs", "2rf", "student"):
        mark_done(stages[name])
    for seen, distance in ((64, 0.7), (128, None), (192, 0.5)):  # None: a latent was not finite
        stages["2rf"].log(job="", samples_seen=seen, loss=2.0)
        frechet = None if distance is None else distance / 2
        stages["2rf"].log(job="", samples_seen=seen, preview_distance=distance, preview_frechet=frechet)
    for name in ("teacher", "2rf", "student"):
        stages[name].forget_stats(lambda line: "job" in line)
    done = stages_so_far(stages["report"])
    (curve,) = preview_curves(stages["report"], done)
    assert (curve.stage, curve.samples_seen) == ("2rf", [64, 192])
    assert (curve.distance, curve.frechet_distance) == ([0.7, 0.5], [0.35, 0.25])
    (losses,) = loss_curves(stages["report"], done)
    assert (losses.samples_seen, losses.loss) == ([64, 128, 192], [2.0, 2.0, 2.0])


def test_a_halved_model_is_of_its_own_kind_and_says_how_it_was_made(tmp_path):
    stages = folders(write(tmp_path, SMALL + HALVED), run=tmp_path / "run")
    for name in ("teacher", "pairs", "halved"):
        mark_done(stages[name])
        stages[name].forget_stats(lambda line: "job" in line)
    for job, loss in (("2-steps", 0.2), ("1-step", 0.4)):
        stages["halved"].log(job=job, samples_seen=4, loss=loss)
    done = stages_so_far(stages["report"])
    assert model_kind("halved", done) == "progressive"
    (halved,) = [stage for stage in done if stage.name == "halved"]
    assert (halved.kind, halved.parents, halved.samples) == ("distill", ["teacher", "pairs"], 16)
    assert halved.description == "progressive distillation from teacher, 2 to 1 steps, guidance 2"
    assert [curve.stage for curve in loss_curves(stages["report"], done)] == ["halved 2-steps", "halved 1-step"]


@pytest.mark.parametrize(
    ("counts", "guidance", "said"),
    [((4,), 1.0, "4 steps"), ((1,), 3.0, "1 step, guidance 3"), ((2, 1), 0, "2 to 1 steps")],
)
def test_a_halving_s_steps_in_words(counts, guidance, said):
    settings = {"kind": "distill", "method": "progressive", "init": "2rf", "guidance_scale": guidance}
    settings["phases"] = [{"num_steps": count} for count in counts]
    assert description(settings) == f"progressive distillation from 2rf, {said}"


def test_a_matched_model_is_of_its_own_kind_and_names_its_terms_and_parents(tmp_path):
    matched = """
  matched:
    {kind: distill, method: dmd, init: student, teacher: teacher, prompts: [a seven], guidance_scale: 2,
     regression: {couplings: pairs, loss: l2}, gan: {real: pairs},
     phases: [{samples: 8, global_batch_size: 4, learning_rate: 1e-3}]}
"""
    stages = folders(write(tmp_path, SMALL + matched), run=tmp_path / "run")
    for name in ("teacher", "pairs", "2rf", "student", "matched"):
        mark_done(stages[name])
    done = stages_so_far(stages["report"])
    assert model_kind("matched", done) == "dmd"
    (found,) = [stage for stage in done if stage.name == "matched"]
    assert found.parents == ["student", "teacher", "pairs"] and found.samples == 8
    said = "student, its images distributed as those of teacher"
    assert found.description == f"{said}, with regression and GAN"
    settings = {"kind": "distill", "method": "dmd", "init": "student", "teacher": "teacher", "num_steps": 1}
    settings |= {"regression": None, "gan": None, "fake": {"updates": 1}}
    assert description(settings) == said
    few = settings | {"num_steps": 4, "gan": {"real": "pairs"}, "fake": {"updates": 5}}
    said = "student, its images in 4 steps distributed as those of teacher, with GAN and 5 fake updates"
    assert description(few) == said


def test_couplings_of_real_images_are_told_as_such(tmp_path):
    real = """
  photographs:
    {kind: couple, model: teacher, data: digits, count: 20, num_steps: 9, guidance_scale: 1.0}
"""
    stages = folders(write(tmp_path, SMALL + real), run=tmp_path / "run")
    for name in ("teacher", "pairs", "photographs"):
        mark_done(stages[name])
    told = {stage.name: (stage.description, stage.of_real_images) for stage in stages_so_far(stages["report"])}
    assert told["photographs"] == ("real images inverted by teacher in 9 steps", True)
    assert told["pairs"][0].startswith("25-step couplings of teacher") and not told["pairs"][1]
    assert not told["teacher"][1]  # whose data are real as well


def test_an_edm_is_told_as_what_it_is():
    settings = {"kind": "teacher", "method": "edm"}
    assert description({**settings, "classes": True}) == "EDM of pixels by class, on real images"
    assert description({**settings, "classes": False}) == "EDM of pixels, on real images"


def test_devices_are_told_where_a_stage_kept_them(tmp_path):
    stages = folders(write(tmp_path), run=tmp_path / "run")
    mark_done(stages["teacher"])
    mark_done(stages["pairs"], processes=3, hardware="a GPU")
    told = {stage.name: (stage.processes, stage.hardware) for stage in stages_so_far(stages["report"])}
    assert told == {"teacher": (None, ""), "pairs": (3, "a GPU")}
