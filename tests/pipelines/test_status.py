import json
import os
import time
from pathlib import Path

import pytest

from instaflow.couplings.shards import sidecar_path
from instaflow.files import write_json
from instaflow.jobs import Submitted, write_jobs
from instaflow.rundir import StageFolder
from pipelines.status import duration
from tests.couplings.made import make_couplings, manifest_of
from tests.experiments import folders, mark_done, write


@pytest.fixture
def stages(tmp_path) -> dict[str, StageFolder]:
    return folders(write(tmp_path), run=tmp_path / "run")


@pytest.fixture
def lines(typed, tmp_path):
    """What `instaflow status` prints, a stage's name to its other words; the exit code is looked at."""

    def run(expect: int) -> dict[str, str]:
        code, out, err = typed("status", tmp_path / "run")
        assert (code, err) == (expect, "")
        found, name = {}, ""
        for line in out.splitlines():
            if line[0] != " ":
                name, _, line = line.partition(" ")
                found[name] = " ".join(line.split())
            else:
                found[name] += " | " + line.strip()
        return found

    return run


def submit(stages: dict[str, StageFolder], **numbers: str) -> Path:
    """What a submission leaves; returns its folder."""
    folder = stages["teacher"].run / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    after = {"pairs": ["teacher"], "2rf": ["teacher", "pairs"]}
    chain = {name: Submitted(after.get(name, []), numbers.get(name)) for name in list(stages)[:3]}
    write_jobs(folder, chain)
    return folder


def begin(stage: StageFolder, state: str = "running", **facts: str) -> None:
    stage.folder.mkdir(parents=True, exist_ok=True)
    settings = {"identity": {}, "settings": stage.stage.model_dump(mode="json")}
    write_json(stage.folder / "stage.json", settings)
    stage.set_state(state, **facts)


def grow_old(file: Path, seconds: float) -> None:
    os.utime(file, (time.time() - seconds,) * 2)


def test_a_chain_that_waits_for_its_first_job(stages, lines):
    submit(stages, teacher="11", pairs="12", **{"2rf": "13"})
    assert lines(75) == {
        "teacher": "waiting for its turn; job 11",
        "pairs": "waiting for 'teacher'; job 12",
        "2rf": "waiting for 'teacher' and 'pairs'; job 13",
    }


def test_a_run_that_was_not_submitted_tells_of_what_has_begun(stages, lines):
    mark_done(stages["teacher"])
    begin(stages["pairs"], "failed", reason="the disk is full")
    assert lines(1) == {"teacher": "done in 0 s", "pairs": "failed | the disk is full"}
    write_json(stages["pairs"].folder / "done.json", {"fingerprint": "", "seconds": 4000.0})
    assert lines(0) == {"teacher": "done in 0 s", "pairs": "done in 1 h 7 min"}


def test_a_training_s_progress_is_over_all_of_its_networks_and_its_rate_that_of_the_last(stages, lines):
    begin(stages["teacher"])
    figures = [("autoencoder", 4, 1.0), ("autoencoder", 8, 2.0), ("denoiser", 2, 2.5), ("denoiser", 4, 3.5)]
    stages["teacher"].stats_file.write_text(
        "".join(json.dumps({"job": job, "samples_seen": seen, "seconds": at}) + "\n" for job, seen, at in figures)
    )
    assert lines(75) == {"teacher": "running 12 of 16 samples, 2.0/s, 2 s left"}
    begin(stages["teacher"], "interrupted")
    assert lines(75) == {"teacher": "interrupted 12 of 16 samples"}


def test_a_stage_that_gives_no_sign_says_for_how_long(stages, lines):
    begin(stages["teacher"])
    stages["teacher"].stats_file.write_text('{"job": "denoiser", "samples_seen": 4, "seconds": 1}\n')
    for file in ("state.json", "stats.jsonl"):
        grow_old(stages["teacher"].folder / file, 7200)
    assert lines(75) == {"teacher": "running 4 of 16 samples, nothing written for 2 h 0 min"}
    for seconds, told in {500: "", 700: ", nothing written for 12 min"}.items():
        grow_old(stages["teacher"].stats_file, seconds)
        assert lines(75) == {"teacher": "running 4 of 16 samples" + told}


