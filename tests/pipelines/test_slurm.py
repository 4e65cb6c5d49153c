"""Experiments as chains of jobs, on a real Slurm of two nodes."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from instaflow.couplings.verify import verify
from instaflow.rundir import read_stats
from tests.pipelines.runs import command, environment
from tests.slurm import Slurm, missing, started, wait_until

pytestmark = pytest.mark.slow
TEXT = """
run: unused
cluster:
  gpus: 0
  time: 0:10:00
  environment: {MASTER_ADDR: 127.0.0.1}  # the nodes' names are no hosts' here
  stages:
    couple: {cpus: 2, array: 2}
    2rf: {nodes: 2}
stages:
  teacher:
    {kind: teacher, data: digits, guidance_scale: 2, autoencoder_phases: [PHASE], phases: [PHASE]}
  pairs:
    {kind: couple, model: teacher, prompts: [a seven, an odd digit], count: 44, records_per_shard: 8, batch_size: 4,
     num_steps: 2, guidance_scale: 2}
  2rf: {kind: reflow, init: teacher, couplings: pairs, preview: null, phases: [PHASE]}
  report:
    {kind: evaluate, protocol: digits, num_samples: 20, straightness_samples: 4, straightness_steps: 4,
     models: [{model: teacher, num_steps: [2]}, {model: 2rf, num_steps: [1]}],
     reference: {model: teacher, num_steps: 2}}
""".replace("PHASE", "{samples: 32, global_batch_size: 4, learning_rate: 1e-3}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    with started(tmp_path_factory.mktemp("slurm") / "two") as slurm:
        yield slurm


@pytest.fixture
def slurm(cluster):
    """The cluster, which a test leaves without jobs."""
    yield cluster
    cluster.empty()


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("experiment") / "small.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def local(cluster, config, tmp_path_factory) -> Path:
    """The whole experiment by `instaflow run`, on one core as each node has it."""
    run = tmp_path_factory.mktemp("local") / "run"
    core = str(min(os.sched_getaffinity(0)))
    words = ["taskset", "--cpu-list", core, *command("run", config, "--run-dir", run)]
    subprocess.run(words, check=True, capture_output=True, env=environment())
    return run


def begun(local: Path, place: Path, *stages: str) -> Path:
    """A run in which these stages are done; its name is no easy one."""
    run = place / "a 100% run"
    for stage in stages:
        shutil.copytree(local / stage, run / stage)
    return run


def typed(slurm: Slurm, *words: str | Path, expect: int = 0) -> str:
    """Type a command where the cluster's are known; what it prints."""
    done = subprocess.run(command(*words), capture_output=True, text=True, env=environment() | slurm.environment)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def jobs(run: Path) -> dict[str, str]:
    return {name: entry["job"] for name, entry in json.loads((run / "jobs" / "jobs.json").read_text()).items()}


def log(run: Path, name: str) -> str:
    """What all jobs of a stage have printed."""
    return "".join(file.read_text() for file in sorted((run / "jobs").glob(f"{name}-*.log")))


def until(slurm: Slurm, run: Path, ready: Callable[[], bool]) -> None:
    """Wait, for minutes if need be. Fails with the jobs' logs."""
    try:
        wait_until(ready, slurm, 240)
    except AssertionError as error:
        logs = [log(run, name) for name in jobs(run)]
        raise AssertionError("\n".join([typed(slurm, "status", run, expect=75), *logs])) from error


def ended(slurm: Slurm) -> bool:
    return not slurm.type("squeue", "--noheader").strip()


def hashes(run: Path) -> list[str]:
    return [json.loads(file.read_text())["sha256"] for file in sorted((run / "pairs" / "shards").glob("*.json"))]


def samples(run: Path) -> list[int]:
    """How far the training was at each line of its figures."""
    return [line["samples_seen"] for line in read_stats(run / "2rf" / "stats.jsonl")]


def test_a_chain_over_two_nodes_makes_what_one_machine_makes(slurm, config, local, tmp_path):
    run = begun(local, tmp_path, "teacher")
    out = typed(slurm, "submit", config, "--run-dir", run)
    numbers = jobs(run)
    assert "Done before: teacher" in out and numbers["teacher"] is None
    assert f"pairs: job {numbers['pairs']}, an array of 2\n" in out
    assert f"2rf: job {numbers['2rf']}, after {numbers['pairs']}\n" in out
    again = typed(slurm, "submit", config, "--run-dir", run, expect=1)
    assert f"'{run}' was submitted before, and has live jobs: " in again and f"(job {numbers['2rf']}: pending)" in again
    until(slurm, run, lambda: ended(slurm))
    told = typed(slurm, "status", run)
    assert [line.split()[:2] for line in told.splitlines()] == [[name, "done"] for name in numbers]
    assert sorted(re.findall(r"starts on (.*)", log(run, "pairs"))) == ["node1", "node2"]
    assert re.findall(r"starts on (.*)", log(run, "2rf")) == ["node[1-2]"]
    assert len(hashes(run)) == 6 and hashes(run) == hashes(local)
    here, there = (read_stats(place / "2rf" / "stats.jsonl") for place in (local, run))
    assert [line["loss"] for line in there] == pytest.approx([line["loss"] for line in here], rel=1e-5)
    assert (run / "report" / "report.html").exists()


