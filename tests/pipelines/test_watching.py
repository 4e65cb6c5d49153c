"""Checkpoints scored while a training goes on: by the report's own figures, each once."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from instaflow.config import load_experiment
from instaflow.errors import ConfigError, InstaFlowError, Interrupted
from instaflow.evaluation.observations import Observations
from instaflow.files import write_json
from instaflow.interruption import Stop
from instaflow.models.text_to_image import TextToImage
from instaflow.rundir import StageFolder, locked, stage_folders
from instaflow.world import hardware
from pipelines import watching
from pipelines.experiment import run_all, run_one
from pipelines.trainings import checkpoints_of, cost_at, hold, model_at
from tests.browser import chromium, faults_of, needs_chromium
from tests.models.made import load, write_edm, write_flow, write_model
from tests.pipelines.runs import environment, instaflow, start, together
from tests.pipelines.started import Started
from tests.training.made import StopAt

CPU = torch.device("cpu")
KEPT = "ema_decay: 0.6, trackers: [], checkpoint_every: 4, keep_checkpoint_every: 4"
PHASE = "{samples: 8, global_batch_size: 4, learning_rate: 1e-3}"
TRAINED = """
  2rf:
    {kind: reflow, init: TEACHER, couplings: pairs, preview: null, KEPT,
     phases: [{samples: 9, global_batch_size: 4, learning_rate: 1e-3}, PHASE]}
"""
OTHERS = """
  kept: {kind: reflow, init: TEACHER, couplings: pairs, preview: null, parametrization: epsilon, KEPT, phases: [PHASE]}
  stacked: {kind: reflow, init: TEACHER, couplings: pairs, preview: null, stacked: true, KEPT, phases: [PHASE]}
  student: {kind: distill, init: FLOW, couplings: pairs, preview: null, KEPT, phases: [PHASE]}
  halved:
    {kind: distill, method: progressive, init: TEACHER, couplings: pairs, guidance_scale: 3, KEPT,
     phases: [{num_steps: 2, samples: 9, global_batch_size: 4, learning_rate: 1e-3},
              {num_steps: 1, samples: 8, global_batch_size: 4, learning_rate: 1e-3}]}
  matched:
    {kind: distill, method: dmd, init: TEACHER, teacher: TEACHER, prompts: [a seven], guidance_scale: 1, num_steps: 4,
     KEPT, phases: [PHASE]}
  digits:
    {kind: couple, model: EDM, prompts: ["3", "8"], count: 8, records_per_shard: 8, batch_size: 8, num_steps: 3,
     guidance_scale: 1, sampler: heun}
  pixels:
    {kind: distill, init: EDM, couplings: digits, parametrization: epsilon, preview: null, KEPT, phases: [PHASE]}
"""
REPORT = """
  report:
    kind: evaluate
    protocol: digits
    models:
      - {model: TEACHER, num_steps: [3]}
      - {model: 2rf, num_steps: [2, 1]}
    reference: {model: TEACHER, num_steps: 3}
    num_samples: 20
    batch_size: 10
    straightness_samples: 4
    straightness_steps: 2
"""
TEXT = """
run: unused
stages:
  pairs:
    {kind: couple, model: TEACHER, prompts: [a seven, an odd digit, the digit 4], count: 16, records_per_shard: 8,
     batch_size: 8, num_steps: 2, guidance_scale: 2}