def test_a_stage_whose_mark_is_still_to_come_is_running(stages, lines):
    begin(stages["teacher"], "done")
    assert lines(75) == {"teacher": "running 0 of 16 samples"}


def test_a_rate_is_of_what_was_done_lately(stages, lines):
    begin(stages["teacher"])
    times = [100.0 * step for step in range(5)] + [400.0 + step for step in range(1, 20)]
    figures = [{"job": "denoiser", "samples_seen": seen / 2, "seconds": at} for seen, at in enumerate(times)]
    stages["teacher"].stats_file.write_text("".join(json.dumps(line) + "\n" for line in figures))
    assert "0.5/s" in lines(75)["teacher"]


def test_couplings_are_counted_by_their_shards(stages, lines):
    begin(stages["pairs"])
    make_couplings(stages["pairs"].folder, manifest := manifest_of())
    last = manifest.plan.num_shards - 1
    sidecar_path(stages["pairs"].folder, last).unlink()
    made = manifest.count - len(manifest.plan.indices(last))
    assert 0 < made < manifest.count
    assert lines(75)["pairs"].startswith(f"running {made} of {manifest.count} couplings")


LOG = """Job 11 starts on n1
{}
srun: error: n1: task 0: Exited with exit code {code}
Job 11 ends with exit code {code}
"""


@pytest.mark.parametrize(
    ("printed", "code", "told"),
    [
        ("Error: it is too large\nHint: make it smaller", 1, "failed job 11 | it is too large | Hint: make it smaller"),
        ("Error: the port is taken\nError: the first one is not there", 1, "failed job 11 | the port is taken"),
        ("Traceback\nRuntimeError: odd", 1, "failed job 11 | RuntimeError: odd"),
        ("teacher: 4/8 samples", 137, "failed job 11 | teacher: 4/8 samples"),
        (
            "slurmstepd: error: Detected 1 oom-kill event(s)",
            137,
            "failed job 11 | slurmstepd: error: Detected 1 oom-kill event(s)",
        ),
        (
            "srun: unrecognized option '--container-image=x'\nTry \"srun --help\" for more information",
            1,
            "failed job 11 | srun: unrecognized option '--container-image=x'",
        ),
        (
            "slurmstepd: error: execve(): apptainer: No such file or directory",
            2,
            "failed job 11 | slurmstepd: error: execve(): apptainer: No such file or directory",
        ),
        (
            "RuntimeError: odd\nsrun: error: Timed out waiting for job step to complete",
            1,
            "failed job 11 | RuntimeError: odd",
        ),
        ("", 9, "failed job 11 | it ended with exit code 9, and nothing was printed"),
        ("Stopped: told to", 75, "interrupted job 11"),
        ("srun: error: Node failure on n1", 0, "interrupted job 11"),
        ("", 138, "interrupted job 11"),
    ],
)
def test_a_job_s_log_tells_how_it_ended(stages, lines, printed, code, told):
    folder = submit(stages, teacher="11", pairs="12")
    (folder / "teacher-11.log").write_text("Error: of a turn before\n" + LOG.format(printed, code=code))
    found = lines(1 if "failed" in told else 75)
    assert found["teacher"] == told
    assert found["pairs"] == f"waiting for 'teacher'{', which failed' if 'failed' in told else ''}; job 12"


@pytest.mark.parametrize(
    ("why", "told"),
    [
        (" DUE TO TIME LIMIT", "failed job 11 | the job came to its time limit before the stage had saved"),
        ("", "cancelled job 11"),
        (" DUE TO JOB REQUEUE", "interrupted job 11"),
    ],
)
def test_a_job_that_slurm_ends_is_told_so_by_its_log(stages, lines, why, told):
    folder = submit(stages, teacher="11", pairs="12")
    begin(stages["teacher"])
    grow_old(stages["teacher"].folder / "state.json", 5)
    cancelled = f"slurmstepd: error: *** JOB 11 ON n1 CANCELLED AT 2026-01-01T00:00:00{why} ***\n"
    (folder / "teacher-11.log").write_text(f"Job 11 starts on n1\n{cancelled}")
    found = lines(1 if "failed" in told else 75)
    assert found["teacher"].replace("0 of 16 samples; ", "") == told
    waits = {"failed": ", which failed", "cancelled": ", which was cancelled", "interrupted": ""}[told.split()[0]]
    assert found["pairs"] == f"waiting for 'teacher'{waits}; job 12"
    (folder / "teacher-11.log").write_text(f"Job 11 starts on n1\n{cancelled}Job 11 starts on n2\n")
    assert lines(75)["teacher"] == "running 0 of 16 samples; job 11"


