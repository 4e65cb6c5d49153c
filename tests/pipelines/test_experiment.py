"""The order of stages and what is recorded of them; the stages' own work is left out."""

import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest

from instaflow.config import load_experiment
from instaflow.errors import InstaFlowError, Interrupted
from instaflow.evaluation.report import report_json
from instaflow.files import write_json
from instaflow.interruption import Stop
from instaflow.rundir import locked
from pipelines import experiment
from tests.compared import made_report, made_row
from tests.experiments import folders, mark_done, write


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write(tmp_path)


@pytest.fixture
def worked(monkeypatch):
    """The stages that were worked on, in order; each ends as done, or as `ending` says."""
    names: list[str] = []
    names_that_end: dict[str, BaseException] = {}

    def work(module, stage, stop):
        names.append(stage.name)
        if stage.name in names_that_end:
            raise names_that_end[stage.name]
        stage.log(loss=1.0)
        stage.finish(f"content of {stage.name}")

    monkeypatch.setattr(experiment, "work", work)
    for kind in ("teacher", "couple", "reflow", "distill", "evaluate"):
        monkeypatch.setitem(sys.modules, f"pipelines.{kind}", ModuleType(kind))
    return names, names_that_end


def state(stage) -> dict:
    return json.loads((stage.folder / "state.json").read_text())


def test_a_run_takes_every_stage_once_and_in_order(config, worked, capsys):
    experiment.run_all(load_experiment(config), Stop())
    experiment.run_all(load_experiment(config), Stop())
    assert worked[0] == ["teacher", "pairs", "2rf", "student", "report"]
    out = capsys.readouterr().out
    assert out.count("done before") == 5
    assert out.endswith('report.html\nImages in one step: instaflow sample runs/small/student/model --prompt "..."\n')


@pytest.mark.parametrize(
    ("best", "kind", "weights", "command"),
    [
        ("student", "student", "ema", "student/model"),
        ("student", "student", "raw", "student/model-raw"),
        ("2rf", "flow", "ema", "2rf/model --num-steps 1"),
    ],
)
def test_a_run_ends_with_the_best_one_step_model_of_its_report(
    config, worked, tmp_path, capsys, best, kind, weights, command
):
    """Not with the one that was distilled last, nor with one step of the teacher."""
    rows = [
        made_row("teacher", "teacher", 1, 0.1),
        made_row("other", "direct", 1, 0.4),
        replace(made_row(best, kind, 1, 0.3), weights=weights),
        made_row("teacher", "teacher", 25, 0.2),
    ]
    run = tmp_path / "runs" / "small"
    for name in ("model", "model-raw"):
        (run / best / name).mkdir(parents=True)
    (run / "report").mkdir()
    write_json(run / "report" / "report.json", report_json(replace(made_report(0, []), rows=rows)))
    experiment.run_all(load_experiment(config), Stop())
    told = f"Images in one step, by the report's best: instaflow sample runs/small/{command} --prompt"
    assert told in capsys.readouterr().out.splitlines()[-1]
    (run / "report" / "report.json").write_text("{")
    experiment.run_all(load_experiment(config), Stop())
    assert "Images in one step: instaflow sample runs/small/student/model " in capsys.readouterr().out


def test_a_kind_runs_what_it_can_and_tells_what_waits(config, worked, tmp_path, capsys):
    text = (tmp_path / "small.yaml").read_text()
    text += "  pairs2: {kind: couple, model: 2rf, prompts: [a], count: 8, guidance_scale: 1}\n"
    found = load_experiment(write(tmp_path, text))
    experiment.run_kind(found, "teacher", Stop())
    experiment.run_kind(found, "couple", Stop())
    assert worked[0] == ["teacher", "pairs"]
    assert "'pairs2' waits for '2rf'" in capsys.readouterr().out


def test_a_stage_that_comes_before_another_of_its_kind_runs_first(config, worked, tmp_path):
    text = (tmp_path / "small.yaml").read_text()
    phases = "[{samples: 8, global_batch_size: 4, learning_rate: 1e-3}]"
    text += f"  3rf: {{kind: reflow, init: 2rf, couplings: pairs, phases: {phases}}}\n"
    found = load_experiment(write(tmp_path, text))
    for kind in ("teacher", "couple", "reflow"):
        experiment.run_kind(found, kind, Stop())
    assert worked[0] == ["teacher", "pairs", "2rf", "3rf"]