"""
FIGURES = ("frechet_distance_real", "frechet_distance_teacher", "kernel_distance", "precision", "recall")
SAMPLES = [4, 8, 12, 16]  # nine make two whole batches
BATCHES = 4 * 2 * 2  # of ten images each: four checkpoints, two rows


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("watched")
    places = {"TEACHER": write_model(folder / "teacher"), "FLOW": write_flow(folder / "flow", "velocity")}
    places["EDM"] = write_edm(folder / "edm")
    for name, text in (("small", TEXT + TRAINED + REPORT), ("others", TEXT + OTHERS)):
        for key, place in {"KEPT": KEPT, "PHASE": PHASE, **places}.items():
            text = text.replace(key, str(place))
        (folder / f"{name}.yaml").write_text(text)
    return str(folder / "small.yaml")


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> Path:
    """A run whose training is done, with all of its checkpoints, and no report."""
    run = tmp_path_factory.mktemp("trained") / "run"
    for name in ("pairs", "2rf"):
        run_one(load_experiment(config, run=str(run)), name, Stop())
    return run


@pytest.fixture(scope="module")
def others(config, tmp_path_factory) -> dict[str, StageFolder]:
    run = tmp_path_factory.mktemp("others") / "run"
    experiment = load_experiment(config.replace("small", "others"), run=str(run))
    run_all(experiment, Stop())
    return stage_folders(experiment)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watching, "POLL", 0.05)


def copied(run: Path, place: Path) -> Path:
    return Path(shutil.copytree(run, place / "run"))


def watch(config: str, run: Path, *changes: str, stop=None) -> None:
    watching.run(load_experiment(config, changes, run=str(run)), None, stop or Stop())


def scores(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "report" / "watch" / "scores.jsonl").read_text().splitlines()]


def by_row(lines: list[dict]) -> dict[tuple, dict]:
    """The figures at each checkpoint of each row."""
    found = {(line["weights"], line["num_steps"], line["samples_seen"]): line for line in lines}
    assert len(found) == len(lines)  # none twice
    return {key: {name: line[name] for name in (*FIGURES, "prompt_accuracy")} for key, line in found.items()}


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def drawn(monkeypatch) -> list[Path]:
    """Where batches are kept from now on."""
    batches: list[Path] = []
    write = Observations.write

    def noted(self, batch, observed, made):
        batches.append(self._file(batch))
        write(self, batch, observed, made)

    monkeypatch.setattr(Observations, "write", noted)
    return batches


@pytest.mark.parametrize("name", ["kept", "stacked", "student", "halved", "matched", "pixels"])
def test_a_checkpoint_is_the_model_that_the_folder_would_hold(others, name):
    stage = others[name]
    for weights, folder in (("ema", "model"), ("raw", "model-raw")):
        found, ours = checkpoints_of(stage, weights), load(stage.folder / folder)
        assert sorted(found) == (SAMPLES if name == "halved" else [4, 8])
        theirs = model_at(stage, found[max(found)], CPU)
        assert theirs.settings.class_names == ours.settings.class_names
        for key in ("kind", "parametrization", "num_steps", "guidance_scale"):
            assert getattr(theirs.settings, key) == getattr(ours.settings, key)
        assert type(theirs.scheduler) is type(ours.scheduler)
        start = torch.randn(2, *ours.latent_shape, generator=torch.Generator().manual_seed(0))
        prompts = ["3", "8"] if name == "pixels" else ["a seven", "an odd digit"]
        assert torch.equal(theirs.sample(start, prompts), ours.sample(start, prompts))
        early = model_at(stage, found[4], CPU).sample(start, prompts)
        assert not torch.equal(early, ours.sample(start, prompts))


def test_what_a_checkpoint_cost(others):
    stage = others["halved"]
    lines = [(line["job"], line["samples_seen"], line["seconds"]) for line in stage.stats() if "loss" in line]
    seconds = {(job, seen): took for job, seen, took in lines}
    assert cost_at(stage, 4) == {"updates": 1, "training_seconds": seconds["2-steps", 4]}
    assert cost_at(stage, 8) == {"updates": 2, "training_seconds": seconds["2-steps", 8]}
    assert cost_at(stage, 16) == {"updates": 4, "training_seconds": seconds["1-step", 8]}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where a run lies that was watched and then measured, once the first of two tests is done."""
    return tmp_path_factory.mktemp("whole")


def test_every_checkpoint_is_scored_once_and_as_the_report_does(config, trained, place, monkeypatch, capsys):
    run, batches = copied(trained, place), drawn(monkeypatch)
    before = tree(run / "2rf")
    watch(config, run)
    assert tree(run / "2rf") == before
    assert "2rf at 4 of 16 samples, 1 step: Fréchet distance " in capsys.readouterr().out
    found = by_row(scores(run))
    assert sorted(found) == sorted(("ema", count, samples) for count in (1, 2) for samples in SAMPLES)
    first = scores(run)[0]
    assert (first["model"], first["samples_seen"], first["updates"]) == ("2rf", 16, 4)  # the newest goes first
    assert first["training_seconds"] > 0
    card, reference = first["card"], first["reference"]
    assert card["model_content"].endswith(" at 16") and card["protocol"] == "digits" and card["straightness"] == ""
    assert (card["batch_size"], card["processes"], card["hardware"]) == (10, 1, hardware())
    assert card["versions"]["torch"] and (reference["num_steps"], reference["guidance_scale"]) == (3, 7.5)
    assert len(batches) == BATCHES + 2
    assert {path.name for path in (run / "report").iterdir()} == {"observed", "watch"}
    left = {path.suffix for path in (run / "report" / "watch").rglob("*.*")}
    assert not left & {".observed", ".safetensors"}

    batches.clear()
    watch(config, run)
    assert not batches and len(scores(run)) == 8

    run_all(load_experiment(config, run=str(run)), Stop())
    report = json.loads((run / "report" / "report.json").read_text())
    for row in report["rows"][1:]:
        own = found[row["weights"], row["num_steps"], 16]
        assert own == {name: row[name] for name in own}  # of the folder that training ended with
    assert not [path for path in batches if path.parent.name == teacher_of(run)]  # the reference was there
    assert [curve["samples_seen"] for curve in report["scores"]] == [SAMPLES] * 2
    assert "Score over training" in (run / "report" / "report.html").read_text()


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["watch/watch.html", "report.html"])
def test_the_pages_of_a_real_run_read_well_and_ask_for_nothing(config, trained, place, name, width):
    if not (place / "run" / "report" / "report.html").exists():  # this test runs by itself
        watch(config, copied(trained, place))
        run_all(load_experiment(config, run=str(place / "run")), Stop())
    with chromium() as browser:
        assert faults_of(browser, place / "run" / "report" / name, width=width) == []