def test_a_job_that_saved_when_it_was_cancelled_is_not_interrupted_until_it_is_worked_on(stages, lines):
    folder = submit(stages, teacher="11")
    (folder / "teacher-11.log").write_text(
        "Job 11 starts on n1\nslurmstepd: error: *** JOB 11 ON n1 CANCELLED AT 0 ***\n"
    )
    grow_old(folder / "teacher-11.log", 5)
    begin(stages["teacher"], "interrupted")  # which it wrote a moment later
    assert lines(75)["teacher"] == "cancelled 0 of 16 samples; job 11"
    begin(stages["teacher"])  # by another command
    assert lines(75)["teacher"] == "running 0 of 16 samples; job 11"


def test_a_job_whose_script_was_killed_has_failed_though_its_stage_saved(stages, lines):
    folder = submit(stages, teacher="11", pairs="12")
    killed = "slurmstepd: error: *** STEP 11.0 ON n1 FAILED (non-zero exit code or other failure mode) ***"
    (folder / "teacher-11.log").write_text(f"Job 11 starts on n1\n{killed}\nStopped: told to\n")
    for state in ("running", "interrupted"):
        begin(stages["teacher"], state)
        grow_old(stages["teacher"].folder / "state.json", 5 if state == "running" else -5)
        found = lines(1)
        assert found["teacher"] == (
            "failed 0 of 16 samples; job 11 | the batch script was killed, or ended before its tasks did"
        )
        assert found["pairs"] == "waiting for 'teacher', which failed; job 12"


@pytest.mark.parametrize("state", ["interrupted", "failed"])
def test_a_job_in_a_further_turn_runs_before_its_stage_says_so(stages, lines, state):
    folder = submit(stages, teacher="11")
    begin(stages["teacher"], state, reason="x")
    grow_old(stages["teacher"].folder / "state.json", 5)
    (folder / "teacher-11.log").write_text(LOG.format("Stopped: told to", code=75) + "Job 11 starts on n2\n")
    assert lines(75)["teacher"] == "running 0 of 16 samples; job 11"


def test_a_job_that_ends_as_slurm_ends_it_has_no_code_of_its_own(stages, lines):
    folder = submit(stages, teacher="11")
    cancelled = "slurmstepd: error: *** JOB 11 ON n1 CANCELLED AT 0 DUE TO JOB REQUEUE ***"
    for code in (0, 143):
        (folder / "teacher-11.log").write_text(LOG.format(cancelled, code=code))
        assert lines(75)["teacher"] == "interrupted job 11"


def test_a_job_that_was_submitted_by_hand_later_is_the_stage_s_own(stages, lines):
    folder = submit(stages, teacher="9", pairs="10")
    (folder / "teacher-9.log").write_text(LOG.format("Error: no room", code=1).replace("11", "9"))
    assert lines(1)["teacher"] == "failed job 9 | no room"
    (folder / "teacher-12.log").write_text("Job 12 starts on n1\n")
    assert lines(75)["teacher"] == "running job 12"
    (folder / "pairs-13_0.log").write_text("Job 14 starts on n1\n")
    assert lines(75)["pairs"] == "running job 13"


def test_of_an_array_one_job_s_failure_counts_whatever_the_others_say(stages, lines):
    folder = submit(stages, pairs="12")
    mark_done(stages["teacher"])
    begin(stages["pairs"], "unfinished")
    grow_old(stages["pairs"].folder / "state.json", 5)
    end = "Job {} starts on n1\n{}\nJob {} ends with exit code {}\n"
    (folder / "pairs-12_0.log").write_text(end.format(14, "Error: no room", 14, 1))
    (folder / "pairs-12_1.log").write_text(end.format(12, "made", 12, 0))
    (folder / "pairs-1_2.log").write_text(end.format(1, "Error: of an earlier submission", 1, 1))
    grow_old(folder / "pairs-1_2.log", 60)
    assert lines(1)["pairs"] == "failed job 12 | no room"
    (folder / "pairs-12_2.log").write_text("Job 16 starts on n2\n")
    for log in folder.glob("pairs-12*"):
        grow_old(log, 5)
    begin(stages["pairs"])  # by the one that has just come
    assert lines(1)["pairs"] == "failed job 12 | no room"
    (folder / "pairs-12_2.log").unlink()
    begin(stages["pairs"], "unfinished")
    grow_old(stages["pairs"].folder / "state.json", 5)
    (folder / "pairs-12_0.log").write_text("Job 15 starts on n2\n")  # in its second turn
    assert lines(75)["pairs"] == "running job 12"