@pytest.mark.parametrize(
    ("error", "expected", "reason"),
    [
        (Interrupted("Stage 'pairs' stopped (SIGTERM)"), "interrupted", "Stage 'pairs' stopped (SIGTERM)"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (InstaFlowError("the loss is not finite"), "failed", "the loss is not finite"),
        (ZeroDivisionError(), "failed", "ZeroDivisionError"),
    ],
)
def test_how_a_stage_ended_is_recorded_and_what_follows_it_is_left(config, worked, error, expected, reason):
    names, endings = worked
    endings["pairs"] = error
    with pytest.raises(type(error)):
        experiment.run_all(load_experiment(config), Stop())
    stages = folders(config)
    assert state(stages["teacher"])["state"] == "done"
    assert state(stages["pairs"]) == {"state": expected, "reason": reason}
    assert not stages["pairs"].is_done()
    assert names == ["teacher", "pairs"]
    endings.clear()
    experiment.run_all(load_experiment(config), Stop())
    assert names == ["teacher", "pairs", "pairs", "2rf", "student", "report"]


def test_an_unfinished_stage_with_other_settings_is_refused_before_its_work(config, worked):
    names, endings = worked
    endings["teacher"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        experiment.run_all(load_experiment(config), Stop())
    before = folders(config)["teacher"].folder.joinpath("stage.json").read_bytes()
    with pytest.raises(InstaFlowError, match="'seed' was 0, is now 1"):
        experiment.run_all(load_experiment(config, ["seed=1"]), Stop())
    assert names == ["teacher"]
    assert folders(config)["teacher"].folder.joinpath("stage.json").read_bytes() == before


def test_a_stage_held_by_another_process_is_not_touched(config, worked):
    stage = folders(config)["teacher"]
    with locked(stage.folder), pytest.raises(InstaFlowError, match="is being worked on by process"):
        experiment.run_all(load_experiment(config), Stop())
    assert worked[0] == []
    assert [path.name for path in stage.folder.iterdir()] == [".lock"]


def test_raw_weights_that_are_nowhere_are_missed_before_the_first_stage(config, worked, tmp_path):
    (tmp_path / "other" / "model").mkdir(parents=True)
    entry = f"{{model: {tmp_path}/other/model, weights: raw, num_steps: [1]}}"
    found = load_experiment(config, [f"stages.report.models.1={entry}"])
    with pytest.raises(InstaFlowError, match=r"'report': '.*other/model' has no raw weights"):
        experiment.run_all(found, Stop())
    assert worked[0] == []
    (tmp_path / "other" / "model-raw").mkdir()
    experiment.run_all(found, Stop())
    assert worked[0][-1] == "report"


def test_what_a_loss_lacks_is_missed_before_the_first_stage(config, worked, monkeypatch, tmp_path):
    change = f"stages.student.perceptual={{weights: {tmp_path / 'w.pth'}}}"
    found = load_experiment(config, [change, "stages.student.phases.0.loss=lpips"])
    with pytest.raises(InstaFlowError, match="There is no file") as caught:
        experiment.run_all(found, Stop())
    assert "alexnet-owt-7be5be79.pth" in caught.value.hint
    folder = load_experiment(config, [f"stages.student.perceptual={{network: {tmp_path}}}", *found.overrides[1:]])
    with pytest.raises(InstaFlowError, match=r"is no perceptual network: it lacks config\.json and model\.safetensors"):
        experiment.run_all(folder, Stop())
    (tmp_path / "w.pth").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InstaFlowError, match=r"'stages\.student': perceptual\.network: alex needs lpips") as caught:
        experiment.run_all(found, Stop())
    assert caught.value.hint == "pip install lpips" and worked[0] == []


def test_one_stage_runs_alone(config, worked):
    mark_done(folders(config)["teacher"])
    experiment.run_one(load_experiment(config), "pairs", Stop())
    assert worked[0] == ["pairs"]
