import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from instaflow.config import load_experiment
from instaflow.errors import ConfigError, DataError, InstaFlowError
from instaflow.rundir import locked, read_done, read_stats, stage_folders
from instaflow.world import Worker
from tests.experiments import SMALL, folders, mark_done, write

HOLD = """
import sys, time
from pathlib import Path
from instaflow.rundir import locked
from tests.experiments import folders

stage = folders(sys.argv[1], run=Path(sys.argv[2]))["teacher"]
with locked(stage.folder):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def config(tmp_path):
    return write(tmp_path)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def refusal(stage) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        stage.check_identity()
    return caught.value


# --- identity -------------------------------------------------------------------------------------------------------


def test_the_same_settings_go_on(config, run):
    mark_done(folders(config, run=run)["teacher"])
    folders(config, run=run)["teacher"].check_identity()


def test_a_stage_that_never_began_has_nothing_to_compare(config, run):
    folders(config, "stages.teacher.ema_decay=0.5", run=run)["teacher"].check_identity()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.teacher.ema_decay=0.5", "'ema_decay' was 0.9999, is now 0.5"),
        ("stages.teacher.phases.0.samples=16", "'phases.0.samples' was 8, is now 16"),
        ("seed=1", "'seed' was 0, is now 1"),
        (
            "stages.teacher.phases=[{samples: 8, global_batch_size: 4, learning_rate: 1e-3},"
            " {samples: 4, global_batch_size: 4, learning_rate: 1e-3}]",
            "'phases.1.samples' was absent, is now 4",
        ),
    ],
)
def test_changed_settings_are_refused_with_key_old_and_new(config, run, override, words):
    mark_done(folders(config, run=run)["teacher"])
    error = refusal(folders(config, override, run=run)["teacher"])
    assert error.message.startswith(f"Stage 'teacher' in '{run}' was made with other settings: ")
    assert words in error.message
    assert "weight_decay" not in error.message  # what is the same is not told
    assert f"delete '{run / 'teacher'}'" in error.hint


@pytest.mark.parametrize(
    "override",
    ["micro_batch_size=2", "checkpoint_every=8", "zero_stage=3", "keep_checkpoints=5", "keep_checkpoint_every=9"],
)
def test_what_does_not_change_the_result_may_change(config, run, override):
    mark_done(folders(config, run=run)["teacher"])
    folders(config, f"stages.teacher.{override}", run=run)["teacher"].check_identity()


def test_previews_may_come_and_go(config, run):
    stages = folders(config, run=run)
    for name in ("teacher", "pairs", "2rf"):
        mark_done(stages[name])
    for change in ("null", "{every: 8}"):
        folders(config, f"stages.2rf.preview={change}", run=run)["2rf"].check_identity()


def test_a_loss_s_weights_count_by_content(config, run, tmp_path):
    def student(place):
        loss = f"stages.student.perceptual={{network: alex, weights: {place}, decoder: {tmp_path / 'tiny'}}}"
        return folders(config, "stages.student.phases.0.loss=lpips", loss, run=run)["student"]

    for name in ("teacher", "pairs", "2rf"):
        mark_done(folders(config, run=run)[name])
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    for name, content in (("one", b"1"), ("same", b"1"), ("other", b"2")):
        (tmp_path / name).write_bytes(content)
    mark_done(student(tmp_path / "one"))
    assert str(tmp_path) not in json.dumps(json.loads((run / "student" / "stage.json").read_text())["identity"])
    student(tmp_path / "same").check_identity()
    assert "'perceptual.weights (content)' was '" in refusal(student(tmp_path / "other")).message
    student(tmp_path / "gone").check_identity()  # done, it needs them no more
    (tmp_path / "tiny" / "config.json").write_text("{ }")
    assert "'perceptual.decoder (content)' was '" in refusal(student(tmp_path / "one")).message
    assert "'phases.0.loss' was 'lpips', is now 'l2'" in refusal(folders(config, run=run)["student"]).message


def test_raw_weights_lie_beside_the_model(config, run, tmp_path):
    stages = folders(config, run=run)
    mark_done(stages["teacher"])
    report = stages["report"]
    outside = str(run / "teacher" / "model")
    for model in ("teacher", outside):
        assert report.locate_weights(model, "ema") == outside
        with pytest.raises(ConfigError, match=f"'report': '{model}' has no raw weights: there is no '{outside}-raw'"):
            report.locate_weights(model, "raw")
    (run / "teacher" / "model-raw").mkdir()
    for model in ("teacher", outside):
        assert report.locate_weights(model, "raw") == f"{outside}-raw"
    for model in (f"{outside}-raw", "owner/name", str(run / "teacher")):
        assert report.locate_weights(model, "ema") == model
        with pytest.raises(ConfigError, match="beside a folder 'model'"):
            report.locate_weights(model, "raw")


def test_a_parent_that_was_made_anew_is_noticed(config, run):
    stages = folders(config, run=run)
    mark_done(stages["teacher"])
    mark_done(stages["pairs"])
    shutil.rmtree(run / "teacher")
    mark_done(stages["teacher"], "other weights")
    assert "'model (content)' was '" in refusal(stages["pairs"]).message


def test_a_setting_that_is_null_is_as_good_as_absent(config, run):
    """A run of a version that did not know the setting goes on."""
    stages = folders(config, run=run)
    mark_done(stages["teacher"])
    mark_done(stages["pairs"])
    file = stages["pairs"].folder / "stage.json"
    content = json.loads(file.read_text())
    assert content["identity"].pop("sampler", "not there") is None
    file.write_text(json.dumps(content))
    stages["pairs"].check_identity()
    changed = folders(config, "stages.pairs.sampler=heun", run=run)["pairs"]
    assert "'sampler' was absent, is now 'heun'" in refusal(changed).message


def test_a_hub_model_that_was_changed_is_noticed(config, run, monkeypatch):
    """By its commit; where it is not on this machine, the stage's folder speaks for itself."""
    stages = folders(config, "stages.pairs.model=owner/name", run=run)
    place = run / "hub"
    for found in ("find_model", "cached_model"):
        monkeypatch.setattr(f"instaflow.places.{found}", lambda name: place / "commit1")
    monkeypatch.setattr("instaflow.rundir.cached_model", lambda name: place / "commit1")
    mark_done(stages["pairs"])
    stages["pairs"].check_identity()
    monkeypatch.setattr("instaflow.places.find_model", lambda name: place / "commit2")
    assert "was 'owner/name@commit1', is now 'owner/name@commit2'" in refusal(stages["pairs"]).message
    monkeypatch.setattr("instaflow.rundir.cached_model", lambda name: None)
    stages["pairs"].check_identity()