def test_another_reference_begins_another_curve(config, trained, tmp_path):
    run, one = copied(trained, tmp_path), ["stages.report.models.1.num_steps=[1]"]
    for samples in SAMPLES[:3]:
        shutil.rmtree(run / "2rf" / "checkpoints" / f"{samples:012d}")
    watch(config, run, *one)
    other = [*one, "stages.report.models.0.num_steps=[3, 4]", "stages.report.reference.num_steps=4"]
    watch(config, run, *other)
    assert [(line["samples_seen"], line["reference"]["num_steps"]) for line in scores(run)] == [(16, 3), (16, 4)]
    to_teacher = [line["frechet_distance_teacher"] for line in scores(run)]
    run_all(load_experiment(config, other, run=str(run)), Stop())
    [curve] = json.loads((run / "report" / "report.json").read_text())["scores"]
    assert [row["frechet_distance_teacher"] for row in curve["rows"]] == to_teacher[1:] != to_teacher[:1]


def teacher_of(run: Path) -> str:
    """The folder of the reference's images."""
    cards = (run / "report" / "observed").glob("*/card.json")
    return next(
        file.parent.name
        for file in cards
        if json.loads(file.read_text())["num_steps"] == 3 and "-paths" not in file.parent.name
    )


@pytest.mark.parametrize("calls", [1, 4])
def test_a_stopped_watch_goes_on_without_a_batch_twice(config, trained, tmp_path, monkeypatch, calls):
    run, batches = copied(trained, tmp_path), drawn(monkeypatch)
    with pytest.raises(Interrupted) as stopped:
        watch(config, run, stop=StopAt(calls))
    assert stopped.value.hint.endswith("--stage report --watch")
    held = list((run / "report" / "watch").rglob("*.safetensors"))
    assert len(held) == (calls > 1)
    for _ in held:
        shutil.rmtree(run / "2rf" / "checkpoints" / f"{16:012d}")
    watch(config, run)
    assert len(batches) == len(set(batches)) == BATCHES + 2
    assert len(by_row(scores(run))) == 8


@pytest.mark.slow
def test_a_watch_that_was_killed_again_and_again_scores_nothing_twice(config, trained, tmp_path, monkeypatch):
    """While it samples, between the lines of a checkpoint's two rows, and before it clears up."""
    run, batches = copied(trained, tmp_path), drawn(monkeypatch)
    where, file = environment() | {"BATCHES": str(tmp_path / "batches")}, run / "report" / "watch" / "scores.jsonl"
    for kill, lines in (("batch 4", 0), ("line 2", 1), ("clear 1", 2)):
        words = ["evaluate", config, "--run-dir", str(run), "--watch"]
        watcher = Started("tests.pipelines.killed_worker", *words, cwd=Path.cwd(), environment={**where, "KILL": kill})
        done = watcher.ended(timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (file.read_text().count("\n") if file.exists() else 0) == lines
    watch(config, run)
    before = (tmp_path / "batches").read_text().splitlines()
    batches = [*before, *map(str, batches)]
    assert len(batches) == len(set(batches)) == BATCHES + 2
    assert len(by_row(scores(run))) == 8
    assert {path.name for path in (run / "report" / "watch").iterdir()} == {".lock", "scores.jsonl", "watch.html"}


def test_a_checkpoint_that_training_removes_is_told_and_left_out(config, trained, tmp_path, monkeypatch, capsys):
    run, tried = copied(trained, tmp_path), []

    def too_late(file, place):
        if not tried:
            shutil.rmtree(file.parent)
        tried.append(file)
        return hold(file, place)

    monkeypatch.setattr(watching, "hold", too_late)
    watch(config, run, "stages.report.models.1.num_steps=[1]")
    assert [line["samples_seen"] for line in scores(run)] == [12, 8, 4]
    assert "2rf at 16 of 16 samples: its checkpoint was removed before it could be scored" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["weights", "two steps"])