def test_the_doctor_looks_at_both_nodes(slurm, tmp_path):
    words = ["srun", "--nodes=2", "--ntasks-per-node=1", *command("doctor", tmp_path)]
    variables = environment() | slurm.environment | {"MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(words, capture_output=True, text=True, env=variables, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"^(\S.*?)  +(\w+) +(.*)$", done.stdout, re.MULTILINE)
    assert [words.partition(":")[0] for check, _, words in told if check == "disk"] == ["node1", "node2"]
    (nodes,) = (words for check, _, words in told if check == "Slurm")
    assert re.fullmatch(r"slurm.* [\d.]+; nodes: 2 \w+ in both", nodes)  # once: the first one speaks for both
    together = [(check, state) for check, state, _ in told if check.startswith("nodes: ")]
    assert together == [(f"nodes: {name}", "ok") for name in ("versions", "clocks", "folder", "locks", "gloo")]


def test_what_slurm_refuses_leaves_nothing_submitted(slurm, config, tmp_path):
    run = tmp_path / "run"
    refused = typed(slurm, "submit", config, "--run-dir", run, "--set", "cluster.stages.2rf.partition=none", expect=1)
    assert "Error: Stage '2rf' was not submitted: sbatch failed: " in refused and "Hint: No stage is: " in refused
    until(slurm, run, lambda: ended(slurm))
    assert not (run / "jobs" / "jobs.json").exists()


def test_a_training_that_is_preempted_or_at_its_limit_goes_on(slurm, config, local, tmp_path):
    run = begun(local, tmp_path, "teacher", "pairs")
    changes = ["stages.2rf.phases.0.samples=40000", "cluster.stages.2rf.notice=20"]
    typed(slurm, "submit", config, "--run-dir", run, *(word for change in changes for word in ("--set", change)))
    job = jobs(run)["2rf"]
    until(slurm, run, lambda: len(samples(run)) > 1)
    told = typed(slurm, "status", run, expect=75)
    assert re.search(r"2rf      running      [\d,]+ of 40,000 samples, [\d,.]+/s, .* left; job", told)
    slurm.type("scontrol", "requeue", job)
    until(slurm, run, lambda: slurm.job(job)["JobState"] == "PENDING")
    preempted = samples(run)[-1]
    assert "2rf      interrupted" in typed(slurm, "status", run, expect=75)
    assert "stopped at" in log(run, "2rf") and "(SIGTERM)" in log(run, "2rf")
    until(slurm, run, lambda: samples(run)[-1] > preempted)  # in its second turn
    _, minutes, seconds = map(int, slurm.job(job)["RunTime"].split(":"))
    slurm.type("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + (2 if seconds > 30 else 1)}")
    end = f"Job {job} ends with exit code 75"
    until(slurm, run, lambda: end in log(run, "2rf").partition("(SIGUSR1)")[2])
    until(slurm, run, lambda: slurm.job(job)["JobState"] == "PENDING")
    slurm.type("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    stopped = samples(run)[-1]
    until(slurm, run, lambda: samples(run)[-1] > stopped)  # in its third
    slurm.type("scancel", job)
    until(slurm, run, lambda: ended(slurm))  # with what waited for it
    assert log(run, "2rf").count("starts on node[1-2]") == 3
    assert samples(run) == list(range(samples(run)[0], samples(run)[-1] + 1, samples(run)[0]))  # none lost, none twice
    told = typed(slurm, "status", run, expect=75)
    assert "2rf      interrupted" in told and "report   waiting      for '2rf'" in told


def test_a_stage_that_fails_stops_those_after_it_and_the_status_tells_why(slurm, config, local, tmp_path):
    run = begun(local, tmp_path, "teacher")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a seven\n")
    changes = [f"stages.pairs.prompts={prompts}", f"cluster.stages.couple.lines=[rm -f {prompts}]"]
    words = ["submit", config, "--run-dir", run, *(word for change in changes for word in ("--set", change))]
    typed(slurm, *words)
    until(slurm, run, lambda: ended(slurm))
    told = typed(slurm, "status", run, expect=1).splitlines()
    assert told[1].startswith("pairs    failed")
    assert told[2].strip() == f"The file '{prompts}' does not exist"
    assert told[3].startswith("2rf      waiting      for 'pairs', which failed")
    assert told[4].startswith("report   waiting      for '2rf'")
    assert not (run / "2rf").exists() and not list((run / "jobs").glob("2rf-*.log"))
    prompts.write_text("a seven\n")
    typed(slurm, *words)  # nothing is live any more
    slurm.type("scancel", *filter(None, jobs(run).values()))
    until(slurm, run, lambda: ended(slurm))


def test_a_node_that_goes_down_costs_no_shard_that_was_done(slurm, config, local, tmp_path):
    run = begun(local, tmp_path, "teacher")
    changes = ["stages.pairs.num_steps=100", "stages.pairs.records_per_shard=4"]
    typed(slurm, "submit", config, "--run-dir", run, *(word for change in changes for word in ("--set", change)))
    shards = run / "pairs" / "shards"
    until(slurm, run, lambda: len(list(shards.glob("*.json"))) > 2)
    slurm.lose_node("node2")
    done = {file: file.stat().st_mtime_ns for file in shards.glob("*.json")}
    assert 2 < len(done) < 11
    slurm.type("scancel", jobs(run)["2rf"])  # it wants two nodes
    until(slurm, run, lambda: ended(slurm))
    assert sorted(re.findall(r"starts on (.*)", log(run, "pairs"))) == ["node1", "node1", "node2"]
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert (run / "pairs" / "done.json").exists() and verify(run / "pairs") == []
    slurm.start_node("node2")
    until(slurm, run, lambda: slurm.states() == ["idle", "idle"])
