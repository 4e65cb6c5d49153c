import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import yaml

import cli
from instaflow.config import load_experiment
from instaflow.world import Worker
from pipelines import experiment
from tests.compared import make_runs
from tests.couplings.made import make_couplings, manifest_of
from tests.experiments import PHASE, SMALL, folders, mark_done, write
from tests.ports import free_port

ROOT = Path(__file__).parents[1]
COMMANDS = cli.cli.commands
STAGES = ("teacher", "couple", "reflow", "distill", "evaluate")
HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "deepspeed",
    "webdataset",
    "pydantic",
    "yaml",
    "rich",
    "numpy",
    "pipelines",
)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def examples(name: str) -> list[str]:
    """The example lines of a command's help."""
    text = COMMANDS[name].get_help(click.Context(COMMANDS[name], info_name=name))
    return [line.strip() for line in text.splitlines() if line.strip().startswith(f"instaflow {name} ")]


# --- the table of commands ------------------------------------------------------------------------------------------


def test_the_table_holds_the_promised_commands_in_the_data_s_order():
    assert [name for name in COMMANDS if name in STAGES] == list(STAGES)
    others = {
        "run",
        "sample",
        "serve",
        "compare",
        "plan",
        "rehearse",
        "toy",
        "verify",
        "repair",
        "inspect",
        "weights",
        "submit",
        "status",
        "doctor",
    }
    assert {*others, *STAGES} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_shows_what_a_command_does_and_an_example(typed, name, option):
    code, out, err = typed(name, option)
    assert (code, err) == (0, "")
    assert len(out.split("\n\n")[1].strip()) > 20
    assert examples(name), out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_are_good_commands(name):
    for line in examples(name):
        COMMANDS[name].make_context(name, shlex.split(line)[2:])  # raises what wrong usage raises


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name):
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_the_first_help_names_every_command_and_the_line_to_start_with(typed):
    code, out, _ = typed("--help")
    assert code == 0
    assert "instaflow run digits" in out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert "75 interrupted" in out


NEEDY = [[name] for name, command in COMMANDS.items() if any(parameter.required for parameter in command.params)]


@pytest.mark.parametrize("words", [[], ["--nonsense"], ["nonsense"], *NEEDY], ids=shlex.join)
def test_wrong_usage_exits_with_2(typed, words):
    code, _, err = typed(*words)
    assert code == 2
    assert "Usage: " in err


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_exits_with_2_and_is_named(typed, name):
    code, _, err = typed(name, "--nonsense", "digits")
    assert code == 2
    assert "--nonsense" in err


@pytest.mark.parametrize(
    "words",
    [
        ["--num-steps", "0"],
        ["--num-steps", "two"],
        ["--guidance-scale", "-1"],
        ["--seed", "-1"],
        ["--noise-in", "no/such.npy"],
    ],
    ids=shlex.join,
)
def test_a_bad_value_of_sample_exits_with_2(typed, words):
    code, _, err = typed("sample", "model", "--prompt", "a seven", *words)
    assert code == 2
    assert words[0] in err


def test_the_version_is_told(typed):
    assert typed("--version")[:2] == (0, f"instaflow, version {cli.__version__}\n")


# --- what is loaded -------------------------------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    shown = f"import sys, cli\n{code}\nprint('|', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("|")[2].split())


@pytest.mark.parametrize("code", ["", "cli.cli(['--help'], standalone_mode=False)"], ids=["import", "--help"])
def test_the_command_line_loads_nothing_heavy(code):
    assert not loaded_by(code) & set(HEAVY)


def test_a_dry_run_loads_no_torch():
    loaded = loaded_by("cli.cli(['run', 'digits', '--dry-run'], standalone_mode=False)")
    assert not loaded & {"torch", "diffusers", "transformers", "deepspeed"}


