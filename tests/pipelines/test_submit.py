"""The scripts of a chain of jobs, where there is no Slurm; tests/pipelines/test_slurm.py runs them on one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from instaflow.config import load_experiment
from instaflow.errors import ConfigError, InstaFlowError
from instaflow.jobs import Turn, read_jobs, turn_of
from instaflow.rundir import locked
from pipelines import submit
from pipelines.batch_scripts import quoted
from tests.experiments import folders, mark_done, write

CLUSTER = """
cluster:
  partition: gpu
  account: me
  nodes: 2
  gpus: 2
  cpus: 6
  memory: 64G
  time: 1-00:00:00
  stages:
    couple: {nodes: 1, gpus: 4, array: 8}
    evaluate: {nodes: 1, gpus: 1}
"""


@pytest.fixture
def submitted(typed, tmp_path):
    """`instaflow submit --dry-run` of a small experiment; returns its scripts by their stages' names."""

    def dry_run(*words: str, cluster: str = CLUSTER) -> dict[str, str]:
        small = write(tmp_path)
        config = write(tmp_path, cluster + Path(small).read_text(), "with-cluster.yaml")
        code, out, err = typed("submit", config, "--run-dir", tmp_path / "run", "--dry-run", *words)
        assert code == 0, err
        parts = re.split(r"^# --- (.*)\n", out, flags=re.MULTILINE)
        return {Path(path).stem: text for path, text in zip(parts[1::2], parts[2::2], strict=True)}

    return dry_run


def options(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")}


def words_of(script: str) -> str:
    """The one command that starts the stage."""
    (found,) = re.findall(r"^srun (?:.*\\\n)*.*", script, flags=re.MULTILINE)
    return re.sub(r" \\\n +", " ", found)


def test_each_stage_has_a_script_that_asks_for_what_the_experiment_says(submitted, tmp_path):
    scripts = submitted()
    assert list(scripts) == ["teacher", "pairs", "2rf", "student", "report"]
    log = tmp_path / "run" / "jobs"
    common = {"--partition=gpu", "--account=me", "--cpus-per-task=6", "--mem=64G", "--time=1-00:00:00"}
    common |= {"--signal=USR1@300", "--requeue", "--open-mode=append", f"--chdir={Path.cwd()}"}
    common |= {"--kill-on-invalid-dep=yes"}  # what can never run does not wait for ever, submitted by hand either
    assert options(scripts["2rf"]) == common | {
        "--job-name=run-2rf",
        f"--output={log}/2rf-%j.log",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
    }
    assert options(scripts["pairs"]) == common | {
        "--job-name=run-pairs",
        f"--output={log}/pairs-%j.log",  # of one shard: there is nothing to share
        "--nodes=1",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
    }
    assert "--kill-on-invalid-dep=yes" not in options(scripts["teacher"])  # which waits for nothing
    assert not log.exists()


def test_a_couple_stage_is_an_array_of_workers_with_a_gpu_for_each_task(submitted, tmp_path):
    pairs = submitted("--set", "stages.pairs.records_per_shard=2")["pairs"]
    assert {"--array=0-3", f"--output={tmp_path}/run/jobs/pairs-%A_%a.log"} < options(pairs)  # four shards
    assert words_of(pairs).startswith("srun --kill-on-bad-exit=0 --wait=0 --cpus-per-task=6 --gpus-per-task=1 ")
    alone = submitted("--set", "cluster.stages.couple.gpus=1")["pairs"]
    assert "--gpus-per-task" not in alone  # the job's one is the task's
    assert 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" ||' in pairs


def test_a_script_runs_the_stage_s_own_command(submitted, tmp_path):
    program = Path(sys.executable).with_name("instaflow")
    begin = str(program) if program.exists() else f"{sys.executable} -m cli"
    end = f"{tmp_path}/run/jobs/experiment.yaml --stage"
    assert words_of(submitted()["2rf"]).endswith(f"--wait=60 --cpus-per-task=6 {begin} reflow {end} 2rf || code=$?")


def test_lines_modules_and_variables_come_before_the_command_in_this_order(submitted):
    script = submitted(
        cluster="cluster: {lines: [ulimit -n 4096, '#SBATCH --constraint=a100'], modules: [cuda, gcc/12],"
        " environment: {HF_HOME: /data/it's, EMPTY: ''}}"
    )["teacher"]
    said = "ulimit -n 4096\nmodule load cuda gcc/12 || exit 1\nexport HF_HOME='/data/it'\"'\"'s'\nexport EMPTY=''\n"
    assert script.index("starts on") < script.index(said) < script.index("\nsrun ")
    assert "#SBATCH --requeue\n#SBATCH --constraint=a100\n\n" in script  # Slurm reads none below a command


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            "container: nvcr.io#nvidia/pytorch:26.01-py3, mounts: [/data, '/a:/b']",
            "--container-image=nvcr.io#nvidia/pytorch:26.01-py3 --container-mounts={here}:{here},{run}:{run},"
            "/data:/data,/a:/b --container-workdir={here} instaflow teacher",
        ),
        (
            "container: /images/it.sif, mounts: [/data]",
            "apptainer exec --nv --bind={here},{run},/data --pwd={here} /images/it.sif instaflow teacher",
        ),
        ("container: /images/it.sif, gpus: 0", "apptainer exec --bind={here},{run} --pwd={here} /images/it.sif insta"),
    ],
)
def test_a_container_sees_the_run_and_the_folder_that_it_is_called_in(submitted, tmp_path, settings, words):
    said = words_of(submitted(cluster=f"cluster: {{{settings}}}")["teacher"]).replace("'", "")
    assert words.format(here=Path.cwd(), run=tmp_path / "run") in said