def test_a_checkpoint_that_draws_no_images_is_noted_and_the_watch_goes_on(
    config, trained, tmp_path, monkeypatch, capsys, broken
):
    """By its weights it draws none at all; or it draws some in one step, and not all of those in two."""
    run, batches = copied(trained, tmp_path), drawn(monkeypatch)
    if broken == "weights":
        diverge(run / "2rf" / "checkpoints" / f"{12:012d}" / "ema.safetensors")
    else:
        sample = TextToImage.sample

        def diverged(self, noise, *words, num_steps, **options):
            latents = sample(self, noise, *words, num_steps=num_steps, **options)
            if num_steps == 2 and "000000000012" in str(loaded):
                latents[1] = torch.inf
            return latents

        loaded: list[Path] = []
        monkeypatch.setattr(TextToImage, "sample", diverged)
        load_at = watching.model_at
        monkeypatch.setattr(
            watching, "model_at", lambda *words: (loaded.__setitem__(slice(None), [words[1]]), load_at(*words))[1]
        )
    watch(config, run)
    told = capsys.readouterr().out
    assert "report: at 12 of 16 samples 2rf draws no images in 2 steps" in told
    assert "2rf was scored at 3 checkpoints and in part or not at all at 1; " in told
    lost = {line["curve"]: line for line in scores(run) if "diverged" in line}
    assert len(lost) == len([line for line in scores(run) if "diverged" in line]) == (2 if broken == "weights" else 1)
    assert all(line["samples_seen"] == 12 and "not finite" in line["diverged"] for line in lost.values())
    at = sorted((line["num_steps"], line["samples_seen"]) for line in scores(run) if "diverged" not in line)
    one = [4, 8, 16] if broken == "weights" else SAMPLES
    assert at == [*((1, seen) for seen in one), *((2, seen) for seen in (4, 8, 16))]
    page = (run / "report" / "watch" / "watch.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "in 2 steps has no score after 12 training samples" in page and "as it trained" in page
    assert ("in 1 step has no score after 12" in page) == (broken == "weights") and "no score yet" not in page
    assert {path.name for path in (run / "report" / "watch").iterdir()} == {".lock", "scores.jsonl", "watch.html"}

    batches.clear()
    before = scores(run)
    watch(config, run)
    assert not batches and scores(run) == before  # nor is it tried again
    run_all(load_experiment(config, run=str(run)), Stop())
    report = json.loads((run / "report" / "report.json").read_text())
    assert [curve["samples_seen"] for curve in report["scores"]] == [[4, 8, 16], one]


def diverge(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: torch.full_like(value, torch.nan) for name, value in tensors.items()}, file)


@pytest.mark.slow
def test_processes_that_watch_together_go_on_alike_where_one_alone_draws_no_images(config, trained, tmp_path):
    """The second process's batch: only its noise is too much for the weights."""
    run = copied(trained, tmp_path)
    done = together(2, "evaluate", config, "--run-dir", run, "--watch", module="tests.pipelines.diverging_worker")
    assert "report: at 12 of 16 samples 2rf draws no images" in done.stdout
    assert [line["samples_seen"] for line in scores(run) if "diverged" in line] == [12, 12]
    assert len(scores(run)) - 2 == 3 * 2


def test_raw_weights_are_scored_beside_their_average(config, trained, tmp_path):
    run = copied(trained, tmp_path)
    for samples in SAMPLES[:3]:
        shutil.rmtree(run / "2rf" / "checkpoints" / f"{samples:012d}")
    (run / "2rf" / "checkpoints" / f".{20:012d}.tmp").mkdir()  # one that is being written
    model = load_experiment(config).stages["report"].models[0].model
    entries = f"{{model: {model}, num_steps: [3]}}, {{model: 2rf, num_steps: [1]}}"
    changes = [f"stages.report.models=[{entries}, {{model: 2rf, weights: raw, num_steps: [1]}}]"]
    watch(config, run, *changes)
    found = by_row(scores(run))
    assert sorted(found) == [("ema", 1, 16), ("raw", 1, 16)]
    assert found["ema", 1, 16] != found["raw", 1, 16]
    run_all(load_experiment(config, changes, run=str(run)), Stop())
    for row in json.loads((run / "report" / "report.json").read_text())["rows"][1:]:
        own = found[row["weights"], 1, 16]
        assert own == {name: row[name] for name in own}