# --- a dry run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", *STAGES])
def test_a_dry_run_writes_nothing_and_loads_again(typed, tmp_path, monkeypatch, name):
    config = write(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    code, out, err = typed(name, config, "--dry-run", "--run-dir", "elsewhere", "--set", "seed=7")
    assert (code, err) == (0, "")
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]
    assert "run: elsewhere\nseed: 7\n" in out
    assert typed(name, write(tmp_path, out, "again.yaml"), "--dry-run") == (0, out, "")


def test_a_dry_run_leaves_out_what_has_no_use(typed):
    of_images = {"captions", "captions_seed", "real", "features", "clip", "clip_prefix"}
    _, digits, _ = typed("evaluate", "digits", "--dry-run")
    assert not of_images & yaml.safe_load(digits)["stages"]["report"].keys()
    changes = ["protocol=coco2017-5k", "captions=prompts.txt", "real=val2017"]
    shown = load_experiment("digits", [f"stages.report.{change}" for change in changes]).resolved()
    assert of_images < yaml.safe_load(shown)["stages"]["report"].keys()


def test_a_dry_run_of_a_packaged_config_works_anywhere(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = typed("run", "digits", "--dry-run")
    assert code == 0
    assert typed("run", write(tmp_path, out), "--dry-run") == (0, out, "")


IMAGES = "  real: {kind: couple, model: teacher, data: images, count: 2, guidance_scale: 1}\n"


def test_a_dry_run_misses_the_files_that_the_run_would(typed, tmp_path):
    """One folder of images, too few of them, no prompts, no weights; each is told as the run tells it."""
    config, lpips = write(tmp_path, SMALL + IMAGES), "stages.student.phases.0.loss=lpips"
    weights = (lpips, f"stages.student.perceptual={{network: alex, weights: {tmp_path}/gone.pth}}")
    own = (lpips, "stages.teacher.perceptual_phases=[PHASE]".replace("PHASE", PHASE), OWN_NETWORK)

    def tried(*changes: str) -> str:
        words = [
            "run",
            config,
            "--run-dir",
            tmp_path / "run",
            *(word for change in changes for word in ("--set", change)),
        ]
        message, _ = found = mistake(typed(*words, "--dry-run"))
        assert found == mistake(typed(*words))
        return message

    assert tried() == f"'{tmp_path / 'images'}', given as data, does not exist"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"")
    (tmp_path / "images" / "1.txt").write_text("a seven")
    assert tried().startswith("'stages.real.count' is 2; of ")
    assert tried("stages.real.count=1", "stages.pairs.prompts=gone.txt").endswith("gone.txt' does not exist")
    assert "gone.pth" in tried("stages.real.count=1", *weights)
    assert "is no pipeline folder" in tried("stages.real.count=1", f"stages.pairs.model={tmp_path / 'images'}")
    assert not (tmp_path / "run").exists()
    for good in (), ("stages.real.data=s3://bucket/images",), own:  # what needs a network, what a stage will make
        changes = [word for change in ("stages.real.count=1", *good) for word in ("--set", change)]
        assert typed("run", config, *changes, "--dry-run")[0] == 0
    assert typed("run", config, "--stage", "pairs", "--dry-run")[0] == 0
    assert typed("reflow", config, "--dry-run")[0] == 0


OWN_NETWORK = "stages.student.perceptual={network: teacher}"


# --- mistakes that the user can mend --------------------------------------------------------------------------------


def mistake(result: tuple[int, str, str]) -> tuple[str, str]:
    """The message and the hint of a command that failed as it should."""
    code, _, err = result
    assert code == 1, err
    assert "Traceback" not in err
    assert err.startswith("Error: "), err
    message, _, hint = err.partition("\nHint: ")
    return message.removeprefix("Error: "), hint.strip()


@pytest.mark.parametrize("name", ["run", *STAGES])
def test_a_missing_file_is_an_error_with_a_hint(typed, name):
    message, hint = mistake(typed(name, "no/such.yaml"))
    assert message == "No experiment file 'no/such.yaml'"
    assert "packaged config: " in hint and "digits, digits-compare" in hint


