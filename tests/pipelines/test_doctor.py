"""What the doctor finds, on this machine and on two that see different files; test_slurm.py has it on two nodes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from instaflow import meeting, rundir
from instaflow.config import load_experiment
from instaflow.processes import Process, this_process
from pipelines import doctor, doctor_files, doctor_machine
from pipelines.doctor_table import FAILURE, OK, WARNING, Finding, found, lines, merged
from pipelines.plan import Plan
from tests.experiments import write
from tests.pipelines.runs import ROOT
from tests.test_meeting import free_ports

HERE = ("packages", "PyTorch", "gloo", "NCCL", "compiler", "network", "limits", "Slurm", "models", "weights")
FOLDER = ("renames", "locks", "clock", "disk", "room")


@pytest.fixture
def in_a_moment(monkeypatch):
    """The checks that start processes are left out, and the disk's is a short one."""
    for name in ("gloo", "packages", "compiler", "slurm"):
        monkeypatch.setattr(doctor_machine, name, lambda: (OK, "as ever"))
    monkeypatch.setattr(doctor_files, "TRIED", doctor_files.BLOCK)


@pytest.mark.slow
def test_a_sound_machine_is_told_so_and_left_as_it_was(typed, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_files, "TRIED", 2 * doctor_files.BLOCK)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # as under torchrun, whose store serves its own alone
    code, out, err = typed("doctor", tmp_path / "runs" / "mine", "--json")
    told = {one["check"]: one for one in json.loads(out)}
    assert (code, err) == (0, "") and [*told] == [*HERE, *FOLDER]
    sound = {*FOLDER} - {"disk"}  # whose rate others share
    assert {told[name]["state"] for name in ("packages", "PyTorch", "gloo", *sound)} == {"ok"}
    assert told["gloo"]["words"].startswith("two processes: a sum of a million numbers in ")
    assert torch.__version__ in told["PyTorch"]["words"] and "hard links" in told["renames"]["words"]
    assert not list(tmp_path.iterdir())


def test_of_an_experiment_its_models_files_and_room_are_looked_at(typed, tmp_path, monkeypatch, in_a_moment):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    text = Path(write(tmp_path)).read_text().replace("prompts: [a seven, the digit 7]", "prompts: none.txt")
    config = write(tmp_path, text.replace("init: teacher", "init: nobody/no-model"))
    code, out, err = typed("doctor", config)
    assert (code, err) == (1, "")
    told = out.splitlines()
    places = [place for place, line in enumerate(told) if line.split()[1] == "failure"]
    assert [told[place].split()[0] for place in places] == ["models", "files"]
    assert "offline (HF_HUB_OFFLINE)" in told[places[0]] and "'nobody/no-model' not here" in told[places[0]]
    assert told[places[0] + 1].split(":")[-1].strip() == "hf download nobody/no-model"
    assert f"Stage 'pairs': The file '{tmp_path}/none.txt' does not exist" in told[places[1]]
    assert not (tmp_path / "runs").exists()


def test_what_is_asked_about_is_a_folder_an_experiment_or_a_submitted_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctor.asked("runs/new") == (None, Path("runs/new"))
    experiment, folder = doctor.asked("digits")
    assert experiment and (experiment.source, folder) == ("digits", Path("runs/digits"))
    (tmp_path / "run" / "jobs").mkdir(parents=True)
    assert doctor.asked("run") == (None, Path("run"))
    write(tmp_path / "run" / "jobs", name="experiment.yaml")
    experiment, folder = doctor.asked("run")
    assert experiment and "2rf" in experiment.stages and folder == Path("run")


def test_an_experiment_that_is_not_there_is_an_error(typed):
    code, _, err = typed("doctor", "no-such.yaml")
    assert code == 1 and err.startswith("Error: No experiment file 'no-such.yaml'")


# --- what a trial leaves behind ---------------------------------------------------------------------------------------

