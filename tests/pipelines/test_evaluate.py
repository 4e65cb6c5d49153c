"""An evaluation that is stopped, shared, made anew: its figures are those of one process that ran to its end."""

import json
import re
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from instaflow import __version__
from instaflow.config import load_experiment
from instaflow.digits.protocol import DigitsProtocol
from instaflow.errors import ConfigError, DataError, InstaFlowError, Interrupted
from instaflow.evaluation.chance import interval_of_difference
from instaflow.evaluation.frechet import frechet_distance
from instaflow.evaluation.intervals import of_share
from instaflow.evaluation.kernel_distance import kernel_distance
from instaflow.evaluation.observations import Observations
from instaflow.evaluation.precision_recall import precision_recall
from instaflow.evaluation.presets import PRESETS
from instaflow.interruption import Stop
from instaflow.models.loading import load_model
from instaflow.models.settings import ModelSettings
from instaflow.rundir import append_stats, locked, read_done, stage_folders
from instaflow.training.perceptual import load_network, save_network, small_layers, write_tiny_network
from instaflow.weights import WEIGHTS
from instaflow.world import hardware
from pipelines import evaluate, observing, showing
from pipelines.earlier import told_apart
from pipelines.evaluate import reference_of, subjects_of
from pipelines.experiment import check_files, look_at_measures, run_all, run_one
from pipelines.judging import look_at_models
from pipelines.measuring import Measure
from pipelines.observing import Measured
from pipelines.plan import Plan
from pipelines.status import run as status
from pipelines.status import work_of
from tests.conftest import forbid_network
from tests.evaluation.stand_ins import small_coco, write_inception
from tests.models.made import write_flow, write_model
from tests.pipelines.runs import environment, together
from tests.pipelines.started import Started
from tests.training.made import StopAt
from tests.training.test_perceptual import write_backbone

TEXT = """
run: unused
stages:
  report:
    kind: evaluate
    protocol: digits
    models: [{model: TEACHER, num_steps: [3, 1], guidance_scale: 2}, {model: FLOW, num_steps: [1]}]
    reference: {model: TEACHER, num_steps: 3}
    num_samples: 70
    batch_size: 16
    straightness_samples: 20
    straightness_steps: 3
"""
OWN = ModelSettings().guidance_scale
"""What the teacher's folder recommends."""
LOADED = {"seconds_per_image", "card"}
"""Of a row, what is not the same twice."""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("evaluated")
    teacher, flow = write_model(folder / "teacher"), write_flow(folder / "flow", "velocity")
    path = folder / "report.yaml"
    path.write_text(TEXT.replace("TEACHER", str(teacher)).replace("FLOW", str(flow)))
    return str(path)