@pytest.mark.parametrize("name", ["run", *STAGES])
def test_a_misspelt_setting_is_an_error_even_in_a_dry_run(typed, tmp_path, name):
    config = write(tmp_path)
    assert mistake(typed(name, config, "--dry-run", "--set", "stages.pairs.cuont=1")) == (
        "'stages.pairs' has no setting 'cuont'",
        "Did you mean 'count'?",
    )


def test_a_file_that_is_no_experiment_is_an_error(typed, tmp_path):
    assert "not valid YAML" in mistake(typed("run", write(tmp_path, "run: [1")))[0]


def test_a_name_that_is_too_long_for_the_disk_is_an_error(typed):
    message, hint = mistake(typed("run", "x" * 5000))
    assert message.startswith("File name too long: ")
    assert "name is too long" in hint


@pytest.mark.parametrize("place", ["file", "link"])
def test_an_experiment_that_cannot_be_read_is_an_error(typed, tmp_path, place):
    config = Path(write(tmp_path))
    target = config / "below.yaml" if place == "file" else tmp_path / "link.yaml"
    if place == "link":
        target.symlink_to("nowhere.yaml")
    assert "No experiment file" in mistake(typed("run", target))[0]


@pytest.mark.parametrize(
    ("number", "words", "way_out"),
    [
        (errno.ENOSPC, "No space left on device", "Make room"),
        (errno.EDQUOT, "quota exceeded", "Make room"),
        (errno.EACCES, "Permission denied", "permissions"),
        (errno.EROFS, "Read-only file system", "permissions"),
        (errno.ENOTDIR, "Not a directory", "a file stands where a folder is needed"),
        (errno.ESTALE, "Stale file handle", "bring it back"),
        (errno.ENOTCONN, "not connected", "bring it back"),
    ],
)
@pytest.mark.parametrize("file", ["runs/small/teacher/stage.json", None])
def test_a_disk_that_refuses_is_an_error(typed, tmp_path, monkeypatch, number, words, way_out, file):
    def refuse(found: object, stop: object) -> None:
        raise OSError(number, os.strerror(number), *([file] if file else []))

    monkeypatch.setattr(experiment, "run_all", refuse)
    message, hint = mistake(typed("run", write(tmp_path)))
    assert words in message
    assert (f"'{file}'" in message) == (file is not None)
    assert way_out in hint


def test_a_full_disk_is_told_by_its_words_where_a_library_hides_its_number(typed, tmp_path, monkeypatch):
    def refuse(found: object, stop: object) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors says it

    monkeypatch.setattr(experiment, "run_all", refuse)
    message, hint = mistake(typed("run", write(tmp_path)))
    assert message == "No space left on device"
    assert "Make room" in hint