AT_THE_DISK = """
import sys, time
from pipelines import doctor, doctor_files, doctor_machine

def fills(place):
    (place / "large").write_text("large")
    print("at it", flush=True)
    time.sleep(60)

for name in ("packages", "pytorch", "gloo", "nccl", "compiler", "network", "limits", "slurm", "models", "measures"):
    setattr(doctor_machine, name, lambda *_: ("ok", "as ever"))
doctor_files.locks, doctor_files.rate = lambda place: ("ok", "as ever"), fills
doctor.run(sys.argv[1])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_doctor_that_is_told_to_end_takes_its_files_along(tmp_path, number):
    words = [sys.executable, "-c", AT_THE_DISK, str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout and process.stdout.readline() == "at it\n" and len([*tmp_path.rglob("large")]) == 1
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 128 + number and not [*tmp_path.iterdir()]


def test_what_a_killed_doctor_left_is_removed_by_the_next_one(tmp_path, in_a_moment):
    me, ended = this_process(), subprocess.Popen(["true"])
    ended.wait()
    killed, live = (tmp_path / f".doctor.tmp-{me.host}-{me.namespace}-{pid}" for pid in (ended.pid, os.getppid()))
    assert Process(me.host, me.namespace, ended.pid).is_gone()
    for folder in (killed, live):
        folder.mkdir()
        (folder / "large").write_text("large")
    doctor.on_this_machine(None, tmp_path)
    assert [*tmp_path.iterdir()] == [live]


def test_a_run_that_cannot_be_measured_costs_one_finding(tmp_path, monkeypatch, in_a_moment):
    def refused(*_):
        raise PermissionError(13, "Permission denied", "run/file")

    monkeypatch.setattr(doctor, "bytes_of", refused)
    monkeypatch.chdir(tmp_path)
    config = load_experiment(write(tmp_path))
    (tmp_path / "run").mkdir()
    last = doctor.on_this_machine(config, tmp_path / "run")[-1]
    assert (last.check, last.state, last.words) == ("room", FAILURE, "Permission denied: 'run/file'")
    assert not [*(tmp_path / "run").iterdir()]


# --- a file system that lacks something -------------------------------------------------------------------------------


def test_without_hard_links_the_doctor_warns(tmp_path, monkeypatch):
    def refused(*places):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    state, words, _ = doctor_files.renames(tmp_path)
    assert state == WARNING and "no hard links (Operation not permitted)" in words


def test_a_file_that_is_written_in_place_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_files, "write_file", lambda path, content: path.write_text(content))
    state, words, _ = doctor_files.renames(tmp_path)
    assert (state, words) == (FAILURE, "a renamed file does not take the place of an older one that is being read")


def test_a_folder_that_stays_in_another_s_place_is_a_failure(tmp_path, monkeypatch):
    def replaced(temporary: Path, folder: Path) -> None:
        shutil.rmtree(temporary) if folder.exists() else temporary.rename(folder)

    monkeypatch.setattr(doctor_files, "replace_folder", replaced)
    state, words, _ = doctor_files.renames(tmp_path)
    assert (state, words) == (FAILURE, "a renamed folder does not take the place of an older one")


def test_a_file_that_two_make_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_files, "write_new", lambda path, content: True)
    assert doctor_files.renames(tmp_path)[:2] == (FAILURE, "a file that is there already is made once more")


def test_a_lock_that_keeps_nobody_out_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir.fcntl, "flock", lambda file, kind: None)
    assert doctor_files.locks(tmp_path)[:2] == (FAILURE, "a lock keeps no other process out")


def test_a_lock_that_outlives_its_holder_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_files, "RELEASED", 0.2)
    monkeypatch.setattr(doctor_files, "is_free", lambda folder: False)
    assert "is still held" in doctor_files.locks(tmp_path)[1]


def test_a_folder_that_cannot_be_locked_is_a_failure_with_the_reason(tmp_path):
    (tmp_path / "stage").write_text("")  # in the folder's place
    state, words, remedy = doctor_files.locks(tmp_path)
    assert state == FAILURE and words.startswith("a stage's folder cannot be locked: ") and "File exists" in words
    assert "-o flock" in remedy


def test_clocks_that_differ_are_told(tmp_path, monkeypatch):
    now = doctor_files.time.time
    monkeypatch.setattr(doctor_files.time, "time", lambda: now() - 100)
    state, words, _ = doctor_files.clock(tmp_path)
    assert state == WARNING and words == "the file system's clock is 100 s ahead of this machine's"


def test_a_slow_disk_is_told_by_what_a_checkpoint_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_files, "TRIED", doctor_files.BLOCK)
    assert doctor_files.rate(tmp_path)[0] == OK
    monkeypatch.setattr(doctor_files, "CHECKPOINT", 1e18)
    state, _, remedy = doctor_files.rate(tmp_path)
    assert state == WARNING and remedy.startswith("A checkpoint of Stable Diffusion 1.5 takes ")


def test_room_is_measured_by_the_plan_less_what_is_written(tmp_path):
    assert doctor_files.room(tmp_path, None)[0] == OK
    assert doctor_files.room(tmp_path, 1.0)[1].endswith("; the experiment takes 0.0 kB by its plan")
    assert doctor_files.room(tmp_path, 1e18)[0] == FAILURE
    experiment = load_experiment(write(tmp_path))
    costs = [Plan(experiment, gpus=1).cost_of(name) for name in experiment.stages]
    kept, saving = sum(cost.disk for cost in costs), max(cost.while_saving for cost in costs)
    (tmp_path / "run" / "stage").mkdir(parents=True)
    (tmp_path / "run" / "stage" / "file").write_bytes(bytes(1000))
    assert saving > 0 and doctor.bytes_of(experiment, tmp_path / "run") == kept - 1000 + saving


def test_a_file_that_goes_while_a_run_is_measured_does_not_count(tmp_path):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "file").write_bytes(bytes(1000))
    (tmp_path / "stage" / "gone").symlink_to("nowhere")  # as one that went after it was listed
    assert doctor.written(tmp_path) == 1000 and doctor.written(tmp_path / "none") == 0


@pytest.mark.parametrize(("inodes", "state"), [(100, FAILURE), (0, OK)])
def test_a_file_system_without_inodes_is_a_failure_unless_it_counts_none(tmp_path, monkeypatch, inodes, state):
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda place: os.statvfs_result((*real[:5], inodes, 0, 0, *real[8:10])))
    told = doctor_files.room(tmp_path, None)
    assert told[0] == state and told[1].startswith("no further file can be made") == (state == FAILURE)


def test_a_disk_too_full_to_be_tried_is_a_failure_and_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_files, "TRIED", doctor_files.BLOCK)
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: real._replace(free=2 * doctor_files.BLOCK - 1))
    state, words, _ = doctor_files.rate(tmp_path)
    assert state == FAILURE and words.startswith("not even ") and not [*tmp_path.iterdir()]


def test_a_folder_that_nobody_may_write_to_is_a_failure(tmp_path, in_a_moment):
    (tmp_path / "file").write_text("")
    last = doctor.on_this_machine(None, tmp_path / "file")[-1]
    assert (last.check, last.state) == ("folder", FAILURE) and "Not a directory" in last.words


# --- a machine that lacks something -----------------------------------------------------------------------------------


def test_packages_out_of_their_range_are_told_with_it(monkeypatch):
    real = doctor_machine.version
    monkeypatch.setattr(doctor_machine, "version", lambda name: "0.1" if name == "diffusers" else real(name))
    state, words, remedy = doctor_machine.packages()
    assert state == WARNING and words.startswith("diffusers 0.1, not ") and "constraints.txt" in remedy

    def gone(name: str) -> str:
        raise doctor_machine.PackageNotFoundError(name)

    monkeypatch.setattr(doctor_machine, "version", lambda name: gone(name) if name == "deepspeed" else real(name))
    assert doctor_machine.packages()[:2] == (FAILURE, "deepspeed is not here")


def test_processes_that_do_not_come_together_are_a_failure_with_the_interfaces(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope")
    state, words, remedy = doctor_machine.gloo()
    assert state == FAILURE and words.endswith("Unable to find address for: nope")
    assert "GLOO_SOCKET_IFNAME: here are lo (127.0.0.1)" in remedy


def test_processes_that_hang_are_given_up(monkeypatch):
    monkeypatch.setattr(doctor_machine, "TOGETHER", 2)
    monkeypatch.setattr(doctor_machine, "ALL_REDUCE", "import time; time.sleep(60)")
    assert doctor_machine.all_reduce("gloo", doctor_machine.here(1)) == "nothing for 2 s"


def test_a_compiler_that_is_missing_or_fails_is_told(tmp_path, monkeypatch):
    assert doctor_machine.compiler()[0] == OK
    (tmp_path / "mine").write_text("#!/bin/sh\necho 'fatal error: omp.h: No such file' >&2\nexit 1\n")
    (tmp_path / "mine").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "mine"))
    state, words, _ = doctor_machine.compiler()
    assert state == WARNING and words.endswith("cannot compile what PyTorch makes: fatal error: omp.h: No such file")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor_machine.compiler()[1].startswith("there is no C++ compiler")


def test_few_open_files_are_told():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    try:
        state, words, remedy = doctor_machine.limits()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert state == WARNING and "512 files open at once" in words and "ulimit -n 1024" in remedy


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm here")
def test_little_shared_memory_is_told(monkeypatch):
    assert "--shm-size" not in "".join(of_shared_memory(monkeypatch, 0))
    state, _, remedy = of_shared_memory(monkeypatch, 1 << 62)
    assert state == WARNING and "docker: --shm-size=8g" in remedy


def of_shared_memory(monkeypatch, wanted: int) -> tuple[str, ...]:
    monkeypatch.setattr(doctor_machine, "SHARED", wanted)
    return doctor_machine.limits()


@pytest.mark.parametrize(
    ("programs", "state", "words"),
    [
        ({}, OK, "not here: `instaflow run` needs none"),
        ({"sbatch": "", "srun": ""}, WARNING, "not here: squeue, scancel, scontrol, sinfo"),
        (
            dict.fromkeys(doctor_machine.SLURM, "echo 'sinfo: fatal: no configuration' >&2; exit 1"),
            WARNING,
            "its controller does not answer: sinfo: fatal: no configuration",
        ),
        (dict.fromkeys(doctor_machine.SLURM, "exit 3"), WARNING, "its controller does not answer: exit code 3"),
        (
            dict.fromkeys(
                doctor_machine.SLURM,
                "[ $1 = --version ] && echo 'slurm 99' || echo 'Welcome\n\ngpu*|2|idle\n\ncpu|1|down'",
            ),
            OK,
            "slurm 99; nodes: 2 idle in gpu, 1 down in cpu",
        ),
    ],
)
def test_slurm_that_is_missing_or_silent_is_told(tmp_path, monkeypatch, programs, state, words):
    for name, does in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor_machine.slurm()[:2] == (state, words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_was_given_and_is_not_seen_is_a_failure(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert doctor_machine.pytorch()[0] == FAILURE


# --- the table --------------------------------------------------------------------------------------------------------


def test_hosts_that_agree_have_one_line_and_others_one_each():
    fine, slow = Finding("disk", OK, "1 GB/s"), Finding("disk", WARNING, "1 MB/s", "Buy one")
    locks = Finding("locks", OK, "hold")
    told = merged({"n1": [locks, fine], "n2": [locks, slow], "n3": [locks, fine]})
    assert lines(told) == [
        "locks  ok       hold",
        "disk   ok       n1: 1 GB/s",
        "disk   warning  n2: 1 MB/s",
        "       Buy one",
        "disk   ok       n3: 1 GB/s",
    ]
    assert lines(merged({"n1": [locks], "n2": []})) == ["locks  ok       n1: hold"]


def test_what_the_system_refuses_is_a_finding():
    def full() -> tuple[str, ...]:
        raise OSError(28, "No space left on device", "here")

    assert found("disk", full) == Finding(
        "disk",
        FAILURE,
        "No space left on device: 'here'",
        "Make room, or write to another place; the same command goes on",
    )


# --- two machines -----------------------------------------------------------------------------------------------------


def test_a_process_that_reaches_no_other_tells_its_own(tmp_path, monkeypatch):
    mine = Finding("disk", OK, "1 GB/s")
    monkeypatch.setattr(doctor, "on_this_machine", lambda experiment, folder: [mine])
    monkeypatch.setattr(meeting, "PATIENCE", timedelta(seconds=1))
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0]}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    findings, code = doctor.run(str(tmp_path))
    assert code == 1 and findings[0] == mine and (findings[1].check, findings[1].state) == ("nodes", FAILURE)
    assert findings[1].words.startswith("Process 0 of 2, on ") and "GLOO_SOCKET_IFNAME" in findings[1].remedy


TWO = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from instaflow import meeting
from instaflow.world import world
from pipelines.doctor import on_all
from pipelines.doctor_table import Finding
meeting.SEEN_WITHIN = 1
mine = [Finding("disk", "ok", f"of {world().rank}")]
print(json.dumps([asdict(one) for one in on_all(mine, Path(sys.argv[1]), world())]))
"""
ALONE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$1" && shift && exec "$@"', "sh"]