def test_a_prompt_file_counts_by_its_bytes_and_not_by_its_place(tmp_path, run):
    text = SMALL.replace("[a seven, the digit 7]", "one.txt")
    (tmp_path / "one.txt").write_text("a seven\n")
    stages = folders(write(tmp_path, text), run=run)
    mark_done(stages["teacher"])
    mark_done(stages["pairs"])
    (tmp_path / "one.txt").rename(tmp_path / "two.txt")
    moved = write(tmp_path, text.replace("one.txt", "two.txt"))
    folders(moved, run=run)["pairs"].check_identity()
    (tmp_path / "two.txt").write_text("a Seven\n")
    assert "'prompts' was '" in refusal(folders(moved, run=run)["pairs"]).message


def test_a_prompt_file_that_is_not_there_is_named(tmp_path, run):
    stages = folders(write(tmp_path, SMALL.replace("[a seven, the digit 7]", "gone.txt")), run=run)
    mark_done(stages["teacher"])
    with pytest.raises(ConfigError, match=r"gone\.txt' does not exist"):
        stages["pairs"].identity()


def test_a_done_stage_needs_its_prompt_file_no_more(tmp_path, run):
    text = SMALL.replace("[a seven, the digit 7]", "one.txt")
    (tmp_path / "one.txt").write_text("a seven\n")
    config = write(tmp_path, text)
    stages = folders(config, run=run)
    mark_done(stages["teacher"])
    mark_done(stages["pairs"])
    (tmp_path / "one.txt").unlink()
    stages["pairs"].check_identity()
    assert "'count' was 8, is now 9" in refusal(folders(config, "stages.pairs.count=9", run=run)["pairs"]).message
    stages["2rf"].identity()  # what builds on it does not look for the file either
    (stages["pairs"].folder / "done.json").unlink()
    assert "one.txt' does not exist" in refusal(stages["pairs"]).message


def external(tmp_path: Path, place: str) -> list[str]:
    """Overrides that put a folder outside the run wherever a stage may take one."""
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / "weights").write_text("weights")
    keys = ["pairs.model", "2rf.init", "2rf.couplings", "report.models.0.model", "report.reference.model"]
    return [f"stages.{key}={folder}" for key in keys]


@pytest.mark.parametrize("name", ["pairs", "2rf", "report"])
def test_no_place_is_part_of_an_identity(tmp_path, config, run, name):
    first = folders(config, *external(tmp_path, "here/model"), run=run)
    second = folders(config, *external(tmp_path, "there/other"), run=tmp_path / "run2")
    for stages in (first, second):
        for stage in ("teacher", "pairs", "2rf", "student"):
            mark_done(stages[stage])
    identity = first[name].identity()
    assert str(tmp_path) not in json.dumps(identity)
    assert identity == second[name].identity()
    (tmp_path / "there/other/weights").write_text("weightS")
    assert identity != second[name].identity()