@pytest.fixture(scope="module")
def done(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("done") / "run"
    run_all(load_experiment(config, run=str(run)), Stop())
    return run


def rows(run: Path) -> list[dict]:
    found = json.loads((run / "report" / "report.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key not in LOADED} for row in found]


def told(run: Path) -> dict:
    """All that a report tells, but for times and circumstances."""
    found = json.loads((run / "report" / "report.json").read_text())
    return found | {"rows": rows(run)} | dict.fromkeys(("stages", "hardware", "seconds", "peak_memory"))


def less(row: dict, *figures: str) -> dict:
    """A row without these figures and their intervals."""
    intervals = {name: half for name, half in row["intervals"].items() if name not in figures}
    return {name: value for name, value in row.items() if name not in figures} | {"intervals": intervals}


def drawn(monkeypatch) -> list[slice]:
    """The batches that are made from now on."""
    batches: list[slice] = []
    write = Observations.write

    def noted(self, batch, observed, made):
        batches.append(batch)
        write(self, batch, observed, made)

    monkeypatch.setattr(Observations, "write", noted)
    return batches


def test_a_row_carries_its_card(done):
    found = json.loads((done / "report" / "report.json").read_text())["rows"]
    assert [(row["card"]["num_steps"], row["card"]["guidance_scale"]) for row in found] == [
        (3, 2.0),
        (1, 2.0),
        (1, 1.5),
    ]
    for row in found:
        assert row["card"]["num_samples"] == 70 and row["card"]["prompts"].startswith("70 prompts, SHA-256")
        assert row["card"]["model_content"] and row["card"]["versions"]["torch"]
        assert row["card"]["versions"]["InstaFlow"] == __version__
        assert row["card"]["kernel"] == "10 subsets of 70 samples"
    straight = "20 noises, 3 Euler steps of the guided velocity (few: S(Z) wants 100 or more)"
    assert [row["card"]["straightness"] for row in found] == [straight, straight, ""]  # of a model, at all its steps
    assert [row["straightness"] is None for row in found] == [False, False, True]
    assert len({row["card"]["model_content"] for row in found}) == 2


def test_a_row_s_figures_are_those_of_its_images(done):
    content = json.loads((done / "report" / "report.json").read_text())
    real = DigitsProtocol(70).reference_features()
    assert content["floors"]["real_halves"] == pytest.approx(frechet_distance(real[::2], real[1::2]))
    kept = {}
    for file in (done / "report" / "observed").glob("*/card.json"):
        if not file.parent.name.endswith("-paths"):
            card = json.loads(file.read_text())
            kept[card["model"], card["num_steps"]] = Observations(file.parent, 70, 16).joined()
    for row in content["rows"]:
        observed = kept[row["model"], row["num_steps"]]
        features = observed["features"].reshape(70, -1)
        manifolds = precision_recall(features, real, device=torch.device("cpu"))
        assert (row["precision"], row["recall"]) == (manifolds.precision, manifolds.recall)
        distance = kernel_distance(features, real, subsets=DigitsProtocol.kernel_subsets, subset_size=70)
        assert row["kernel_distance"] == pytest.approx(distance.mean)
        assert row["frechet_distance_real"] == pytest.approx(frechet_distance(features, real))
        assert row["seconds_per_image"] == np.median(observed["seconds"])
        assert row["guidance_scale"] == row["card"]["guidance_scale"]


def test_figures_carry_the_interval_that_their_own_images_show(looked):
    content = json.loads((looked / "report" / "report.json").read_text())
    judged = {"frechet_distance_real", "prompt_accuracy", "prompt_accuracy_unseen"}
    everywhere = judged | {"pixel_gap", "perceptual_gap", "diversity"}
    straight = {"straightness", "straightness_relative"}
    for place, row in enumerate(content["rows"]):
        own = row["intervals"]
        followed = straight if row["straightness"] is not None else set()
        assert {*own} - followed == everywhere | (
            {"frechet_distance_teacher"} if place else set()
        )  # 0 of the reference
        assert all(0 < own[name] < row[name] for name in followed)
        assert own["prompt_accuracy"] == pytest.approx(of_share(row["prompt_accuracy"], 70))
        assert (own["pixel_gap"] == 0) == (own["perceptual_gap"] == 0) == (place == 0)
        assert 0 < own["frechet_distance_real"] < row["frechet_distance_real"] and own["diversity"] > 0
    far = [row["intervals"]["frechet_distance_teacher"] for row in content["rows"][1:]]
    assert all(far) and far[0] != far[1]


def test_rows_are_measured_with_what_each_image_adds(config, done):
    [stage] = stage_folders(load_experiment(config, run=str(done))).values()
    protocol, seen = look_at_models(stage)
    subjects = subjects_of(stage, protocol, seen)
    reference, other = (Measured.of(subject, subjects[0]) for subject in subjects[:2])
    measure = Measure.by(protocol, protocol.reference_features(), reference)
    row = measure.row(other, "teacher")
    assert row.parts.keys() == row.intervals.keys() >= {"frechet_distance_real", "frechet_distance_teacher"}
    assert len(row.parts["frechet_distance_real"]) == len(row.parts["prompt_accuracy"]) == 70
    own = measure.row(reference, "teacher")
    assert "frechet_distance_teacher" not in own.parts
    paired = interval_of_difference(own, row, "frechet_distance_real")
    assert 0 < paired != np.hypot(*(one.intervals["frechet_distance_real"] for one in (own, row)))


def test_its_rows_are_told_with_its_seconds(done):
    lines = [json.loads(line) for line in (done / "report" / "stats.jsonl").read_text().splitlines()]
    assert [line["num_steps"] for line in lines] == [3, 1, 1]
    assert 0 < lines[-1]["seconds"] <= json.loads((done / "report" / "done.json").read_text())["seconds"]


@pytest.mark.parametrize("calls", [2, 4, 11, 16])
def test_what_was_stopped_goes_on_to_the_same_figures(config, done, tmp_path, calls, monkeypatch):
    run = tmp_path / "run"
    batches = drawn(monkeypatch)
    with pytest.raises(Interrupted, match="Stage 'report' stopped"):
        run_all(load_experiment(config, run=str(run)), StopAt(calls))
    before = len(batches)
    run_all(load_experiment(config, run=str(run)), Stop())
    assert rows(run) == rows(done)
    assert len(batches) == 3 * 5 + 2 and before < len(batches)


def test_a_model_more_is_all_that_is_sampled_anew(config, done, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(done, run)
    batches = drawn(monkeypatch)
    more = ["stages.report.models.1.num_steps=[1, 2]"]
    append_stats(run / "report" / "stats.jsonl", {"seconds": 1e6})  # of what it was before
    run_one(load_experiment(config, more, run=str(run)), "report", Stop())
    out = capsys.readouterr().out
    assert "report: made anew, for 'models.1.num_steps" in out
    assert out.endswith(f"The report: {run}/report/report.html\n") and read_done(run / "report")["seconds"] < 1e5
    assert len(batches) == 5 + 2  # the images of two steps, and the paths of a flow that now takes several
    one = {(row["model"], row["num_steps"]): row for row in rows(run)}
    assert len(one) == 4
    for row in rows(done):
        same = one[row["model"], row["num_steps"]]
        assert less(same, "straightness", "straightness_relative") == less(row, "straightness", "straightness_relative")


def test_what_a_done_report_is_made_anew_with_is_looked_at_before_it_is_undone(config, done, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(done, run)
    missing = [f"stages.report.perceptual={{network: alex, weights: {tmp_path / 'none.pth'}}}"]
    for work in (check_files, lambda experiment, name, kind: run_all(experiment, Stop())):
        with pytest.raises(DataError, match=r"none\.pth"):
            work(load_experiment(config, missing, run=str(run)), None, None)
    assert (run / "report" / "done.json").exists()
    capsys.readouterr()
    check_files(load_experiment(config, ["stages.report.num_samples=20"], run=str(run)), None, None)
    assert capsys.readouterr().err == "report: would be made anew, for 'num_samples' was 70, is now 20\n"
    check_files(load_experiment(config, run=str(run)), None, None)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_two_processes_come_to_the_figures_of_one(config, looked, eye, tmp_path):
    together(2, "evaluate", config, "--run-dir", tmp_path / "run", "--set", eye)
    assert told(tmp_path / "run") == told(looked)
    assert json.loads((tmp_path / "run" / "report" / "report.json").read_text())["rows"][0]["card"]["processes"] == 2


def swept(scales: str, reference: float | None = None) -> list[str]:
    """The teacher at these guidance scales, one of which is the reference's."""
    changes = [f"models.0.guidance_scales={scales}", "models.0.guidance_scale=null"]
    return [
        f"stages.report.{key}" for key in changes + ([f"reference.guidance_scale={reference}"] if reference else [])
    ]


def test_a_sweep_of_guidance_is_a_row_each(config, tmp_path):
    run_all(load_experiment(config, swept("[1, 3]", 3), run=str(tmp_path / "run")), Stop())
    found = rows(tmp_path / "run")
    assert [row["frechet_distance_teacher"] == 0 for row in found] == [False, False, True, False, False]
    assert [row["pixel_gap"] == 0 for row in found] == [False, False, True, False, False]
    told = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["protocol"]["reference_teacher"]
    assert "in 3 steps, guidance 3, " in told
    assert [(row["num_steps"], row["guidance_scale"]) for row in found] == [(3, 1), (1, 1), (3, 3), (1, 3), (1, 1.5)]
    assert len({row["frechet_distance_real"] for row in found}) == 5
    assert found[0]["straightness"] != found[2]["straightness"]


@pytest.mark.parametrize(
    ("scales", "named", "found"),
    [("[1, 3]", 3, 3), ("[1, 3]", 1, 1), ("[9, OWN, 1]", None, "OWN"), ("[4]", None, 4), ("null", None, "OWN")],
)
def test_the_reference_of_a_sweep_is_the_scale_that_is_named_or_its_own(config, tmp_path, scales, named, found):
    changes = swept(scales.replace("OWN", f"{OWN:g}"), named)
    [stage] = stage_folders(load_experiment(config, changes, run=str(tmp_path / "run"))).values()
    protocol, seen = look_at_models(stage)
    reference = reference_of(stage, subjects_of(stage, protocol, seen), seen)
    assert reference.guidance_scale == (OWN if found == "OWN" else found) and reference.num_steps == 3


def test_a_reference_that_no_row_is_measured_at_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"reference.guidance_scale: '.*teacher' is not measured at 2; choose 1 or 3"):
        load_experiment(config, swept("[1, 3]", 2))
    run = str(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"is not measured at guidance {OWN:g}, which its folder recommends") as error:
        run_all(load_experiment(config, swept("[1, 3]"), run=run), Stop())
    assert error.value.hint == "Set stages.report.reference.guidance_scale to 1 or 3"
    with pytest.raises(ConfigError, match="is not measured at guidance 3, which 'reference' names"):
        run_all(load_experiment(config, swept("null", 3), run=run), Stop())
    assert not list(Path(run).rglob("*.observed"))


def test_rows_of_an_earlier_report_stand_beside(config, done, tmp_path):
    earlier = done / "report" / "report.json"
    changes = [f"stages.report.beside=[{earlier}]", "stages.report.models.1.num_steps=[2]"]
    run_all(load_experiment(config, changes, run=str(tmp_path / "run")), Stop())
    found = rows(tmp_path / "run")
    assert len(found) == 3 + 3
    for old, shown in zip(rows(done), found[3:], strict=True):
        assert shown["model"] == f"run: {old['model']}"
        assert shown["frechet_distance_real"] == old["frechet_distance_real"]
        assert shown["frechet_distance_teacher"] is None  # of another run's teacher
        assert shown["straightness"] == old["straightness"] and shown["beside"] and not old["beside"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("num_samples=71", "'num_samples' is 71 of the first and 70 of the second"),
        ("dtype=bfloat16", "'dtype' is 'bfloat16' of the first and 'float32' of the second"),
        ("protocol=digits-grid", "'protocol' is 'digits-grid' of the first and 'digits' of the second"),
        ("seed=1", "'seed' is 1 of the first and 0 of the second"),
    ],
)
def test_rows_by_another_protocol_are_refused_before_work_begins(config, done, tmp_path, change, said):
    earlier = done / "report" / "report.json"
    changes = [f"stages.report.beside=[{earlier}]", change if change == "seed=1" else f"stages.report.{change}"]
    experiment = load_experiment(config, changes, run=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=said):
        check_files(experiment, None, None)
    assert check_files(load_experiment(config, changes[:1], run=str(tmp_path / "run")), None, None) is None


def test_earlier_runs_of_one_name_are_told_apart_by_what_is_above():
    a, b, c = (Path(place) for place in ("/x/first/run", "/x/second/run", "/x/other"))
    assert told_apart([a, b, c]) == ["first/run", "second/run", "other"]
    assert told_apart([a, a]) == ["run", "run"]
    assert told_apart([a, Path("/run")]) == ["first/run", "//run"]


def test_an_earlier_row_keeps_no_figure_that_was_measured_otherwise(config, done, tmp_path):
    earlier = done / "report" / "report.json"
    changes = [f"beside=[{earlier}]", "straightness_steps=4", "batch_size=35", "models.1.num_steps=[2]"]
    run_all(
        load_experiment(config, [f"stages.report.{change}" for change in changes], run=str(tmp_path / "run")), Stop()
    )
    found = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["rows"]
    for row in found[3:]:
        assert row["straightness"] is None and row["straightness_relative"] is None and row["seconds_per_image"] is None
    assert found[0]["straightness"] and all(row["seconds_per_image"] for row in found[:3])


@pytest.mark.parametrize(
    ("place", "said"), [("", "is no file here"), ("report.html", "is damaged"), ("own", "is this report")]
)
def test_what_is_no_earlier_report_is_refused_and_nothing_is_to_be_deleted(config, done, tmp_path, place, said):
    run = tmp_path / "run"
    shutil.copytree(done, run)
    beside = run / "report" / "report.json" if place == "own" else done / "report" / place
    with pytest.raises(InstaFlowError, match=said) as caught:
        run_all(load_experiment(config, [f"stages.report.beside=[{beside}]"], run=str(run)), Stop())
    assert "'beside'" in caught.value.hint or caught.value.hint == "Check the path"
    assert "Delete" not in caught.value.hint
    lines, code = status(run)
    if place == "own":
        assert code == 1 and "report  failed" in "\n".join(lines) and said in lines[-1]
    else:  # told before the report that is there was undone
        assert code == 0 and (run / "report" / "done.json").exists() and rows(run) == rows(done)


def test_a_row_tells_all_circumstances_that_its_images_were_made_in(config, tmp_path, monkeypatch):
    run = tmp_path / "run"
    small = ["stages.report.num_samples=20", "stages.report.batch_size=8", "stages.report.straightness_samples=4"]
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(evaluate, "hardware", lambda: "elsewhere")
        patch.setattr(evaluate, "versions", lambda: {"torch": "1.0"})
        run_all(load_experiment(config, small, run=str(run)), StopAt(5))
    run_all(load_experiment(config, small, run=str(run)), Stop())
    found = [row["card"] for row in json.loads((run / "report" / "report.json").read_text())["rows"]]
    here = hardware()
    assert [card["hardware"] for card in found] == [f"elsewhere and {here}", f"elsewhere and {here}", here]
    torch_here = evaluate.versions()["torch"]
    assert [card["versions"]["torch"] for card in found] == [*[f"1.0 and {torch_here}"] * 2, torch_here]
    assert found[0]["versions"]["numpy"] == evaluate.versions()["numpy"]
    rows = json.loads((run / "report" / "report.json").read_text())["rows"]
    assert [row["seconds_per_image"] is None for row in rows] == [True, True, False]  # made elsewhere, in part

    later = [*small, f"stages.report.beside=[{run / 'report' / 'report.json'}]"]
    file = run / "report" / "report.json"
    content = json.loads(file.read_text())
    for row in content["rows"]:
        row["seconds_per_image"] = 1.0
    file.write_text(json.dumps(content))
    run_all(load_experiment(config, later, run=str(tmp_path / "later")), Stop())
    beside = json.loads((tmp_path / "later" / "report" / "report.json").read_text())["rows"][3:]
    assert [row["seconds_per_image"] for row in beside] == [None, None, 1.0]
    page = (run / "report" / "report.html").read_text()
    assert f"<dd>elsewhere and {here}; batches of 8; processes: 1; torch 1.0 and {torch_here}" in page


def test_batches_of_another_size_are_removed_but_not_while_a_watch_goes_on(config, tmp_path):
    run, small = tmp_path / "run", ["stages.report.num_samples=20", "stages.report.straightness_samples=4"]
    place = run / "report" / "observed"

    def sizes() -> set[str]:
        return {file.name for file in place.glob("*-20/*.observed")}

    run_all(load_experiment(config, [*small, "stages.report.batch_size=8"], run=str(run)), Stop())
    assert sizes() == {"000000-000008.observed", "000008-000016.observed", "000016-000020.observed"}
    with locked(run / "report" / "watch"):
        run_all(load_experiment(config, [*small, "stages.report.batch_size=20"], run=str(run)), Stop())
    assert len(sizes()) == 4
    run_all(load_experiment(config, [*small, "stages.report.batch_size=10"], run=str(run)), Stop())
    assert sizes() == {"000000-000010.observed", "000010-000020.observed"}
    found = json.loads((run / "report" / "report.json").read_text())["rows"]
    assert [row["card"]["batch_size"] for row in found] == [10, 10, 10]


@pytest.mark.parametrize("at_a_time", [1, 50, 2**26])
def test_the_nearest_are_found_part_by_part(monkeypatch, at_a_time):
    monkeypatch.setattr(showing, "DISTANCES", at_a_time)
    rng = np.random.default_rng(0)
    points, others = (torch.from_numpy(rng.standard_normal((count, 3))) for count in (7, 11))
    far = np.linalg.norm(points[:, None] - others[None], axis=-1)
    found = showing.nearest_of(points, others)
    assert np.allclose(found[0], far.min(1)) and found[1].tolist() == far.argmin(1).tolist()
    alone = torch.tensor([2, 5, 10])
    own = np.linalg.norm(others[alone][:, None] - others[None], axis=-1)
    own[[0, 1, 2], alone] = np.inf
    assert np.allclose(showing.nearest_of(others[alone], others, themselves=alone)[0], own.min(1))


def test_a_row_of_another_protocol_is_refused_with_the_entry_that_differs(config, done, tmp_path):
    changes = [f"stages.report.beside=[{done / 'report' / 'report.json'}]", "stages.report.num_samples=64"]
    with pytest.raises(ConfigError, match="different protocols: 'num_samples' is 64 of the first and 70 of the second"):
        run_all(load_experiment(config, changes, run=str(tmp_path / "run")), Stop())
    assert not list((tmp_path / "run").rglob("*.observed"))  # before any image is made


def test_a_report_has_strips_neighbours_and_markdown(done):
    page = (done / "report" / "report.html").read_text()
    assert "From one noise to another" in page and page.count("on the way&quot;") + page.count('on the way"') == 30
    content = json.loads((done / "report" / "report.json").read_text())
    assert content["neighbours"]["median"] > 0 and len(content["neighbours"]["shown"]) == 10
    assert (done / "report" / "report.md").read_text().count("\n| ") == 2 + 3


# --- as images look ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eye(tmp_path_factory) -> str:
    """The setting of a small perceptual network in a folder."""
    folder = tmp_path_factory.mktemp("eye") / "perceptual"
    write_tiny_network(folder)
    return f"stages.report.perceptual={{network: {folder}}}"


@pytest.fixture(scope="module")
def other_eye(tmp_path_factory) -> str:
    """That of one with other weights."""
    folder = tmp_path_factory.mktemp("eye") / "other"
    torch.manual_seed(1)
    save_network(folder, small_layers((3, 8, 8), (1, 2)), (3, 8, 8), (1, 2))
    return f"stages.report.perceptual={{network: {folder}}}"


@pytest.fixture(scope="module")
def looked(config, done, eye, tmp_path_factory) -> Path:
    """The run that is done, measured once more by a perceptual network as well."""
    run = tmp_path_factory.mktemp("looked") / "run"
    shutil.copytree(done, run)
    run_all(load_experiment(config, [eye], run=str(run)), Stop())
    return run


def test_gaps_and_diversity_are_measured_of_the_images_that_are_there(done, looked):
    teacher, blurred, flow = rows(looked)
    assert teacher["pixel_gap"] == teacher["perceptual_gap"] == 0
    for row in (blurred, flow):
        assert row["pixel_gap"] > 0 and row["perceptual_gap"] > 0
    assert len({row["diversity"] for row in rows(looked)}) == 3 and all(row["diversity"] > 0 for row in rows(looked))
    new = ("perceptual_gap", "diversity")
    assert [less(row, *new) for row in rows(looked)] == [less(row, *new) for row in rows(done)]  # whose images they are
    for folder in (done / "report" / "observed").iterdir():
        for file in folder.iterdir():
            again = looked / "report" / "observed" / folder.name / file.name
            assert file.suffix == ".json" or again.stat().st_mtime_ns == file.stat().st_mtime_ns


def test_the_figures_are_those_of_the_kept_images(looked, eye):
    network = load_network(Path(eye.partition("network: ")[2].rstrip("}")))
    folders = [file.parent for file in (looked / "report" / "observed").glob("*/card.json")]
    images = {}
    for folder in folders:
        if folder.name.endswith("-70"):
            card = json.loads((folder / "card.json").read_text())
            images[card["model"], card["num_steps"]] = Observations(folder, 70, 16).joined()["images"]
    as_floats = {key: torch.from_numpy(found).permute(0, 3, 1, 2) / 127.5 - 1 for key, found in images.items()}
    features = {key: network(found) for key, found in as_floats.items()}
    steps = {(row["model"], row["num_steps"]): row for row in rows(looked)}
    [reference] = [key for key in steps if key[1] == 3]
    for key, row in steps.items():
        expected = network.distance(features[key], features[reference]).mean()
        assert row["perceptual_gap"] == pytest.approx(float(expected), rel=1e-4, abs=1e-8)
        expected = (as_floats[key] - as_floats[reference]).square().mean((1, 2, 3)).sqrt().mean()
        assert row["pixel_gap"] == pytest.approx(float(expected), rel=1e-4, abs=1e-8)


def test_the_status_counts_the_images_of_rows_alone(looked):
    work = work_of(looked / "report")
    assert len({file.parent for file in looked.rglob("*.observed")}) > 3 + 1  # gaps and diversity are seen, too
    assert work.done == work.total == sum(row["num_samples"] for row in rows(looked))


def test_the_card_and_the_page_say_by_which_network(looked):
    found = json.loads((looked / "report" / "report.json").read_text())
    [said] = {(row["card"]["perceptual"], row["card"]["diversity"]) for row in found["rows"]}
    assert re.fullmatch(
        "LPIPS' distance over a small classifier's layers, which count alike, weights [0-9a-f]{8}", said[0]
    )
    assert re.fullmatch(r"4 images of each of \d+ prompts", said[1])
    page = (looked / "report" / "report.html").read_text()
    assert "Gap to teacher, perceptual" in page and "Diversity" in page
    assert "gap to teacher, perceptual | diversity" in (looked / "report" / "report.md").read_text()


@pytest.mark.parametrize("calls", [4, 16])
def test_what_was_stopped_while_it_looked_goes_on_to_the_same_figures(config, done, looked, eye, tmp_path, calls):
    run = tmp_path / "run"
    shutil.copytree(done, run)
    with pytest.raises(Interrupted, match="Stage 'report' stopped"):
        run_all(load_experiment(config, [eye], run=str(run)), StopAt(calls))
    run_all(load_experiment(config, [eye], run=str(run)), Stop())
    assert rows(run) == rows(looked)


def test_another_network_looks_anew_at_the_same_images(config, looked, other_eye, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(looked, run)
    before = {file: file.stat().st_mtime_ns for file in (run / "report" / "observed").rglob("*.observed")}
    run_all(load_experiment(config, [other_eye], run=str(run)), Stop())
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    for ours, theirs in zip(rows(run)[1:], rows(looked)[1:], strict=True):
        assert ours["perceptual_gap"] != theirs["perceptual_gap"] and ours["diversity"] != theirs["diversity"]
        assert ours["pixel_gap"] == theirs["pixel_gap"]


def beside_rows(config: str, looked: Path, setting: str, run: Path) -> list[dict]:
    """The rows of the run that was looked at, as they stand in a report of one other model with this setting."""
    few = ["stages.report.models.0.num_steps=[3]", "stages.report.straightness_samples=2"]
    earlier = f"stages.report.beside=[{looked / 'report' / 'report.json'}]"
    run_all(load_experiment(config, [setting, earlier, *few], run=str(run)), Stop())
    found = [row for row in json.loads((run / "report" / "report.json").read_text())["rows"] if row["beside"]]
    for old, row in zip(rows(looked), found, strict=True):
        for figure in ("frechet_distance_real", "kernel_distance", "precision", "recall", "prompt_accuracy"):
            assert row[figure] == old[figure] is not None
        assert row["pixel_gap"] is row["perceptual_gap"] is None
    return found


def test_a_figure_of_another_network_never_stands_beside(config, looked, eye, other_eye, tmp_path):
    for number, setting in enumerate(("stages.report.perceptual=null", other_eye)):
        for row in beside_rows(config, looked, setting, tmp_path / str(number)):
            assert row["diversity"] is None and row["card"]["perceptual"] == row["card"]["diversity"] == ""
    for old, row in zip(rows(looked), beside_rows(config, looked, eye, tmp_path / "same"), strict=True):
        assert row["diversity"] == old["diversity"] is not None and row["card"]["perceptual"]


@pytest.mark.parametrize(
    ("perceptual", "said"),
    [
        ("{network: nowhere}", "'nowhere', which is no stage of this experiment and no folder"),
        ("{network: EMPTY}", "is no perceptual network: it lacks config.json and model.safetensors"),
        ("{network: alex, weights: nowhere.pth}", "no file 'nowhere.pth', the weights of the network 'alex'"),
        ("{network: alex}", "The weights 'alexnet-owt-7be5be79.pth' are not on this machine: LPIPS on AlexNet"),
        ("{network: EMPTY, crop: 4}", "perceptual.crop goes with training"),
        ("{network: EMPTY, decoder: EMPTY}", "perceptual.decoder goes with training"),
    ],
)
def test_a_perceptual_network_that_is_not_there_is_named(config, tmp_path, monkeypatch, perceptual, said):
    (tmp_path / "empty").mkdir()
    for cache in ("INSTAFLOW_WEIGHTS", "TORCH_HOME"):
        monkeypatch.setenv(cache, str(tmp_path / "empty"))
    setting = perceptual.replace("EMPTY", str(tmp_path / "empty"))
    with pytest.raises(InstaFlowError, match=said):
        run_all(load_experiment(config, [f"stages.report.perceptual={setting}"], run=str(tmp_path / "run")), Stop())
    assert not (tmp_path / "run" / "report" / "observed").exists()


# --- the papers' protocols --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> dict[str, str]:
    """Captions and images as COCO's, weights in the real formats, and a protocol of few small images."""
    folder = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    (folder / "val").mkdir()
    for index in range(12):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / "val" / f"{index:03d}.jpg")
    rows = [{"image_id": index // 2, "id": index, "caption": f"a seven {index}"} for index in range(24)]
    (folder / "captions.json").write_text(json.dumps({"annotations": rows}))
    weights = folder / "weights"
    weights.mkdir()
    write_inception(weights / WEIGHTS["inception"].file)
    with small_coco(folder) as file, pytest.MonkeyPatch.context() as patch:
        (weights / WEIGHTS["clip-vit-g-14"].file).write_bytes(file.read_bytes())
        patch.setenv("INSTAFLOW_WEIGHTS", str(weights))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield {"captions": str(folder / "captions.json"), "real": str(folder / "val"), "weights": str(weights)}


def of_coco(config: str, coco: dict[str, str], *changes: str) -> list[str]:
    keys = ("captions", "real")
    changed = ["protocol=coco2017-5k", *(f"{key}={coco[key]}" for key in keys), "num_samples=10", *changes]
    return [f"stages.report.{change}" for change in changed]


@pytest.fixture(scope="module")
def judged(config, coco, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("judged") / "run"
    with pytest.MonkeyPatch.context() as patch:
        forbid_network(patch)
        run_all(load_experiment(config, of_coco(config, coco), run=str(run)), Stop())
    return run


def test_images_are_judged_by_inception_and_clip(judged):
    found = json.loads((judged / "report" / "report.json").read_text())["rows"]
    assert len(found) == 3
    for row in found:
        assert row["prompt_accuracy"] is None and -1 < row["clip_score"] < 1
        assert row["frechet_distance_real"] > 0 and 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1
        card = row["card"]
        assert card["features"].startswith("InceptionV3's pooled features (torch-fidelity), weights ")
        assert card["image_size"] == "16×16 to 8×8 by Pillow's Lanczos filter" and "8 bits" in card["image_encoding"]
        assert card["reference"].startswith("12 images, SHA-256 ") and card["judge"].startswith("CLIP score")
    assert len({row["clip_score"] for row in found}) == 3
    page = (judged / "report" / "report.html").read_text()
    assert "CLIP score" in page and "KID" in page


def test_real_images_and_samples_of_another_number_are_told(config, coco, judged, tmp_path, monkeypatch, capsys):
    """Before work begins, and in the report."""
    stage = stage_folders(load_experiment(config, of_coco(config, coco), run=str(judged)))["report"]
    few = "not the protocol's 5,000: not to be compared with published figures"
    told = "not the 5,000 of val2017: not to be compared with published figures"
    warnings = [f"10 samples, {few}", f"'{coco['real']}' holds 12 real images, {told}"]
    assert look_at_measures(stage) == warnings
    check_files(load_experiment(config, of_coco(config, coco), run=str(tmp_path / "run")), None, None)
    assert capsys.readouterr() == ("", "".join(f"report: warning: {line}\n" for line in warnings))
    report = json.loads((judged / "report" / "report.json").read_text())
    assert report["protocol"]["reference_real"].endswith(f"to 8×8; {told}")
    assert report["protocol"]["samples"].startswith(f"10 prompts, {few}")
    page = (judged / "report" / "report.html").read_text()
    assert told in page and escape(few) in page
    monkeypatch.setitem(PRESETS, "coco2017-5k", replace(PRESETS["coco2017-5k"], num_real=12, num_samples=10))
    assert look_at_measures(stage) == []


def test_captions_that_say_nothing_are_told_and_never_drawn(config, coco, tmp_path, capsys):
    content = json.loads(Path(coco["captions"]).read_text())
    content["annotations"][0]["caption"] = " \n"
    content["annotations"][5]["caption"] = None
    (tmp_path / "captions.json").write_text(json.dumps(content))
    changes = of_coco(config, coco, f"captions={tmp_path}/captions.json", "features=pixels", "clip=null")
    run_all(load_experiment(config, changes, run=str(tmp_path / "run")), Stop())
    told = f"report: warning: of the captions in '{tmp_path}/captions.json' are left out: 1 blank, 1 null\n"
    assert told in capsys.readouterr().out
    assert '"a seven 1"' not in (tmp_path / "run" / "report" / "report.md").read_text()


def test_the_plan_knows_what_is_kept(config, coco, judged):
    planned = Plan(load_experiment(config, of_coco(config, coco)), 1).cost_of("report").disk
    kept = sum(file.stat().st_size for file in judged.rglob("*.observed") if "-paths" not in file.parent.name)
    assert 0.98 * kept < planned < kept


@pytest.mark.parametrize("kind", ["pixels", "classifier", "autoencoder"])
def test_what_data_without_a_pretrained_network_is_measured_in(config, coco, judged, folders, tmp_path, kind):
    features = f"features={folders[kind]}"
    run_all(load_experiment(config, of_coco(config, coco, features, "clip=null"), run=str(tmp_path / "run")), Stop())
    found = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["rows"]
    told = {
        "pixels": r"pixels in \[-1, 1\], 192 dimensions; means over 8×8 cells",
        "classifier": "a classifier's last layer, averaged over places, weights [0-9a-f]{8}, 8 dimensions; no resize",
        "autoencoder": "an autoencoder's mean latents over 4×4 cells, weights [0-9a-f]{8}, 64 dimensions; no resize",
    }
    for row in found:
        assert re.fullmatch(told[kind], row["card"]["features"])
        assert row["frechet_distance_real"] > 0 and row["clip_score"] is None
    beside = f"beside=[{judged / 'report' / 'report.json'}]"
    with pytest.raises(ConfigError, match="different protocols: 'features' is"):
        run_all(load_experiment(config, of_coco(config, coco, features, beside), run=str(tmp_path / "other")), Stop())


@pytest.fixture(scope="module")
def folders(config, tmp_path_factory) -> dict[str, str]:
    """What `features` may be, beside Inception."""
    classifier = tmp_path_factory.mktemp("classifier") / "perceptual"
    write_tiny_network(classifier)
    vae = Path(config).parent / "teacher" / "vae"
    return {"pixels": "pixels", "classifier": str(classifier), "autoencoder": str(vae)}


def words_for(run: Path, config: str, changes: list[str]) -> tuple[str, ...]:
    return ("evaluate", config, "--run-dir", str(run), *(word for change in changes for word in ("--set", change)))


@pytest.mark.slow
def test_two_processes_judge_real_images_as_one(config, coco, eye, folders, tmp_path, monkeypatch):
    changes = [eye, *of_coco(config, coco, f"features={folders['classifier']}")]
    for count, run in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        monkeypatch.setenv("XDG_CACHE_HOME", f"{run}-cache")  # where no features are: those are shared, too
        if count == 1:
            run_all(load_experiment(config, changes, run=str(run)), Stop())
        else:
            together(2, *words_for(run, config, changes), module="tests.pipelines.coco_worker")
    assert told(tmp_path / "two") == told(tmp_path / "one")
    assert all(row["clip_score"] and row["diversity"] for row in rows(tmp_path / "two"))


@pytest.mark.slow
def test_commands_that_fill_one_cache_at_once_leave_one_whole_file(config, coco, tmp_path, monkeypatch):
    changes, cache, met = of_coco(config, coco, "features=pixels", "clip=null"), tmp_path / "cache", tmp_path / "met"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    run_all(load_experiment(config, changes, run=str(tmp_path / "alone")), Stop())
    met.mkdir()
    where = environment() | {"XDG_CACHE_HOME": str(cache), "MEET": f"{met} 2"}
    runs = [tmp_path / name for name in ("one", "two")]
    begun = [
        Started("tests.pipelines.coco_worker", *words_for(run, config, changes), cwd=Path.cwd(), environment=where)
        for run in runs
    ]
    for done in [one.ended(timeout=300) for one in begun]:
        assert (done.returncode, "cannot be written" in done.stderr) == (0, False), done.stderr[-3000:]
    assert len([*met.iterdir()]) == 2
    [file], [alone] = (list((place / "instaflow" / "references").iterdir()) for place in (cache, tmp_path / "other"))
    assert file.name == alone.name and file.read_bytes() == alone.read_bytes()
    for run in runs:
        assert told(run) == told(tmp_path / "alone")
        assert not [*(run / "report" / "observed").glob("*-real")]


def test_a_folder_that_changed_is_another_extractor(config, coco, folders, tmp_path):
    folder = tmp_path / "perceptual"
    shutil.copytree(folders["classifier"], folder)

    def stage():
        changes = of_coco(config, coco, f"features={folder}")
        return stage_folders(load_experiment(config, changes, run=str(tmp_path / "run")))["report"]

    stage().folder.mkdir(parents=True)
    stage().begin()
    assert stage().changes() == []
    moved = f"stages.report.features={shutil.copytree(folder, tmp_path / 'moved')}"
    changes = [*of_coco(config, coco), moved]
    assert stage_folders(load_experiment(config, changes, run=str(tmp_path / "run")))["report"].changes() == []
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    [change] = stage().changes()
    assert change.startswith("'features (content)' was ")


@pytest.mark.slow
def test_captions_that_stand_once_are_drawn_from_more_noise(config, coco, tmp_path, monkeypatch):
    """By LPIPS proper, on AlexNet's file in the folder of weights."""
    monkeypatch.setitem(WEIGHTS, "lpips-alex", replace(WEIGHTS["lpips-alex"], sha256=""))
    monkeypatch.setenv("INSTAFLOW_WEIGHTS", str(tmp_path))
    write_backbone(tmp_path / WEIGHTS["lpips-alex"].file, "alex")
    changes = of_coco(config, coco, "features=pixels", "clip=null", "perceptual={network: alex}", "num_samples=4")
    run = tmp_path / "run"
    run_all(load_experiment(config, changes, run=str(run)), Stop())
    for row in rows(run):
        assert row["diversity"] > 0 and (row["perceptual_gap"] == 0) == (row["num_steps"] == 3)
    card = json.loads((run / "report" / "report.json").read_text())["rows"][0]["card"]
    assert card["perceptual"].startswith("LPIPS 0.1 on AlexNet, weights ")
    assert card["diversity"] == "4 images of each of 4 prompts"


def test_another_resize_is_another_protocol(config, coco, judged, tmp_path):
    beside = f"beside=[{judged / 'report' / 'report.json'}]"
    changed = of_coco(config, coco, "features=inception-clean-fid", beside)
    with pytest.raises(ConfigError, match="different protocols: 'features' is"):
        run_all(load_experiment(config, changed, run=str(tmp_path / "run")), Stop())


def test_other_real_images_in_the_same_folder_are_noticed(config, coco, judged):
    def changes() -> list[str]:
        found = load_experiment(config, of_coco(config, coco), run=str(judged))
        return stage_folders(found)["report"].changes()

    assert changes() == []
    more = Path(coco["real"]) / "more.jpg"
    more.write_bytes(b"")
    try:
        [change] = changes()
    finally:
        more.unlink()
    assert change.startswith("'real (content)' was ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("captions=nowhere.json", "nowhere.json"),
        ("real=nowhere", "is no folder"),
        ("num_samples=13", "holds 12 captions, and 13 are asked for"),
        ("protocol=imagenet64-50k", "asks for classes"),
        ("captions=null", "needs a file of them"),
        ("captions_seed=1", "here none are drawn"),
        ("num_samples=3", "greater than or equal to 4"),
        ("real=FEW", "holds 3 images; precision and recall want at least 4"),
        ("beside=[BLANK]", "blank.json' is no report: it has no 'rows'"),
        ("captions=BLANK", "blank.json' holds 0 captions, and 10 are asked for"),
        ("real=null", "needs the folder of the real images"),
        ("features=nowhere", "'stages.report.features' names '.*nowhere', which is no folder here"),
        ("features=.", "is neither a classifier nor an autoencoder: it has no config.json"),
    ],
)
def test_what_is_missing_is_named(config, coco, tmp_path, change, said):
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(Path(coco["real"]).iterdir())[:3]:
        shutil.copy(file, few)
    (tmp_path / "blank.json").write_text('{"annotations": [{"image_id": 1, "id": 1, "caption": " "}]}')
    change = change.replace("FEW", str(few)).replace("BLANK", str(tmp_path / "blank.json"))
    with pytest.raises(InstaFlowError, match=said):
        check_files(load_experiment(config, of_coco(config, coco, change), run=str(tmp_path / "run")), None, None)


@pytest.mark.parametrize("name", ["inception", "clip-vit-g-14"])
def test_missing_weights_are_named_with_the_way_to_them(config, coco, tmp_path, monkeypatch, name):
    other = tmp_path / "weights"
    shutil.copytree(coco["weights"], other)
    (other / WEIGHTS[name].file).unlink()
    monkeypatch.setenv("INSTAFLOW_WEIGHTS", str(other))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(DataError) as error:
        run_all(load_experiment(config, of_coco(config, coco), run=str(tmp_path / "run")), Stop())
    assert WEIGHTS[name].file in error.value.message and f"instaflow weights {name} --fetch" in error.value.hint


def test_digits_know_no_captions_of_one_s_own(config, coco, tmp_path):
    with pytest.raises(ConfigError, match="captions goes with protocol: coco2017-5k"):
        load_experiment(config, [f"stages.report.captions={coco['captions']}"])


def test_the_cut_into_batches_changes_nothing(config, done, tmp_path):
    """Each image has the noise of its own index, and what is kept of the first ones is theirs."""
    run_all(load_experiment(config, ["stages.report.batch_size=9"], run=str(tmp_path / "run")), Stop())
    for ours, theirs in zip(rows(tmp_path / "run"), rows(done), strict=True):
        for name, value in theirs.items():
            near = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float | dict) else value
            assert ours[name] == near, name
    pages = [(place / "report" / "report.html").read_text() for place in (tmp_path / "run", done)]
    paths = [re.findall(r'<circle class="end[^>]*r="4"/>', page) for page in pages]
    assert len(paths[0]) == len(paths[1]) == 6


def test_half_precision_is_another_protocol_with_nearly_the_same_images(config, done, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(done, run)
    run_all(load_experiment(config, ["stages.report.dtype=bfloat16"], run=str(run)), Stop())
    cards = [row["card"] for row in json.loads((run / "report" / "report.json").read_text())["rows"]]
    assert [card["dtype"] for card in cards] == ["bfloat16"] * 3
    for ours, theirs in zip(rows(run), rows(done), strict=True):
        near = pytest.approx(theirs["frechet_distance_real"], rel=0.02)
        assert (
            ours["frechet_distance_real"] == near and ours["frechet_distance_real"] != theirs["frechet_distance_real"]
        )


def test_images_of_different_batches_come_from_different_noise(done):
    for file in (done / "report" / "observed").glob("*/card.json"):
        kept = Observations(file.parent, 20 if file.parent.name.endswith("-paths") else 70, 16).joined()
        values = kept.get("images", kept.get("lengths")).reshape(len(kept.get("seconds", kept.get("lengths"))), -1)
        assert len(np.unique(values, axis=0)) == len(values)


def test_paths_are_followed_on_the_grid_that_was_asked_for(config, done, tmp_path):
    [kept] = [file.parent for file in (done / "report" / "observed").glob("*-paths/card.json")]
    assert Observations(kept, 20, 16).joined()["deviations"].shape == (20, 3)
    run = tmp_path / "run"
    shutil.copytree(done, run)
    run_all(load_experiment(config, ["stages.report.straightness_steps=5"], run=str(run)), Stop())
    profiles = json.loads((run / "report" / "report.json").read_text())["straightness_profiles"]
    assert [len(profile["times"]) for profile in profiles] == [5]


@pytest.mark.parametrize("kept", [2, 11, 40])
def test_few_kept_images_will_do_and_more_are_made_anew(config, done, tmp_path, kept):
    run = tmp_path / "run"
    run_all(load_experiment(config, [f"stages.report.compared_samples={kept}"], run=str(run)), Stop())
    some, whole = ([less(row, "pixel_gap") for row in rows(place)] for place in (run, done))
    assert some == whole  # but for what is measured of the kept ones alone
    run_all(load_experiment(config, run=str(run)), Stop())
    assert rows(run) == rows(done)


def test_raw_weights_that_changed_are_measured_anew(config, tmp_path):
    teacher = write_model(tmp_path / "x" / "model")
    write_model(tmp_path / "x" / "model-raw", seed=1)
    changes = [f"stages.report.models.1={{model: {teacher}, weights: raw, num_steps: [1]}}"]
    run = tmp_path / "run"
    run_all(load_experiment(config, changes, run=str(run)), Stop())
    before = rows(run)[2]["frechet_distance_real"]
    shutil.rmtree(tmp_path / "x" / "model-raw")
    write_model(tmp_path / "x" / "model-raw", seed=2)
    (run / "report" / "done.json").unlink()
    run_all(load_experiment(config, changes, run=str(run)), Stop())
    assert rows(run)[2]["frechet_distance_real"] != before


def test_damage_to_what_was_seen_is_made_good(config, done, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(done, run)
    for file in (run / "report" / "observed").rglob("*.observed"):
        content = bytearray(file.read_bytes())
        content[-40:] = bytes(40)
        file.write_bytes(content)
    (run / "report" / "done.json").unlink()
    run_all(load_experiment(config, run=str(run)), Stop())
    assert rows(run) == rows(done)


def test_a_model_that_draws_no_numbers_is_named(config, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    shutil.copytree(Path(config).parent / "flow", broken)
    [file] = (broken / "unet").glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: torch.full_like(one, torch.nan) for name, one in tensors.items()}, file, {"format": "pt"})
    changes = [f"stages.report.models.1.model={broken}", "stages.report.num_samples=20"]
    with pytest.raises(InstaFlowError, match=f"{broken} draws no images in 1 step: of prompts 0 to 15 some") as error:
        run_all(load_experiment(config, changes, run=str(tmp_path / "run")), Stop())
    assert error.value.hint == "Its weights may have diverged: leave it out"
    model = load_model(str(broken), device=torch.device("cpu"))
    with torch.no_grad():
        model.vae.decoder.conv_out.bias[0] = torch.inf  # latents that are finite, images that are not
    monkeypatch.setattr(observing, "load_model", lambda *_, **__: model)
    [*_, half] = changes, "stages.report.dtype=bfloat16"
    with pytest.raises(InstaFlowError, match="draws no images in 3 steps") as error:
        run_all(load_experiment(config, [changes[1], half], run=str(tmp_path / "half")), Stop())
    assert error.value.hint.endswith("overflow in this precision: leave it out, or try dtype: float32")


TRAINED = """
  pairs:
    {kind: couple, model: TEACHER, prompts: [a seven], count: 16, records_per_shard: 8, num_steps: 2, guidance_scale: 2}
  2rf:
    {kind: reflow, init: TEACHER, couplings: pairs, preview: null, trackers: [],
     phases: [{samples: 17, global_batch_size: 4, learning_rate: 1e-3}]}
"""


def test_what_a_model_cost_is_told_of_whatever_run_made_it(config, tmp_path):
    """Of a stage of the same run, of its folder in another run, and of an earlier report's row."""
    teacher = Path(config).parent / "teacher"
    first = tmp_path / "first.yaml"
    text = Path(config).read_text().replace(str(Path(config).parent / "flow"), "2rf")
    first.write_text(text.replace("stages:", f"stages:{TRAINED.replace('TEACHER', str(teacher))}"))
    small = ["stages.report.num_samples=20", "stages.report.straightness_samples=4"]
    made = tmp_path / "made"
    run_all(load_experiment(str(first), small, run=str(made)), Stop())
    report = json.loads((made / "report" / "report.json").read_text())
    hours = sum(read_done(made / name)["seconds"] for name in ("pairs", "2rf")) / 3600
    told = {"seconds": pytest.approx(3600 * hours), "device_hours": pytest.approx(hours), "devices": [hardware()]}
    cost = {"training_samples": 16, **told}
    assert [row["cost"] for row in report["rows"]] == [{}, {}, cost]

    entries = f"[{{model: {teacher}, num_steps: [3]}}, {{model: {made / '2rf' / 'model'}, num_steps: [2]}}]"
    changes = [*small, f"stages.report.models={entries}", f"stages.report.beside=[{made / 'report' / 'report.json'}]"]
    run_all(load_experiment(config, changes, run=str(tmp_path / "later")), Stop())
    later = json.loads((tmp_path / "later" / "report" / "report.json").read_text())
    assert [row["cost"] for row in later["rows"]] == [{}, cost, {}, {}, cost]
    page = (tmp_path / "later" / "report" / "report.html").read_text()
    assert "Quality against training samples" in page and "Quality against device-minutes" in page

    report["rows"][2]["cost"] = None  # by an earlier version
    (made / "report" / "report.json").write_text(json.dumps(report))
    (tmp_path / "later" / "report" / "done.json").unlink()
    run_all(load_experiment(config, changes, run=str(tmp_path / "later")), Stop())
    later = json.loads((tmp_path / "later" / "report" / "report.json").read_text())
    assert later["rows"][-1]["cost"] == cost


def test_a_student_of_another_run_s_flow_is_a_student_and_has_the_whole_cost(config, tmp_path):
    teacher = Path(config).parent / "teacher"
    own = tmp_path / "own.yaml"
    head, _, report = Path(config).read_text().partition("  report:")
    own.write_text(f"{head}{TRAINED.replace('TEACHER', str(teacher)).strip(chr(10))}\n  report:{report}")
    first, other = tmp_path / "first", tmp_path / "other"
    for name in ("pairs", "2rf"):
        run_one(load_experiment(str(own), run=str(first)), name, Stop())
    phases = "[{samples: 8, global_batch_size: 4, learning_rate: 1e-3}]"
    student = (
        f"kind: distill, init: {first / '2rf' / 'model'}, couplings: {first / 'pairs'}, preview: null, trackers: []"
    )
    own.write_text(f"{head}  student: {{{student}, phases: {phases}}}\n  report:{report}")
    entries = f"[{{model: {teacher}, num_steps: [3]}}, {{model: student, num_steps: [1]}}]"
    small = [f"stages.report.models={entries}", "stages.report.num_samples=20", "stages.report.straightness_samples=4"]
    run_all(load_experiment(str(own), small, run=str(other)), Stop())
    row = json.loads((other / "report" / "report.json").read_text())["rows"][1]
    spent = [read_done(first / "pairs"), read_done(first / "2rf"), read_done(other / "student")]
    assert row["kind"] == "student" and row["cost"]["training_samples"] == 16 + 8
    assert row["cost"]["seconds"] == pytest.approx(sum(done["seconds"] for done in spent))


def test_the_nearest_are_near(done):
    content = json.loads((done / "report" / "report.json").read_text())
    assert content["neighbours"]["shown"][0]["distance"] < 1.5 * content["neighbours"]["median"]


def test_the_worst_gaps_of_a_student_come_first(config, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(Path(config).parent / "flow", student)
    (student / "instaflow.json").write_text((student / "instaflow.json").read_text().replace('"flow"', '"student"'))
    changes = [f"stages.report.models.1.model={student}", "stages.report.compared_samples=30"]
    run_all(load_experiment(config, changes, run=str(tmp_path / "run")), Stop())
    content = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    worst = [gap["distance"] for gap in content["gaps"]["worst"]]
    summary = content["gaps"]["distances"][str(student)]
    assert len(worst) == 12 and worst == sorted(worst, reverse=True) and worst[0] == summary["largest"]
    assert summary["count"] == 30 and worst[-1] > summary["median"]

    other = tmp_path / "other"
    shutil.copytree(student, other)
    entries = f"[{{model: {student}, num_steps: [1]}}, {{model: {other}, num_steps: [1]}}]"
    aims = f"stages.report.aims=[{{model: {student}, figure: frechet_distance_real, value: 9}}]"
    both = [f"stages.report.models={entries}", f"stages.report.reference={{model: {other}, num_steps: 1}}", aims]
    third = tmp_path / "third"
    shutil.copytree(student, third)
    both[0] = both[0].replace("]}]", f"]}}, {{model: {third}, num_steps: [1]}}]")
    run_all(load_experiment(config, both, run=str(tmp_path / "both")), Stop())
    content = json.loads((tmp_path / "both" / "report" / "report.json").read_text())
    assert content["gaps"]["student"] == str(student)  # of which the report is, though another is the last

    alone = [*changes, f"stages.report.reference={{model: {student}, num_steps: 1}}"]
    run_all(load_experiment(config, alone, run=str(tmp_path / "run")), Stop())
    content = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert content["gaps"] is None  # the reference falls short of nothing