def test_any_other_failure_keeps_its_traceback(typed, tmp_path, monkeypatch):
    def fail(found: object, stop: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(experiment, "run_all", fail)
    with pytest.raises(OSError, match="Input/output"):
        typed("run", write(tmp_path))


def test_the_deepspeed_launcher_s_local_rank_is_let_pass(typed, tmp_path):
    assert typed("--local_rank=1", "run", write(tmp_path), "--dry-run") == typed("run", write(tmp_path), "--dry-run")


def test_a_bad_launcher_is_an_error(typed, tmp_path, monkeypatch):
    stages = folders(write(tmp_path), run=tmp_path / "run")
    mark_done(stages["teacher"])
    monkeypatch.setenv("WORLD_SIZE", "two")
    message, hint = mistake(typed("teacher", write(tmp_path), "--run-dir", tmp_path / "run"))
    assert "must be whole numbers" in message
    assert "torchrun" in hint


def test_a_folder_without_couplings_is_an_error(typed, tmp_path):
    message, _ = mistake(typed("verify", tmp_path))
    assert str(tmp_path) in message


# --- stages that wait -----------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    return write(tmp_path)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def test_a_kind_whose_parents_are_missing_names_the_first_command(typed, config, run):
    message, hint = mistake(typed("distill", config, "--run-dir", run, "--set", "seed=1"))
    assert message == "'student' waits for 'pairs' and '2rf'"
    assert hint == f"Run first: instaflow teacher {config} --run-dir {run} --stage teacher --set seed=1"
    assert not run.exists()


def test_a_stage_whose_parent_is_missing_names_the_first_command(typed, config, run):
    mark_done(folders(config, run=run)["teacher"])
    message, hint = mistake(typed("distill", config, "--run-dir", run, "--stage", "student"))
    assert message == "Stage 'student' builds on 'pairs', which is not done"
    assert hint == f"Run first: instaflow couple {config} --run-dir {run} --stage pairs"


def test_the_command_in_the_hint_is_a_good_one(typed, config, run):
    _, hint = mistake(typed("distill", config, "--run-dir", run))
    words = shlex.split(hint.removeprefix("Run first: "))[1:]
    assert typed(*words, "--dry-run")[0] == 0


def test_stages_that_are_done_are_named_and_nothing_is_an_error(typed, config, run):
    mark_done(folders(config, run=run)["teacher"])
    assert typed("teacher", config, "--run-dir", run) == (0, f"teacher: done before, in {run / 'teacher'}\n", "")
    assert typed("teacher", config, "--run-dir", run, "--stage", "teacher")[0] == 0


def test_a_done_stage_waits_for_nobody(typed, config, run):
    stages = folders(config, run=run)
    mark_done(stages["teacher"])
    mark_done(stages["pairs"])
    (run / "teacher").rename(run.parent / "teacher")
    for stage in ([], ["--stage", "pairs"]):
        assert typed("couple", config, "--run-dir", run, *stage)[:2] == (0, f"pairs: done before, in {run / 'pairs'}\n")


def test_what_is_done_does_not_hide_what_waits(typed, tmp_path, run):
    pairs2 = "  pairs2: {kind: couple, model: 2rf, prompts: [a], count: 8, guidance_scale: 1}\n"
    config = write(tmp_path, SMALL + pairs2)
    stages = folders(config, run=run)
    mark_done(stages["teacher"])
    mark_done(stages["pairs"])
    code, out, err = typed("couple", config, "--run-dir", run)
    assert code == 1
    assert out == f"pairs: done before, in {run / 'pairs'}\n"
    assert "Error: 'pairs2' waits for '2rf'\n" in err
    assert f"--run-dir {run} --stage 2rf" in err


def test_a_done_stage_with_other_settings_is_refused(typed, config, run):
    mark_done(folders(config, run=run)["teacher"])
    message, hint = mistake(typed("run", config, "--run-dir", run, "--set", "stages.teacher.ema_decay=0.5"))
    assert "'ema_decay' was 0.9999, is now 0.5" in message
    assert "another --run-dir" in hint


def test_an_unknown_stage_is_refused_with_the_nearest(typed, config):
    assert mistake(typed("run", config, "--stage", "studnet", "--dry-run")) == mistake(
        typed("distill", config, "--stage", "studnet")
    )
    message, hint = mistake(typed("distill", config, "--stage", "studnet"))
    assert message == f"'{config}' has no stage 'studnet'"
    assert hint == "Did you mean 'student'?"


def test_a_stage_of_another_kind_is_refused_with_its_command(typed, config):
    message, hint = mistake(typed("reflow", config, "--stage", "student"))
    assert message == "Stage 'student' is of kind 'distill'"
    assert hint == f"Run: instaflow distill {config} --run-dir runs/small --stage student"


def test_a_kind_that_the_experiment_lacks_is_refused(typed, tmp_path):
    text = "run: r\nstages:\n  pairs: {kind: couple, model: a/b, prompts: [a], count: 8, guidance_scale: 1}\n"
    config = write(tmp_path, text)
    assert mistake(typed("reflow", config)) == (
        f"'{config}' has no stage of kind 'reflow'",
        "Its stages: pairs (couple)",
    )


@pytest.mark.parametrize("words", [["run"], ["couple"], ["couple", "--stage", "pairs"]], ids=shlex.join)
def test_prompts_are_looked_at_before_any_work(typed, tmp_path, run, words):
    config = write(tmp_path, SMALL.replace("[a seven, the digit 7]", "gone.txt"))
    message, _ = mistake(typed(words[0], config, *words[1:], "--run-dir", run))
    assert "gone.txt" in message
    assert not run.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], Worker()), (["--worker-index", "1", "--worker-count", "3"], Worker(1, 3))],
)
@pytest.mark.parametrize("stage", [[], ["--stage", "pairs"]])
def test_couple_tells_its_stages_which_worker_it_is(typed, config, monkeypatch, stage, words, expected):
    seen = []
    monkeypatch.setattr(experiment, "run_one", lambda found, name, stop, worker: seen.append(worker))
    monkeypatch.setattr(experiment, "run_kind", lambda found, kind, stop, worker: seen.append(worker))
    assert typed("couple", config, *stage, *words)[0] == 0
    assert seen == [expected]
    assert typed("reflow", config, "--worker-index", "1", "--worker-count", "3")[0] == 2