@pytest.mark.parametrize("name", ["10:30", "a,b"])
def test_a_folder_that_a_list_of_mounts_cannot_tell_is_refused(typed, tmp_path, name):
    words = ["submit", write(tmp_path), "--dry-run", "--set", "cluster.gpus=0", "--run-dir"]
    code, _, err = typed(*words, tmp_path / name, "--set", "cluster.container=it.sif")
    assert code == 1 and f"'{tmp_path}/{name}' cannot be mounted in a container" in err
    assert typed(*words, tmp_path / name)[0] == 0


def test_the_shell_reads_every_script(submitted):
    for script in submitted("--set", "cluster.environment={A: 'x $y `z` \"'}").values():
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


@pytest.fixture
def turn(tmp_path):
    """One turn of a script, with stand-ins for Slurm's two commands, which a script calls on its node."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "run" / "jobs").mkdir(parents=True)

    def run(script: str, srun: str, scontrol: str = 'echo "scontrol $@"') -> tuple[int, list[str], Turn]:
        for name, does in {"srun": srun, "scontrol": scontrol}.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        variables = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
        variables |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
        log = tmp_path / "run" / "jobs" / f"{'pairs-7_0' if '--array' in script else '2rf-7'}.log"
        before = log.read_text() if log.exists() else ""
        with open(log, "a") as file:
            done = subprocess.run(["bash"], input=script, text=True, stdout=file, stderr=file, env=variables)
        return done.returncode, log.read_text().removeprefix(before).splitlines(), turn_of(log)

    return run


@pytest.mark.parametrize("lines", ["[]", "[set -euo pipefail]"])
@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (75, True), (138, True), (143, False)])
def test_a_job_that_was_told_to_stop_queues_itself_again(submitted, turn, code, again, lines):
    found, said, _ = turn(submitted(cluster=f"cluster: {{lines: {lines}}}")["2rf"], f"exit {code}")
    assert found == code
    told = [line.partition("; what it has kept: ")[0] for line in said]
    assert told == [
        "Job 7 starts on n1",
        *(["This job is queued again, and goes on by itself"] if again else []),
        f"Job 7 ends with exit code {code}",
        *(["scontrol requeue 7"] if again else []),
    ]


def test_a_job_that_slurm_does_not_queue_again_fails_and_says_so(submitted, turn):
    code, _, found = turn(submitted()["2rf"], "exit 75", "echo 'slurm_requeue error: Access denied'; exit 1")
    assert code == 1 and found.exit_code == 1
    assert found.reason == "Slurm did not queue this job again: submit what is not done anew"


@pytest.mark.parametrize(
    ("stage", "change"), [("2rf", []), ("pairs", ["--set", "stages.pairs.records_per_shard=2"])], ids=["alone", "array"]
)
def test_a_job_whose_turns_keep_nothing_fails_after_some(submitted, turn, tmp_path, stage, change):
    script = submitted(*change)[stage]
    kept = {"2rf": "checkpoints/{}/state.json", "pairs": "shards/{}.json"}[stage]
    make = f"mkdir -p {tmp_path}/run/{stage}/$(dirname {kept}); touch {tmp_path}/run/{stage}/{kept}; exit 75"
    codes = [turn(script, make.format(place, place))[0] for place in range(5)]
    codes += [turn(script, "exit 75")[0] for _ in range(2)]
    assert codes == [75] * 7
    code, said, found = turn(script, "exit 75")
    assert code == 1 and found.exit_code == 1 and not any("scontrol" in line for line in said)
    assert found.reason == "3 turns of this job in a row kept nothing: each is too short"
    hint = {"2rf": "or a shorter notice", "pairs": "or make the stage anew with a smaller records_per_shard"}[stage]
    assert f"Hint: Ask for a longer time, {hint}" in said


@pytest.mark.parametrize(
    ("settings", "code", "reason"),
    [
        ("lines: [source /absent.sh || exit 3]", 3, "/absent.sh: No such file or directory"),
        ("lines: [set -e, source /absent.sh]", 1, "/absent.sh: No such file or directory"),
        ("modules: [cuda]", 1, "module: command not found"),
    ],
)
def test_a_job_that_ends_before_its_command_tells_why(submitted, turn, settings, code, reason):
    found, _, told = turn(submitted(cluster=f"cluster: {{{settings}}}")["2rf"], "echo ran")
    assert found == code and told.exit_code == code and told.reason.endswith(reason)


def test_what_is_done_is_left_out(submitted, typed, tmp_path):
    stages = folders(write(tmp_path), run=tmp_path / "run")
    for stage in ("teacher", "pairs"):
        mark_done(stages[stage])
    assert list(submitted()) == ["2rf", "student", "report"]


@pytest.mark.parametrize("stage", ["teacher", "pairs"])
def test_a_stage_that_was_begun_with_other_settings_is_refused(typed, tmp_path, stage):
    stages = folders(write(tmp_path), run=tmp_path / "run")
    mark_done(stages["teacher"])
    if stage == "pairs":  # half done
        with locked(stages["pairs"].folder):
            stages["pairs"].begin()
    change = "seed=3" if stage == "teacher" else "stages.pairs.count=16"
    code, out, err = typed("submit", write(tmp_path), "--run-dir", tmp_path / "run", "--dry-run", "--set", change)
    assert code == 1 and out == ""
    assert err.startswith(f"Error: Stage '{stage}' in '{tmp_path}/run' was made with other settings: ")


def test_a_report_with_other_settings_is_made_anew(submitted, tmp_path):
    stages = folders(write(tmp_path), run=tmp_path / "run")
    for stage in stages.values():
        mark_done(stage)
    assert submitted() == {}
    assert list(submitted("--set", "stages.report.compared_samples=4")) == ["report"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cluster.time=0:05:00", "Stage 'teacher' has a time of 0:05:00, and a notice of 300 s before its end"),
        ("cluster.nodes=3", "'stages.teacher.autoencoder_phases.0': global_batch_size is 4, which 6 processes with"),
        ("stages.pairs.prompts=none.txt", "The file '{folder}/none.txt' does not exist"),
    ],
)
def test_what_could_not_run_is_refused_before_anything_is_submitted(typed, tmp_path, change, message):
    config = write(tmp_path, CLUSTER + Path(write(tmp_path)).read_text(), "with-cluster.yaml")
    code, _, err = typed("submit", config, "--run-dir", tmp_path / "run", "--set", change)
    assert code == 1 and err.startswith(f"Error: {message.format(folder=tmp_path)}")


def test_a_stage_may_not_take_the_jobs_folder(typed, tmp_path):
    config = write(
        tmp_path, Path(write(tmp_path)).read_text().replace("  pairs:", "  jobs:").replace(": pairs", ": jobs")
    )
    code, _, err = typed("submit", config, "--run-dir", tmp_path / "run")
    assert code == 1 and err.startswith("Error: 'stages.jobs': the jobs' own files go into a folder of that name")


def test_without_slurm_the_error_names_the_way_that_needs_none(typed, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = typed("submit", write(tmp_path), "--run-dir", tmp_path / "run", "--set", "cluster.gpus=0")
    assert code == 1 and "There is no Slurm here" in err and "add --backend local" in err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands, which queue nothing; returns what was submitted: the scripts as they stood."""
    (tmp_path / "slurm").mkdir()
    sbatch = f'cat "${{@: -1}}" >> {tmp_path}/submitted; echo 7'
    partitions = "printf 'both*|1:00:00|2\\nlong|infinite|1\\n'"
    for name, does in {"sbatch": sbatch, "squeue": ":", "sinfo": partitions}.items():
        (tmp_path / "slurm" / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / "slurm" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/slurm:/usr/bin:/bin")
    return tmp_path / "submitted"


def test_scripts_are_written_for_those_who_submit_by_hand(typed, submitted, tmp_path, monkeypatch):
    scripts = submitted(cluster="")
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm is asked for
    words = ["submit", write(tmp_path), "--run-dir", tmp_path / "run", "--write"]
    code, out, err = typed(*words)
    assert code == 0, err
    folder = tmp_path / "run" / "jobs"
    for name, text in scripts.items():
        assert (folder / f"{name}.sh").read_text().splitlines()[2:] == text.rstrip().splitlines()[2:]
        assert str(folder / f"{name}.sh") in out
    assert load_experiment(str(folder / "experiment.yaml")).run == str(tmp_path / "run")
    assert "pairs    waiting      for 'teacher'" in typed("status", tmp_path / "run")[1]
    (folder / "teacher-31.log").write_text("Job 31 starts on n1\nError: no room\nJob 31 ends with exit code 1\n")
    assert "teacher  failed       job 31\n         no room\n" in typed("status", tmp_path / "run")[1]


def test_a_script_that_was_edited_stays_and_is_submitted_so(typed, tmp_path, slurm):
    words = ["submit", write(tmp_path), "--run-dir", tmp_path / "run", "--set", "cluster.gpus=0"]
    assert typed(*words, "--write")[0] == 0
    script = tmp_path / "run" / "jobs" / "2rf.sh"
    script.write_text(script.read_text() + "# mine\n")
    code, out, err = typed(*words, "--set", "cluster.time=8:00:00")
    assert code == 0, err
    assert out.startswith(f"Kept, for it was edited: {script}; to have it written anew, delete it\nteacher: job 7\n")
    assert slurm.read_text().count("# mine") == 1 and slurm.read_text().count("--time=8:00:00") == 4
    script.unlink()
    code, out, _ = typed(*words)
    assert code == 0 and "Kept" not in out and "# mine" not in script.read_text()


def test_a_run_that_a_command_works_on_is_not_submitted(typed, tmp_path, slurm):
    stages = folders(write(tmp_path), run=tmp_path / "run")
    words = ["submit", write(tmp_path), "--run-dir", tmp_path / "run"]
    with locked(stages["pairs"].folder, shared=True):
        code, _, err = typed(*words)
    assert code == 1 and not slurm.exists()
    assert err.startswith(f"Error: Stage 'pairs' in '{tmp_path}/run' is being worked on by process {os.getpid()} on ")
    assert typed(*words)[0] == 0


def test_two_submissions_at_once_are_told_of_one_another(typed, tmp_path, slurm):
    with locked(tmp_path / "run" / "jobs"):
        code, _, err = typed("submit", write(tmp_path), "--run-dir", tmp_path / "run")
    assert code == 1 and not slurm.exists()
    assert err.startswith(f"Error: '{tmp_path}/run' is being submitted by process {os.getpid()} on ")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("{}", ""),
        ("{nodes: 2, time: 1:00:00}", ""),
        ("{nodes: 4}", "4 nodes, of which there are 2"),
        ("{time: 1-00:00:00}", "a time of 1-00:00:00, of which 1:00:00 is allowed"),
        ("{partition: long, nodes: 2, time: 1-00:00:00}", "2 nodes, of which there is 1"),
        ("{partition: hidden, nodes: 4, time: 1-00:00:00}", ""),
    ],
)
def test_a_job_that_its_partition_can_never_start_is_told(typed, tmp_path, slurm, asked, told):
    config = write(
        tmp_path, f"cluster: {{gpus: 0, stages: {{2rf: {asked}}}}}\n" + Path(write(tmp_path)).read_text(), "c.yaml"
    )
    code, out, err = typed("submit", config, "--run-dir", tmp_path / "run")
    assert code == 0, err
    warned = f"2rf: asks its partition for {told}; it may wait for ever, as `squeue` will tell\n"
    assert out.endswith(warned) if told else "for ever" not in out