def test_a_held_file_outlives_its_checkpoint(tmp_path, monkeypatch):
    for case, refused in (("linked", False), ("copied", True)):
        file, place = tmp_path / case / "000000000004" / "ema.safetensors", tmp_path / case / "held" / "4.safetensors"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"weights")
        with monkeypatch.context() as patch:
            if refused:
                patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links")))
            assert hold(file, place)
        assert (file.stat().st_nlink == 1) is refused
        shutil.rmtree(file.parent)
        assert place.read_bytes() == b"weights" and hold(tmp_path / "gone", place.with_name("8")) is False
        assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_a_training_made_anew_begins_another_curve(config, trained, tmp_path):
    run, one = copied(trained, tmp_path), "stages.report.models.1.num_steps=[1]"
    watch(config, run, one)
    record = json.loads((run / "2rf" / "stage.json").read_text())
    record["identity"]["weight_decay"] = 0.5
    write_json(run / "2rf" / "stage.json", record)
    with pytest.raises(ConfigError, match=r"'weight_decay' was 0\.5, is now 0\.01"):
        watch(config, run, one)
    watch(config, run, one, "stages.2rf.weight_decay=0.5")
    assert [line["samples_seen"] for line in scores(run)] == 2 * SAMPLES[::-1]
    assert len({line["curve"] for line in scores(run)}) == 2


def test_what_cannot_be_watched_is_named(config, tmp_path):
    model = load_experiment(config).stages["report"].models[0].model
    alone = f"stages.report.models=[{{model: {model}, num_steps: [3]}}]"
    with pytest.raises(ConfigError, match=r"nothing to watch: of its models \('/.*teacher'\) none is made by"):
        watch(config, tmp_path / "run", alone)
    reference = f"{{model: {model}, num_steps: 3}}"
    again = f"stages.again={{kind: evaluate, protocol: digits, models: [{{model: {model}, num_steps: [3]}}], "
    with pytest.raises(ConfigError, match="has several reports: report, again"):
        watch(config, tmp_path / "run", f"{again}reference: {reference}}}")
    with pytest.raises(ConfigError, match="has no stage of kind 'evaluate'"):
        watch(config.replace("small", "others"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_do_not_watch_for_one_report(config, trained, tmp_path):
    run = copied(trained, tmp_path)
    with locked(run / "report" / "watch"), pytest.raises(InstaFlowError, match="is being worked on by process"):
        watch(config, run)


@pytest.mark.slow
def test_a_training_elsewhere_is_watched_from_before_its_beginning_to_its_end(config, tmp_path):
    """Another process makes pairs and trains on them while this one watches."""
    run = tmp_path / "run"
    arguments = ["--run-dir", run, "--stage", "report", "--watch"]
    watcher = start("evaluate", config, *arguments)
    while watcher.told("out").count("\n") < 2 and watcher.poll() is None:
        time.sleep(0.02)
    assert watcher.told("out").splitlines()[1:] == ["report: the training of 2rf is not begun"]
    instaflow("couple", config, "--run-dir", run)
    instaflow("reflow", config, "--run-dir", run)
    done = watcher.ended(timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2rf was scored at 4 checkpoints" in done.stdout
    assert {line["samples_seen"] for line in scores(run)} == {*SAMPLES}


@pytest.mark.slow
def test_processes_that_watch_together_score_shards_as_one(config, trained, tmp_path):
    """A training under ZeRO 2 by two processes, watched by two: to the figures that one has of its folder."""
    run = copied(trained, tmp_path)
    shutil.rmtree(run / "2rf")
    zero = ["--run-dir", run, "--set", "stages.2rf.zero_stage=2"]
    together(2, "reflow", config, *zero)
    together(2, "evaluate", config, *zero, "--stage", "report", "--watch")
    found = by_row(scores(run))
    assert len(found) == 8
    run_all(load_experiment(config, ["stages.2rf.zero_stage=2"], run=str(run)), Stop())
    for row in json.loads((run / "report" / "report.json").read_text())["rows"][1:]:
        own = found[row["weights"], row["num_steps"], 16]
        assert own == pytest.approx({name: row[name] for name in own}, rel=1e-4)