def test_half_a_worker_is_an_error_before_any_work(typed, config, run):
    message, hint = mistake(typed("couple", config, "--run-dir", run, "--worker-index", "1"))
    assert "not --worker-count" in message and "Give both" in hint
    assert not run.exists()


# --- being told to stop ---------------------------------------------------------------------------------------------

WORK = """
import sys, time
import cli
from instaflow.errors import Interrupted
from pipelines import experiment

def run_all(found, stop):
    print("working", flush=True)
    while not stop():
        time.sleep(0.01)
    if {stubborn}:
        print("heard", flush=True)
        for _ in range(6000):  # one long sleep would not hear a signal that another thread received
            time.sleep(0.01)
    raise Interrupted(f"Stage 'x' stopped ({{stop.signal}})", "To go on: the same command")

experiment.run_all = run_all
sys.argv = ["instaflow", "run", "digits"]
cli.main()
"""


def start(*, stubborn: bool = False, **variables: str) -> subprocess.Popen[str]:
    """The command, with work that hears of its end and, if stubborn, goes on."""
    code = WORK.format(stubborn=stubborn)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **variables},
    )
    assert process.stdout
    assert process.stdout.readline() == "working\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_in_75_and_the_way_to_go_on(number):
    process = start()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert err == f"Stopped: Stage 'x' stopped ({number.name})\nHint: To go on: the same command\n"


def test_a_second_interrupt_stops_at_once():
    process = start(stubborn=True)
    process.send_signal(signal.SIGINT)
    assert process.stdout
    assert process.stdout.readline() == "heard\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "Traceback" not in err
    assert "Stopped: at once" in err
    assert "Hint: The same command goes on" in err


def test_only_the_first_of_several_processes_tells_that_it_was_stopped():
    process = start(RANK="1", WORLD_SIZE="2")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 75


# --- couplings ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    return make_couplings(tmp_path / "my pairs", manifest_of())


@pytest.mark.parametrize("workers", [(), ("--workers", "1"), ("--workers", "3")])
def test_verify_says_what_is_sound_and_what_is_not(typed, pairs, workers):
    code, out, err = typed("verify", pairs, *workers)
    assert (code, err) == (0, "") and out.endswith(f"{pairs}: 5 shards, 23 couplings, all sound\n")
    (pairs / "shards" / "notes.txt").write_text("")
    assert typed("verify", pairs, *workers)[0] == 0  # nobody's file does no harm
    (pairs / "shards" / "00001.tar").unlink()
    code, out, err = typed("verify", pairs, *workers)
    assert code == 1 and "sound" not in out
    assert err.splitlines() == [
        f'"{pairs}/shards/00001.tar" is missing, though it has a sidecar',
        f'"{pairs}/shards/notes.txt" is no file of this stage',
        f"Hint: instaflow repair '{pairs}' makes the bad shards again",
    ]