def test_a_value_is_quoted_as_slurm_reads_it():
    values = {"plain/x-1": "plain/x-1", 'a "b\\': '"a \\"b\\\\"', "a b": '"a b"'}
    assert {value: quoted(value) for value in values} == values
    with pytest.raises(ConfigError, match="cannot stand in a batch script"):
        quoted("a\nb")


def test_slurm_is_asked_as_if_from_outside_of_a_job(typed, tmp_path, slurm, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    (tmp_path / "slurm" / "sbatch").write_text(f"#!/bin/bash\nenv > {tmp_path}/environment\necho '7;main'\n")
    assert typed("submit", write(tmp_path), "--run-dir", tmp_path / "run", "--set", "cluster.gpus=0")[0] == 0
    seen = (tmp_path / "environment").read_text().splitlines()
    assert "SLURM_CONF=/etc/other.conf" in seen and "SLURM_JOB_ID=5" not in seen
    assert read_jobs(tmp_path / "run" / "jobs")["teacher"].job == "7"  # of the cluster "main"


def test_live_jobs_of_a_run_are_known_by_their_scripts_wherever_a_link_leads(typed, tmp_path, slurm):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run" / "jobs").mkdir(parents=True)
    listed = [
        f"31|RUNNING|{tmp_path}/link/jobs/2rf.sh",
        "32|PENDING|/elsewhere/jobs/2rf.sh",
        "a line of another kind",
        "",
    ]
    (tmp_path / "slurm" / "squeue").write_text("#!/bin/bash\n" + "".join(f"echo '{line}'\n" for line in listed))
    code, _, err = typed("submit", write(tmp_path), "--run-dir", tmp_path / "run", "--set", "cluster.gpus=0")
    assert code == 1 and not slurm.exists()
    assert "has live jobs: '2rf' (job 31: running)\n" in err and err.rstrip().endswith("scancel 31")


@pytest.mark.parametrize("fault", [InstaFlowError("no such partition"), KeyboardInterrupt()], ids=["refused", "Ctrl-C"])
def test_all_or_none_is_submitted(tmp_path, monkeypatch, fault):
    called = []

    def slurm(*words):
        called.append(words)
        if words[0] == "sbatch" and len(called) == 2:
            raise fault
        return "7\n"

    monkeypatch.setattr(submit, "slurm", slurm)
    experiment = load_experiment(write(tmp_path), run=str(tmp_path / "run"))
    with pytest.raises(type(fault)):
        submit.submit(experiment, submit.jobs_of(experiment, ()), tmp_path)
    assert [words[0] for words in called] == ["sbatch", "sbatch", "scancel"] and called[-1] == ("scancel", "7")
    assert not (tmp_path / "jobs.json").exists()