def test_two_evaluated_folders_are_told_apart(tmp_path, config, run):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    places = [f"stages.report.models.{i}.model={tmp_path / name}" for i, name in enumerate("ab")]
    turned = [f"stages.report.models.{i}.model={tmp_path / name}" for i, name in enumerate("ba")]
    steps = ["stages.report.models.0.num_steps=[1]", "stages.report.reference.num_steps=1"]
    reference = f"stages.report.reference.model={tmp_path / 'a'}"
    first, second = (
        folders(config, *order, *steps, reference, run=run)["report"].identity() for order in (places, turned)
    )
    assert first != second


def test_a_parent_that_is_not_done_has_no_content(config, run):
    stages = folders(config, run=run)
    with pytest.raises(DataError, match=r"Stage 'teacher' in '.*' is not done"):
        stages["pairs"].identity()
    with pytest.raises(DataError, match="not done"):
        read_done(run / "teacher")


@pytest.mark.parametrize("file", ["done.json", "stage.json"])
def test_a_damaged_file_of_a_stage_is_named(config, run, file):
    stage = folders(config, run=run)["teacher"]
    mark_done(stage)
    (stage.folder / file).write_text("{")
    with pytest.raises(DataError, match=f"{file}' is damaged"):
        stage.check_identity()
        read_done(stage.folder)


# --- copies ---------------------------------------------------------------------------------------------------------


def test_a_copied_stage_is_valid_and_done_in_another_run(tmp_path, config, run):
    stages = folders(config, run=run)
    for name in ("teacher", "pairs", "2rf"):
        mark_done(stages[name])
    for name in ("teacher", "pairs", "2rf"):
        shutil.copytree(run / name, tmp_path / "elsewhere" / "copy" / name)
    shutil.rmtree(run)
    copies = folders(config, run=tmp_path / "elsewhere" / "copy")
    for name in ("teacher", "pairs", "2rf"):
        assert copies[name].is_done()
        copies[name].check_identity()
    assert copies["student"].identity()["init (content)"] == read_done(copies["2rf"].folder)["fingerprint"]


def test_a_stage_copied_without_its_parents_is_judged_by_its_settings(tmp_path, config, run):
    stages = folders(config, run=run)
    mark_done(stages["teacher"])
    mark_done(stages["pairs"])
    shutil.copytree(run / "pairs", tmp_path / "copy" / "pairs")
    folders(config, run=tmp_path / "copy")["pairs"].check_identity()
    changed = folders(config, "stages.pairs.count=9", run=tmp_path / "copy")["pairs"]
    assert "'count' was 8, is now 9" in refusal(changed).message


def test_parents_lie_by_their_side(tmp_path, config, run):
    stages = folders(config, run=run)
    assert stages["pairs"].locate("teacher") == str(run / "teacher")  # nothing made yet
    mark_done(stages["teacher"])
    assert stages["pairs"].locate("teacher") == str(run / "teacher" / "model")
    assert stages["pairs"].relative("teacher") == "../teacher/model"
    assert stages["pairs"].locate("some-one/model") == stages["pairs"].relative("some-one/model") == "some-one/model"


# --- the lock -------------------------------------------------------------------------------------------------------


@pytest.fixture
def holder(config, run):
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, config, str(run)], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert process.stdout
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_told_who_the_first_is(config, run, holder):
    for _ in range(2):
        with pytest.raises(InstaFlowError) as caught, locked(folders(config, run=run)["teacher"].folder):
            pass
        assert f"Stage 'teacher' in '{run}' is being worked on by process {holder.pid} on " in caught.value.message
        assert "same command again" in caught.value.hint
    with locked(folders(config, run=run)["2rf"].folder):  # another stage is free
        pass


