"""A chain of jobs on this machine: `instaflow submit --backend local`."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from instaflow.rundir import locked, read_done
from tests.experiments import SMALL, write

STAGES = yaml.safe_load(SMALL)["stages"]
MARK = "mkdir -p {0} && echo '{{\"seconds\": 1}}' > {0}/done.json && exit 0"
"""A line that is a whole stage's work."""


def chain(folder: Path, shell: dict[str, str] | None = None, /, **cluster: Any) -> list[str | Path]:
    """What to type to run a teacher, its pairs, another teacher on which nothing builds, and what `shell` names."""
    more = {name: STAGES[name] for name in shell or {} if name in STAGES}
    stages = {"teacher": STAGES["teacher"], "pairs": STAGES["pairs"], "other": STAGES["teacher"], **more}
    own = {name: {"lines": [line.format(folder / "run" / name)]} for name, line in (shell or {}).items()}
    text = yaml.safe_dump(
        {"run": "runs/x", "cluster": {**cluster, "stages": own | cluster.get("stages", {})}, "stages": stages},
        sort_keys=False,
    )
    return ["submit", write(folder, text), "--run-dir", folder / "run", "--backend", "local"]


def started(*words: str | Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "cli", *map(str, words)], stderr=subprocess.PIPE, text=True)


def wait_for(file: Path) -> None:
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_stages_run_in_as_many_processes_as_a_node_has_gpus_and_make_what_run_makes(typed, tmp_path):
    here, alone = tmp_path / "here", tmp_path / "alone"
    here.mkdir(), alone.mkdir()
    two = {"nodes": 2, "gpus": 2, "array": 4, "time": "0:01"}  # of which one node is here, and no limit
    words = map(str, chain(here, {"other": MARK}, stages={"couple": two}))
    finished = subprocess.run([sys.executable, "-m", "cli", *words], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert read_done(here / "run" / "pairs")["processes"] == 2
    assert read_done(here / "run" / "teacher")["processes"] == 1
    assert typed("status", here / "run")[0] == 0

    for stage in ("teacher", "couple"):
        extra = ["--stage", "teacher"] if stage == "teacher" else []
        words = map(str, [stage, chain(alone)[1], "--run-dir", alone / "run", *extra])
        finished = subprocess.run([sys.executable, "-m", "cli", *words], capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
    for stage in ("teacher", "pairs"):
        fingerprints = [read_done(run / "run" / stage)["fingerprint"] for run in (here, alone)]
        assert fingerprints[0] == fingerprints[1]


def test_a_stage_that_fails_ends_those_that_build_on_it_and_no_other(typed, tmp_path):
    words = chain(tmp_path, {"teacher": "exit 3", "pairs": "touch {0}.ran", "other": MARK, "2rf": "touch {0}.ran"})
    code, out, err = typed(*words)
    assert code == 1
    assert "'teacher' failed; why stands above. Left out, for they build on it: pairs, 2rf" in err
    assert f"go on: instaflow submit {words[1]}" in err and "--backend local" in err
    assert "pairs: left out, for it builds on 'teacher'" in out
    assert (tmp_path / "run" / "other" / "done.json").exists()
    assert not [*(tmp_path / "run").glob("*.ran")]


@pytest.mark.parametrize("line", ["exit 0", MARK.replace("exit 0", "exit 3")], ids=["undone", "exit code"])
def test_a_stage_that_is_left_undone_or_whose_process_fails_has_failed(typed, tmp_path, line):
    code, _, err = typed(*chain(tmp_path, {"teacher": line, "other": MARK}))
    assert code == 1 and "'teacher' failed; why stands above. Left out, for it builds on it: pairs\n" in err


def test_all_stages_run_once_and_what_came_of_them_is_told(typed, tmp_path):
    lines = dict.fromkeys(["teacher", "pairs", "other", "2rf", "student"], "echo x >> {0}.ran; " + MARK)
    code, out, _ = typed(*chain(tmp_path, lines))
    assert code == 0 and f"instaflow sample {tmp_path}/run/student/model" in out
    for name in lines:
        assert (tmp_path / "run" / f"{name}.ran").read_text() == "x\n"


WAITS = "mkdir -p {0}; trap 'touch {0}/told' TERM; touch {0}/begun; until [ -e {0}/go ]; do sleep 0.1; done; "
"""A line that ends when it is let go, and notes that it was told to stop."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_told_to_stop_it_tells_the_stage_once_and_starts_nothing_more(typed, tmp_path, number):
    run = tmp_path / "run"
    words = chain(tmp_path, {"teacher": WAITS + "exit 75", "other": "touch {0}.ran; " + MARK})
    with started(*words) as process:
        wait_for(run / "teacher" / "begun")
        os.kill(process.pid, number)
        wait_for(run / "teacher" / "told")
        (run / "teacher" / "told").unlink()
        time.sleep(1)  # several looks at it
        (run / "teacher" / "go").touch()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and not (run / "teacher" / "told").exists()
    assert f"Stopped: Stage 'teacher' was told to stop ({number.name})\nHint: To go on: instaflow submit" in err
    assert "\nteacher  interrupted" in "\n" + typed("status", run)[1] and not (run / "other.ran").exists()


def test_a_stage_that_comes_to_its_end_when_told_to_stop_is_the_last(tmp_path):
    with started(*chain(tmp_path, {"teacher": WAITS + MARK, "pairs": "touch {0}.ran"})) as process:
        wait_for(tmp_path / "run" / "teacher" / "begun")
        process.terminate()
        (tmp_path / "run" / "teacher" / "go").touch()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "Stopped before stage 'pairs' (SIGTERM)" in err
    assert not (tmp_path / "run" / "pairs.ran").exists()


def test_ctrl_c_twice_ends_what_does_not_listen(tmp_path):
    run = tmp_path / "run"
    with started(*chain(tmp_path, {"teacher": WAITS + MARK})) as process:
        wait_for(run / "teacher" / "begun")
        process.send_signal(signal.SIGINT)
        wait_for(run / "teacher" / "told")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 75
    assert not is_alive(run, "teacher")


def test_commands_before_the_stage_end_too_when_told_to_stop(tmp_path):
    with started(*chain(tmp_path, {"teacher": "mkdir -p {0}; touch {0}/begun; sleep 60"})) as process:
        wait_for(tmp_path / "run" / "teacher" / "begun")
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 75 and not is_alive(tmp_path / "run", "teacher")


def is_alive(run: Path, stage: str) -> bool:
    """Whether a process of the group that works on a stage is left; its log is called after the group."""
    (log,) = (run / "jobs").glob(f"{stage}-*.log")
    try:
        os.killpg(int(log.stem.rpartition("-")[2]), 0)
    except ProcessLookupError:
        return False
    return True


def test_a_second_submission_is_told_of_the_first_and_status_of_the_stage_at_work(typed, tmp_path):
    words = chain(tmp_path, {"teacher": WAITS + MARK, "pairs": MARK, "other": MARK})
    with started(*words) as process:
        wait_for(tmp_path / "run" / "teacher" / "begun")
        code, _, err = typed(*words)
        assert code == 1 and f"'{tmp_path / 'run'}' is being submitted by " in err
        assert "\nteacher  running " in "\n" + typed("status", tmp_path / "run")[1]
        (tmp_path / "run" / "teacher" / "go").touch()
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_status_tells_of_commands_that_fail_before_the_stage_begins(typed, tmp_path):
    typed(*chain(tmp_path, {"teacher": "exit 3", "other": MARK}))
    code, out, _ = typed("status", tmp_path / "run")
    assert code == 1 and "its commands ended with exit code 3, and the stage is not done" in out
    assert "pairs    waiting      for 'teacher', which failed" in out


def test_an_earlier_stop_does_not_hide_a_failure(typed, tmp_path):
    state = 'mkdir -p {0}; echo \'{{"state": "interrupted"}}\' > {0}/state.json; exit 75'
    assert typed(*chain(tmp_path, {"teacher": state}))[0] == 75
    code, _, err = typed(*chain(tmp_path, {"teacher": "exit 1", "other": MARK}))
    assert code == 1 and "'teacher' failed" in err


def test_a_stage_that_was_told_to_stop_itself_ends_the_chain_as_interrupted(typed, tmp_path):
    state = 'mkdir -p {0}; echo \'{{"state": "interrupted"}}\' > {0}/state.json; exit 1'  # torchrun's code
    code, _, err = typed(*chain(tmp_path, {"teacher": state, "other": "touch {0}.ran"}))
    assert code == 75 and "Stopped: Stage 'teacher' was told to stop\n" in err
    assert not (tmp_path / "run" / "other.ran").exists()


def test_a_dry_run_prints_what_each_stage_would_do_and_the_shell_reads_it(typed, tmp_path):
    cluster = {"environment": {"A": "x $y"}, "modules": ["cuda"], "lines": ["#SBATCH --x", "ulimit -n 9"], "gpus": 2}
    code, out, _ = typed(*chain(tmp_path, **cluster), "--dry-run")
    assert code == 0 and not (tmp_path / "run").exists()
    teacher, pairs = out.partition("# --- teacher\n")[2].split("# --- pairs\n")
    assert f"cd {Path.cwd()} || exit 1\nulimit -n 9\nmodule load cuda || exit 1\nexport A='x $y'\n" in teacher
    assert "SBATCH" not in out and "srun" not in out
    assert "after teacher, on this machine" in pairs
    end = f" couple {tmp_path}/run/jobs/experiment.yaml --stage pairs"
    assert f"exec {sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2 --no-python " in pairs
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 " in pairs and f"{end}\n\n# --- other\n" in pairs
    assert subprocess.run(["bash", "-n"], input=out, text=True, capture_output=True).stderr == ""


def test_a_profile_counts_and_stands_in_the_hint(typed, tmp_path):
    (tmp_path / "it's.yaml").write_text("lines: [exit 7]")
    code, _, err = typed(*chain(tmp_path), "--profile", tmp_path / "it's.yaml")
    assert code == 1 and "'teacher' and 'other' failed" in err
    assert shlex.join(["--profile", str(tmp_path / "it's.yaml"), "--backend", "local"]) in err


def test_nothing_runs_where_a_later_stage_s_prompts_are_missing_or_a_command_works_on_it(typed, tmp_path):
    words = chain(tmp_path, {"teacher": "touch {0}.ran; " + MARK})
    code, _, err = typed(*words, "--set", f"stages.pairs.prompts={tmp_path}/none.txt")
    assert code == 1 and "none.txt" in err
    with locked(tmp_path / "run" / "pairs"):
        code, _, err = typed(*words)
        assert code == 1 and "pairs" in err
    assert not (tmp_path / "run" / "teacher.ran").exists()


def test_it_runs_from_any_folder_and_an_experiment_of_any_name(typed, tmp_path, monkeypatch):
    folder = tmp_path / "it's a\nfolder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert typed(*chain(folder, {"teacher": "pwd > where; exit 3", "other": "exit 3"}))[0] == 1
    assert (folder / "where").read_text() == f"{folder}\n"


def test_an_image_of_apptainer_s_is_used_and_any_other_refused(typed, tmp_path):
    code, out, _ = typed(*chain(tmp_path, container="/images/it.sif", gpus=0), "--dry-run")
    assert code == 0
    assert f"exec apptainer exec \\\n    --bind={Path.cwd()},{tmp_path}/run \\\n" in out
    assert "/images/it.sif \\\n    instaflow teacher" in out
    code, _, err = typed(*chain(tmp_path, container="nvcr.io#nvidia/pytorch:26.01-py3"), "--dry-run")
    assert code == 1 and "such an image is started by pyxis" in err


def test_it_has_no_scripts_to_write(typed, tmp_path):
    code, _, err = typed(*chain(tmp_path), "--write")
    assert code == 2 and "--backend local writes none" in err


def test_the_experiment_is_kept_as_the_jobs_run_it(typed, tmp_path):
    """A change of the file while stages run changes nothing under way."""
    words = chain(tmp_path, {"teacher": MARK, "pairs": MARK, "other": MARK})
    assert typed(*words)[0] == 0
    kept = yaml.safe_load((tmp_path / "run" / "jobs" / "experiment.yaml").read_text())
    assert list(kept["stages"]) == ["teacher", "pairs", "other"] and "cluster" not in kept
    assert not list((tmp_path / "run" / "jobs").glob("*.sh"))
