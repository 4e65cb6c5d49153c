"""Runs compared: what is refused with which words, what is written where."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from instaflow.errors import InstaFlowError
from pipelines.compare import run as compare
from tests.compared import change_report, make_run, make_runs
from tests.experiments import SMALL, write
from tests.pipelines.runs import instaflow


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return make_runs(tmp_path / "small")


def refused(*runs: Path) -> tuple[str, str]:
    with pytest.raises(InstaFlowError) as error:
        compare(runs, by="real", output=None)
    assert not list(runs[0].parent.parent.glob("*-report"))
    return error.value.message, error.value.hint


def report_of(run: Path) -> dict:
    return json.loads((run / "report" / "report.json").read_text())


def test_it_writes_beside_the_runs_and_tells_the_ranking(runs):
    lines = compare(runs, by="real", output=None)
    folder = runs[0].parent.with_name("small-report")
    assert sorted(file.name for file in folder.iterdir()) == ["compare.html", "compare.json"]
    content = json.loads((folder / "compare.json").read_text())
    assert [(row["model"], row["num_steps"]) for row in content["rows"]] == [
        ("student", 1),
        ("teacher", 1),
        ("teacher", 25),
    ]
    student = content["rows"][0]
    values = [report_of(run)["rows"][2]["frechet_distance_real"] for run in runs]
    assert student["figures"]["frechet_distance_real"]["mean"] == pytest.approx(np.mean(values))
    assert student["training_samples"] == 24  # 16 of 2rf, 8 of its own
    assert student["description"] == "one-step student from 2rf, on pairs"
    assert content["protocol"]["noise"] == "keyed by the run’s seed and 'evaluate'"
    ranked = [line.split()[:3] for line in lines if re.match(r"[1-9–]", line)]
    assert ranked == [["1*", "student", "1"], ["2", "teacher", "1"], ["1", "teacher", "25"]]
    assert lines[0] == "small: 3 seeds (0, 1, 2)" and lines[-1] == f"The page: {folder / 'compare.html'}"


def test_another_ranking_another_place_and_the_order_of_runs_change_nothing_else(runs, tmp_path):
    compare(runs, by="real", output=tmp_path / "a")
    compare(runs[::-1], by="accuracy", output=tmp_path / "b" / "c")
    contents = [json.loads((tmp_path / place / "compare.json").read_text()) for place in ("a", "b/c")]
    assert [content.pop("by") for content in contents] == ["real", "accuracy"]
    assert contents[0] == contents[1]  # here the ranks are the same


def test_the_evaluate_stages_folders_do_as_well_copied_away_from_their_runs(runs, tmp_path):
    copies = [shutil.copytree(run / "report", tmp_path / "copies" / run.name / "any") for run in runs]
    compare(runs, by="real", output=tmp_path / "a")
    compare(copies, by="real", output=tmp_path / "b")
    contents = [json.loads((tmp_path / place / "compare.json").read_text()) for place in "ab"]
    assert contents[0]["rows"] == contents[1]["rows"]


def test_where_it_goes_when_called_beside_the_runs(runs, monkeypatch):
    monkeypatch.chdir(runs[0].parent)
    compare([Path(run.name) for run in runs], by="real", output=None)
    assert (runs[0].parent.parent / "small-report" / "compare.html").is_file()


# --- what is refused ------------------------------------------------------------------------------------------------


def test_one_run_has_no_spread(runs):
    message, hint = refused(runs[0])
    assert str(runs[0]) in message
    assert hint == "A spread wants at least two seeds; three or more are better"


def test_a_seed_twice_is_no_second_draw(runs, tmp_path):
    again = make_run(tmp_path / "other" / "again", 1)
    assert refused(*runs, again)[0] == f"'{runs[1]}' and '{again}' have the same seed 1"
    assert refused(runs[0], runs[0])[0] == f"'{runs[0]}', given twice, have the same seed 0"


def test_other_settings_are_named_with_their_runs(runs, tmp_path):
    changed = make_run(tmp_path / "small" / "3", 3, "stages.2rf.ema_decay=0.5", "stages.2rf.phases.1.learning_rate=1")
    message, _ = refused(*runs, changed)
    others = ", ".join(f"'{run}'" for run in runs)
    assert f"'stages.2rf.ema_decay' is 0.9999 in {others}, but 0.5 in '{changed}'" in message
    assert f"'stages.2rf.phases.1.learning_rate' is 0.001 in {others}, but 1.0 in '{changed}'" in message


def test_settings_that_change_no_result_may_differ(runs, tmp_path):
    faster = make_run(tmp_path / "small" / "3", 3, "stages.2rf.loader_workers=1", "stages.2rf.micro_batch_size=2")
    compare([*runs, faster], by="real", output=None)


def test_other_prompts_are_another_experiment(runs, tmp_path):
    changed = make_run(tmp_path / "small" / "3", 3, "stages.pairs.prompts=[a nine]")
    assert "'stages.pairs.prompts' is " in refused(*runs, changed)[0]


def test_aims_are_told_of_the_means(runs, tmp_path):
    mean = float(np.mean([report_of(run)["rows"][2]["frechet_distance_real"] for run in runs]))
    aim = {"model": "student", "num_steps": 1, "figure": "frechet_distance_real"}
    for run in runs:
        change_report(run, aims=[{**aim, "value": mean + 0.001}, {**aim, "value": mean - 0.001}])
    lines = compare(runs, by="real", output=tmp_path / "out")
    told = [line.partition(": Fréchet distance to real of 'student' in 1 step at most")[0] for line in lines]
    assert [word for word in told if word in ("reached", "missed")] == ["reached", "missed"]
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [one["reached"] for one in content["aims"]] == [True, False]
    assert content["aims"][0]["came"]["mean"] == pytest.approx(mean)
    assert "<h2>What was aimed at</h2>" in (tmp_path / "out" / "compare.html").read_text()
    change_report(runs[1], aims=[{**aim, "value": 1.0}])
    assert "'aims.0' is 'model student, num_steps 1, figure frechet_distance_real, value " in refused(*runs)[0]


def test_another_protocol_or_other_rows_are_another_experiment(runs):
    protocol = {**report_of(runs[1])["protocol"], "samples": "200"}
    change_report(runs[1], protocol=protocol)
    assert f"'protocol.samples' is '100' in '{runs[0]}', '{runs[2]}', but '200' in '{runs[1]}'" in refused(*runs)[0]
    change_report(runs[1], protocol=report_of(runs[0])["protocol"])  # of seed 0
    assert "'protocol.noise' is " in refused(*runs)[0]
    change_report(runs[1], protocol={**protocol, "samples": "100"}, rows=report_of(runs[1])["rows"][1:])
    assert f"but absent in '{runs[1]}'" in refused(*runs)[0]


@pytest.mark.parametrize(
    "name, value", [("dtype", "bfloat16"), ("prompts", "other ones"), ("image_encoding", "8 bits")]
)
def test_rows_that_were_measured_otherwise_are_another_experiment(runs, name, value):
    rows = report_of(runs[1])["rows"]
    change_report(runs[1], rows=[{**row, "card": {**row["card"], name: value}} for row in rows])
    assert f"'card.{name}' is " in (said := refused(*runs)[0]) and f"but '{value}' in '{runs[1]}'" in said


def test_networks_that_each_seed_trains_to_measure_by_may_differ(runs):
    rows = report_of(runs[1])["rows"]
    own = {"seed": 7, "noise": "its own", "features": "a classifier, SHA-256 0", "perceptual": "another"}
    change_report(runs[1], rows=[{**row, "card": {**row["card"], **own}} for row in rows])
    compare(runs, by="real", output=None)


def test_what_an_earlier_version_s_card_lacks_says_nothing_against_it(runs):
    rows = report_of(runs[1])["rows"]
    for run, kernel in zip(runs[1:], ("10 subsets", "9 subsets"), strict=True):
        change_report(run, rows=[{**row, "card": {**row["card"], "kernel": kernel}} for row in rows])
    assert "'card.kernel' is " in refused(*runs)[0]
    compare(runs[:2], by="real", output=None)


def test_other_hardware_is_said_and_not_refused(runs):
    change_report(
        runs[1], hardware="a toaster", protocol={**report_of(runs[1])["protocol"], "timing": "batches of 100"}
    )
    lines = " ".join(compare(runs, by="real", output=None))
    assert "different hardware" in lines


def test_a_missing_report_names_the_command(runs):
    shutil.rmtree(runs[1] / "report")
    message, hint = refused(*runs)
    assert message == f"'{runs[1]}' has no report"
    assert hint == f"Run first: instaflow run small.yaml --run-dir {runs[1]} --set seed=1"
    message, hint = refused(runs[0], runs[0].parent / "gone")
    assert message == f"'{runs[0].parent / 'gone'}' is no folder of a run"


def test_the_command_names_the_run_s_own_file_where_it_tells(runs):
    (runs[1] / "report" / "done.json").unlink()
    change_report(runs[1], config="mine.yaml")
    assert refused(*runs)[1] == f"Run first: instaflow run mine.yaml --run-dir {runs[1]} --set seed=1"
    assert (
        refused(runs[0], runs[1] / "report")[1]
        == f"Run first: instaflow run mine.yaml --run-dir {runs[1]} --set seed=1"
    )


def test_the_command_of_a_packaged_experiment_works_anywhere(runs):
    for run in runs:
        change_report(run, config="digits.yaml")
    (runs[2] / "report" / "done.json").unlink()
    message, hint = refused(*runs)
    assert message == f"The report in '{runs[2] / 'report'}' is not done"
    assert hint == f"Run first: instaflow run digits --run-dir {runs[2]} --set seed=2"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is damaged"),
        ('{"rows": [', "is damaged"),
        (b"\xff\xfe", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[]", "is no report"),
        ("{}", "is no report: it has no 'rows'"),
        ('{"rows": []}', "is no report: it has no rows"),
        ('{"rows": [{"model": "a"}]}', "is no report"),
    ],
    ids=["empty", "cut", "bytes", "deep", "list", "object", "no rows", "half a row"],
)
def test_a_damaged_report_is_named(runs, content, said):
    file = runs[1] / "report" / "report.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message, hint = refused(*runs)
    assert message.startswith(f"'{file}' {said}")
    assert str(file.parent) in hint


@pytest.mark.parametrize("value", ["0.3", [0.3], True, {}])
def test_a_figure_that_is_no_number_is_named(runs, value):
    rows = report_of(runs[1])["rows"]
    rows[2]["prompt_accuracy"] = value
    change_report(runs[1], rows=rows)
    assert f"student, 'prompt_accuracy' is {value!r}, not a number" in refused(*runs)[0]


def test_a_damaged_stage_file_is_named(runs):
    (runs[2] / "2rf" / "stage.json").write_text("{}")
    assert f"'{runs[2] / '2rf' / 'stage.json'}' is damaged" in refused(*runs)[0]
    (runs[2] / "2rf" / "stage.json").write_text("{")
    assert f"'{runs[2] / '2rf' / 'stage.json'}' is damaged" in refused(*runs)[0]


def test_of_several_reports_one_is_to_be_named(runs):
    shutil.copytree(runs[1] / "report", runs[1] / "report2")
    message, hint = refused(*runs)
    assert message == f"'{runs[1]}' has several reports: report, report2"
    assert hint == f"Name that of each run to compare, say {runs[1] / 'report'}"


def test_a_ranking_by_what_nobody_measured_is_refused(runs):
    for run in runs:
        change_report(run, rows=[{**row, "prompt_accuracy": None} for row in report_of(run)["rows"]])
    with pytest.raises(InstaFlowError, match="--by accuracy"):
        compare(runs, by="accuracy", output=None)


@pytest.mark.slow
def test_real_runs_are_compared_by_what_their_reports_say(tmp_path):
    text = SMALL.replace("reference:", "num_samples: 40\n    straightness_samples: 8\n    reference:")
    config = write(tmp_path, text)
    for seed in (0, 1):
        instaflow("run", config, "--set", f"seed={seed}", "--run-dir", tmp_path / "runs" / str(seed))
    done = instaflow("compare", tmp_path / "runs" / "0", tmp_path / "runs" / "1")
    assert done.stdout.startswith("small: 2 seeds (0, 1)\n")
    rows = json.loads((tmp_path / "runs-report" / "compare.json").read_text())["rows"]
    assert sorted((row["model"], row["num_steps"]) for row in rows) == [("student", 1), ("teacher", 1), ("teacher", 25)]
    for row in rows:
        for seed in (0, 1):
            saved = report_of(tmp_path / "runs" / str(seed))["rows"]
            own = next(r for r in saved if (r["model"], r["num_steps"]) == (row["model"], row["num_steps"]))
            for name, figure in row["figures"].items():
                assert figure["by_seed"][str(seed)] == own[name]


def test_a_sweep_of_guidance_keeps_all_its_rows(runs):
    for run in runs:
        content = report_of(run)
        teacher = next(row for row in content["rows"] if (row["model"], row["num_steps"]) == ("teacher", 1))
        swept = [
            {
                **teacher,
                "guidance_scale": scale,
                "swept": True,
                "frechet_distance_real": teacher["frechet_distance_real"] * scale,
            }
            for scale in (1.0, 2.0)
        ]
        change_report(run, rows=[row for row in content["rows"] if row is not teacher] + swept)
    compare(runs, by="real", output=None)
    folder = runs[0].parent.with_name("small-report")
    content = json.loads((folder / "compare.json").read_text())
    found = {
        row["guidance_scale"]: row["figures"]["frechet_distance_real"]["mean"]
        for row in content["rows"]
        if row["swept"]
    }
    assert len(found) == 2 and found[2.0] == pytest.approx(2 * found[1.0])
    assert "teacher (guidance 2)" in (folder / "compare.html").read_text()