def test_the_lock_of_a_killed_process_is_taken_over_at_once(config, run, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(folders(config, run=run)["teacher"].folder):
        assert str(holder.pid) not in (run / "teacher" / ".lock").read_text()


def test_the_lock_is_free_after_an_error(config, run):
    stage = folders(config, run=run)["teacher"]
    with pytest.raises(RuntimeError), locked(stage.folder):
        raise RuntimeError
    with locked(stage.folder):
        pass


def test_a_shared_lock_is_shared_and_keeps_who_wants_it_alone_out(config, run):
    folder = folders(config, run=run)["pairs"].folder
    with locked(folder, shared=True) as first_is_alone:
        with locked(folder, shared=True), pytest.raises(InstaFlowError, match="is being worked on"), locked(folder):
            pass
        assert first_is_alone()
    with locked(folder), pytest.raises(InstaFlowError, match="is being worked on"), locked(folder, shared=True):
        pass


def test_a_shared_lock_tells_that_another_holds_it_too(config, run):
    folder = folders(config, run=run)["pairs"].folder
    with locked(folder, shared=True), locked(folder, shared=True) as is_alone:
        assert not is_alone()


# --- figures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stage(config, run):
    stage = folders(config, run=run)["teacher"]
    stage.folder.mkdir(parents=True)
    stage.begin()
    return stage


def test_figures_come_back_in_order_with_their_seconds(stage):
    assert stage.stats() == []
    for step in range(3):
        stage.log(step=step, where="café\u2028七")
    lines = stage.stats()
    assert [(line["step"], line["where"]) for line in lines] == [(step, "café\u2028七") for step in range(3)]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_a_last_line_cut_anywhere_does_not_count_and_swallows_nothing(stage, config, run):
    stage.log(step=0)
    stage.log(step=1, where="café")
    whole = stage.stats_file.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        stage.stats_file.write_bytes(whole[:cut])
        steps = [line["step"] for line in read_stats(stage.stats_file)]
        assert steps == ([0, 1] if cut == len(whole) - 1 else [0])  # only the newline is missing
        stage.begin()
        stage.log(step=2)
        assert [line["step"] for line in stage.stats()] == [*steps, 2]


def test_figures_past_the_resumed_state_are_forgotten(stage):
    for seen in (64, 128, 192):
        stage.log(samples_seen=seen)
    stage.forget_stats(lambda line: line["samples_seen"] <= 128)
    stage.log(samples_seen=192)
    assert [line["samples_seen"] for line in stage.stats()] == [64, 128, 192]
    assert sorted(path.name for path in stage.folder.glob("*stats*")) == ["stats.jsonl"]


def test_seconds_go_on_where_an_interrupted_stage_stopped(stage, config, run):
    stage.started -= 1000  # as if the work had taken so long
    stage.log(loss=1.0)
    again = folders(config, run=run)["teacher"]
    again.begin()
    assert 1000 <= again.seconds() < 1100
    again.started -= 500
    again.finish("payload")
    assert 1500 <= read_done(again.folder)["seconds"] < 1700


def test_of_two_workers_the_first_marks_the_stage_done(stage, config, run):
    assert stage.finish("payload", by="first")
    assert not folders(config, run=run)["teacher"].finish("payload", by="second")
    assert read_done(stage.folder)["by"] == "first"


def test_a_worker_that_joins_changes_no_figure(stage, config, run):
    stage.log(step=0)
    before = stage.stats_file.stat().st_ino
    folders(config, run=run)["teacher"].begin()
    stage.log(step=1)
    assert stage.stats_file.stat().st_ino == before
    assert [line["step"] for line in stage.stats()] == [0, 1]


def test_of_two_workers_with_other_settings_one_begins(config, run, monkeypatch):
    first, second = folders(config, run=run)["teacher"], folders(config, "seed=1", run=run)["teacher"]
    first.folder.mkdir(parents=True)
    check = type(second).check_identity

    def first_comes_between(self):
        monkeypatch.setattr(type(second), "check_identity", check)
        first.begin()

    monkeypatch.setattr(type(second), "check_identity", first_comes_between)
    with pytest.raises(ConfigError, match="'seed' was 0, is now 1"):
        second.begin()
    assert json.loads((first.folder / "stage.json").read_text())["identity"]["seed"] == 0


def test_the_done_mark_is_the_last_file(stage):
    stage.log(loss=1.0)
    time.sleep(0.01)
    stage.finish("payload", extra=7)
    newest = max(stage.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "done.json"
    assert read_done(stage.folder)["extra"] == 7
    assert json.loads((stage.folder / "state.json").read_text())["state"] == "done"


def test_the_command_repeats_what_the_user_said(tmp_path, run):
    (tmp_path / "my files").mkdir()
    config = write(tmp_path / "my files")
    overrides = ("seed=1", "stages.pairs.prompts=[a b]")
    command = folders(config, *overrides, run=run)["pairs"].command()
    changes = "--set seed=1 --set 'stages.pairs.prompts=[a b]'"
    assert command == f"instaflow couple '{config}' --run-dir {run} --stage pairs {changes}"


def test_the_command_of_a_couple_stage_repeats_which_worker_it_is(config, run):
    stages = stage_folders(load_experiment(config, (), str(run)), Worker(1, 3))
    assert stages["pairs"].command().endswith("--stage pairs --worker-index 1 --worker-count 3")
    assert "worker" not in stages["teacher"].command()