def test_verify_of_a_stage_in_the_making_says_so(typed, pairs):
    (pairs / "state.json").write_text('{"state": "running"}')
    (pairs / "shards" / "00001.json").unlink()
    code, out, err = typed("verify", pairs)
    assert (code, err) == (75, "") and out.endswith(f"{pairs}: not done; 4 of 5 shards, 18 couplings, all sound\n")
    (pairs / "shards" / "00002.tar").unlink()
    code, out, err = typed("verify", pairs)
    assert code == 1 and err.startswith(f'"{pairs}/shards/00002.tar" is missing')


def test_ctrl_c_ends_verify_at_once_and_without_a_traceback(typed, pairs, monkeypatch):
    from instaflow.couplings import verify as module

    def interrupted(folder, shard, *arguments):
        if shard == 0:  # one Ctrl-C: a second one insists
            os.kill(parent, signal.SIGINT)
        time.sleep(600)

    parent = os.getpid()
    monkeypatch.setattr(module, "read_one", interrupted)
    code, _, err = typed("verify", pairs, "--workers", "2")
    assert code == 75 and err.startswith(f"Stopped: 0 of 5 shards of '{pairs}' were read, and nothing was changed\n")


def test_inspect_describes_what_is_there_though_no_sheet_can_be_drawn(typed, pairs, tmp_path):
    code, out, err = typed("inspect", pairs, "--output", tmp_path / "sheet.png")
    lines = out.splitlines()
    assert (code, err) == (0, "") and lines[0] == str(pairs)
    assert "  shards    5 of 5, 23 couplings" in lines
    assert (
        lines[-1]
        == "No contact sheet: the model is not at 'teacher' (--model says where it is), and the shards keep no images"
    )


# --- several seeds --------------------------------------------------------------------------------------------------


def test_compare_prints_the_ranking_and_writes_the_page(typed, tmp_path):
    runs = make_runs(tmp_path / "my runs")
    code, out, err = typed("compare", *runs, "--output", tmp_path / "out")
    assert (code, err) == (0, "") and (tmp_path / "out" / "compare.html").is_file()
    assert out.startswith("small: 3 seeds (0, 1, 2)\n") and out.endswith(f"The page: {tmp_path}/out/compare.html\n")
    assert mistake(typed("compare", runs[0]))[0] == f"Only one run was given: '{runs[0]}'"
    assert typed("compare", *runs, "--by", "colour")[0] == 2


def test_submitting_and_the_status_load_no_torch(tmp_path, run):
    config = write(tmp_path)
    mark_done(folders(config, run=run)["teacher"])
    loaded = loaded_by(
        f"cli.cli(['submit', {config!r}, '--dry-run'], standalone_mode=False)\n"
        f"try:\n    cli.cli(['status', {str(run)!r}], standalone_mode=False)\nexcept SystemExit:\n    pass"
    )
    assert not loaded & {"torch", "diffusers", "transformers", "deepspeed"}


def test_compare_loads_no_torch(tmp_path):
    runs = [str(run) for run in make_runs(tmp_path / "runs")]
    loaded = loaded_by(f"cli.cli(['compare', *{runs}], standalone_mode=False)")
    assert not loaded & {"torch", "diffusers", "transformers", "deepspeed"}


ENDED = """
import atexit, sys
import cli
from instaflow.world import barrier
from pipelines import experiment

def run_all(found, stop):
    barrier()
    atexit.register(print, "the interpreter's own end")
    print("done")
    sys.exit({code})

experiment.run_all = run_all
sys.argv = ["instaflow", "run", "digits"]
cli.main()
"""


@pytest.mark.parametrize(("code", "processes"), [(0, 2), (75, 2), (75, 1)])
def test_processes_of_several_end_without_the_interpreters_own_end(code, processes):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place |= {"WORLD_SIZE": str(processes), "LOCAL_RANK": "0"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ENDED.format(code=code)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **place, "RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    said = ["done\n" if processes == 2 else "done\nthe interpreter's own end\n"] * processes
    assert [process.communicate(timeout=120)[0] for process in started] == said
    assert [process.returncode for process in started] == [code] * processes