def test_work_by_another_command_since_the_job_counts(stages, lines):
    folder = submit(stages, teacher="11")
    (folder / "teacher-11.log").write_text(LOG.format("Error: x", code=1))
    grow_old(folder / "teacher-11.log", 5)
    begin(stages["teacher"])
    assert lines(75)["teacher"] == "running 0 of 16 samples; job 11"


def test_a_new_submission_forgets_the_failure_before(stages, lines):
    begin(stages["teacher"], "failed", reason="x")
    grow_old(stages["teacher"].folder / "state.json", 5)
    folder = submit(stages, teacher="21")
    (folder / "teacher-11.log").write_text(LOG.format("Error: x", code=1))
    grow_old(folder / "teacher-11.log", 5)
    assert lines(75)["teacher"] == "waiting for its turn; job 21"
    (folder / "teacher-11.log").rename(folder / "teacher-900.log")  # of a Slurm that counts anew since
    assert lines(75)["teacher"] == "waiting for its turn; job 21"


def test_what_a_log_says_to_a_terminal_is_left_out(stages, lines):
    folder = submit(stages, teacher="11")
    coloured = "\x1b]0;title\x07\x1b[1;31mError:\x1b[0m no \x07room"
    (folder / "teacher-11.log").write_text(LOG.format(coloured, code=1))
    assert lines(1)["teacher"] == "failed job 11 | no room"


@pytest.mark.parametrize("name", ["stage.json", "state.json", "done.json"])
@pytest.mark.parametrize("content", ["", "{}", "null", "[]", "5"])
def test_a_stage_s_file_that_is_damaged_is_told(stages, lines, name, content):
    begin(stages["teacher"])
    begin(stages["pairs"])
    (stages["teacher"].folder / name).write_text(content)
    found = lines(1)
    assert found["teacher"].startswith("damaged | ") and "Hint: Delete '" in found["teacher"]
    assert found["pairs"].startswith("running")


@pytest.mark.parametrize(
    "line", ["5", "null", '{"samples_seen": 4}', '{"samples_seen": "x", "job": "j", "seconds": 1}']
)
def test_a_line_of_figures_that_is_none_is_told(stages, lines, line):
    begin(stages["teacher"])
    (stages["teacher"].folder / "stats.jsonl").write_text(line + "\n")
    assert lines(1)["teacher"].startswith("damaged | Its files don't hold what they should")


def test_a_stage_that_was_killed_as_it_began_is_told(stages, lines):
    folder = submit(stages, teacher="11")
    begin(stages["teacher"])
    (stages["teacher"].folder / "state.json").unlink()
    (folder / "teacher-11.log").write_text("Job 11 starts on n1\n")
    assert lines(75)["teacher"] == "running 0 of 16 samples; job 11"


@pytest.mark.parametrize("content", ["[]", '{"teacher": 5}', '{"teacher": {"after": [], "of": 1}}', "{"])
def test_a_list_of_jobs_that_is_damaged_is_an_error(stages, typed, tmp_path, content):
    (submit(stages, teacher="11") / "jobs.json").write_text(content)
    code, _, err = typed("status", tmp_path / "run")
    assert code == 1 and "jobs.json' is damaged" in err and "Hint: Delete" in err


def test_a_folder_that_is_no_run_is_an_error(typed, tmp_path):
    code, _, err = typed("status", tmp_path / "none")
    assert code == 1 and "holds no stage of a run" in err


@pytest.mark.parametrize(
    ("seconds", "words"), [(9, "9 s"), (119, "119 s"), (720, "12 min"), (12000, "3 h 20 min"), (187000, "2 d 3 h")]
)
def test_a_duration_in_words(seconds, words):
    assert duration(seconds) == words