@pytest.mark.slow
def test_two_machines_are_told_by_the_first(tmp_path):
    """The second sees another file system in the folder's place, as where none is shared, if it may have one here."""
    alone = [*ALONE, str(tmp_path)]
    sees_the_same = subprocess.run([*alone, "true"], capture_output=True).returncode != 0
    words = [sys.executable, "-c", TWO, str(tmp_path)]
    variables = {
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_ports(1)[0],
    }
    processes = [
        subprocess.Popen(
            words if rank == 0 or sees_the_same else [*alone, *words],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables, "RANK": str(rank), "SLURMD_NODENAME": f"n{rank}"},
        )
        for rank in (0, 1)
    ]
    first, second = (json.loads(process.communicate(timeout=240)[0]) for process in processes)
    assert second == []
    assert [(one["host"], one["words"]) for one in first if one["check"] == "disk"] == [("n0", "of 0"), ("n1", "of 1")]
    told = {one["check"]: one for one in first}
    assert told["nodes: versions"]["words"] == "2 machines with 2 processes run the same"
    assert told["nodes: gloo"]["words"].startswith("all 2 processes: a sum of a million numbers in ")
    assert told["nodes: clocks"]["state"] == "ok"
    if sees_the_same:
        assert (told["nodes: folder"]["state"], told["nodes: locks"]["state"]) == ("ok", "ok")
    else:
        assert told["nodes: folder"]["words"].startswith(f"What 'n0' writes into '{tmp_path}' is not seen by 'n1' at ")
        assert told["nodes: locks"]["words"] == "a lock that 'n0' holds does not keep 'n1' out"
    assert not list(tmp_path.iterdir())
