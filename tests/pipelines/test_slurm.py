"""The digits experiment, its counts cut to a tenth, as a chain of jobs on a real Slurm of two nodes."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instaflow.couplings.verify import verify
from instaflow.evaluation.saved import read_report
from instaflow.rundir import read_stats
from tests.pipelines.runs import CONFIG, command, copy_parents, cut_to_a_tenth, environment, losses, shards
from tests.slurm import Slurm, missing, started, wait_until

pytestmark = pytest.mark.slow
TENTH = cut_to_a_tenth()
SOON = 0.02  # seconds between two looks at what does not last
PROFILE = """
gpus: 0
time: 0:20:00
environment: {MASTER_ADDR: 127.0.0.1}  # the nodes' names are no hosts' here
stages:
  couple: {cpus: 2, array: 2}  # of a node's three: one job on each
  direct: {nodes: 2, notice: 600}
"""


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
def words(tmp_path_factory) -> list[str | Path]:
    """What submits the experiment, less the run's folder."""
    profile = tmp_path_factory.mktemp("profile") / "two.yaml"
    profile.write_text(PROFILE)
    return ["submit", CONFIG, "--profile", profile, *TENTH]


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


def until(slurm: Slurm, run: Path, ready: Callable[[], bool], pause: float = 0.3) -> None:
    """Wait as long as a busy machine may take. Fails with the jobs' logs."""
    try:
        wait_until(ready, slurm, 1800, pause)
    except AssertionError as error:
        logs = [file.read_text()[-3000:] for file in sorted((run / "jobs").glob("*.log"))]
        raise AssertionError("\n".join([slurm.type("squeue"), *logs])) from error


def queued(slurm: Slurm) -> list[str]:
    """The numbers of all jobs that wait or run."""
    return slurm.type("squeue", "--noheader", "--format=%F").split()


def figures(run: Path, stage: str) -> list[dict[str, Any]]:
    """The lines of a training, one for each step, with the time of it."""
    return [line for line in read_stats(run / stage / "stats.jsonl") if "loss" in line]


def made(run: Path) -> dict[str, int]:
    """The shards that are done, with the time of each."""
    return {file.name: file.stat().st_mtime_ns for file in (run / "pairs" / "shards").glob("*.json")}


@dataclass(frozen=True)
class Story:
    """What was seen of the run that met with all that happens on a cluster."""

    run: Path
    first: dict[str, str]
    """The jobs of its first submission."""
    by_hand: str
    """The job of a script that was submitted by hand besides."""
    kept: dict[str, int]
    """The shards that were done when a node was lost."""
    preempted: list[list[dict[str, Any]]]
    """The figures of `direct` at the end of its first turn, and of its second."""
    told: dict[str, str]
    """What a command printed at some moments."""


@pytest.fixture(scope="module")
def story(cluster, words, tmp_path_factory) -> Story:
    run = tmp_path_factory.mktemp("submitted") / "a 100% run"  # no easy name
    words = [*words, "--run-dir", run]
    told = {"submitted": typed(cluster, *words)}
    first = jobs(run)

    # in the middle of an array a node goes down, and until it comes back there is one
    until(cluster, run, lambda: len(made(run)) > 2, SOON)
    cluster.lose_node("node2")
    kept = made(run)

    # a job is cancelled; `direct` waits for its two nodes
    until(cluster, run, lambda: len(figures(run, "2rf")) > 1, SOON)
    cluster.type("scancel", first["2rf"])
    until(cluster, run, lambda: queued(cluster) == [first["direct"]])
    told["cancelled"] = typed(cluster, "status", run, expect=75)
    by_hand = cluster.type("sbatch", "--parsable", "--hold", str(run / "jobs" / "2rf.sh")).strip()
    told["refused"] = typed(cluster, *words, expect=1)
    cluster.type("scancel", by_hand)
    cluster.start_node("node2")

    # a training on both nodes is preempted, goes on, comes near its time limit, and goes on
    job = first["direct"]
    until(cluster, run, lambda: len(figures(run, "direct")) > 1, SOON)
    cluster.type("scontrol", "requeue", job)
    until(cluster, run, lambda: cluster.job(job)["JobState"] == "PENDING")
    preempted = [figures(run, "direct")]
    told["preempted"] = typed(cluster, "status", run, expect=75)
    until(cluster, run, lambda: len(figures(run, "direct")) > len(preempted[0]), SOON)
    cluster.freeze(job)  # else it were done before the controller, twice a minute, looks at the limits
    told["running"] = typed(cluster, "status", run, expect=75)
    cluster.type("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    end = f"Job {job} ends with exit code 75"
    until(cluster, run, lambda: end in log(run, "direct").partition("(SIGUSR1)")[2])
    until(cluster, run, lambda: cluster.job(job)["JobState"] == "PENDING")
    preempted.append(figures(run, "direct"))
    cluster.type("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    until(cluster, run, lambda: not queued(cluster))

    # what was cancelled goes on
    told["submitted again"] = typed(cluster, *words)
    until(cluster, run, lambda: not queued(cluster))
    told["done"] = typed(cluster, "status", run)
    return Story(run, first, by_hand, kept, preempted, told)


@pytest.fixture(scope="module")
def local(story, request, tmp_path_factory) -> Path:
    """The whole experiment by `instaflow run`, on one core as each node has it."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        return request.getfixturevalue("small_run")
    run = copy_parents(story.run, tmp_path_factory.mktemp("local") / "run", "teacher")
    words = ["taskset", "--cpu-list", str(cores[0]), *command("run", CONFIG, "--run-dir", run, *TENTH)]
    subprocess.run(words, check=True, capture_output=True, env=environment())
    return run


def test_the_chain_makes_what_one_machine_makes(story, local):
    """Whatever came between: to the bit, and up to rounding where two processes trained together."""
    for stage in ("pairs", "pairs2"):
        assert len(shards(local, stage)) == 16 and shards(story.run, stage) == shards(local, stage)
    for stage in ("teacher", "2rf", "student"):
        assert losses(story.run, stage) == losses(local, stage)
    together, alone = losses(story.run, "direct"), losses(local, "direct")
    assert [line[:2] for line in together] == [line[:2] for line in alone]
    np.testing.assert_allclose([loss for *_, loss in together], [loss for *_, loss in alone], rtol=1e-4)
    here, there = (read_report(run / "report" / "report.json").rows for run in (local, story.run))
    assert [row.label for row in there] == [row.label for row in here]
    for one, other in zip(here, there, strict=True):
        if one.model != "direct":
            assert other.frechet_distance_real == one.frechet_distance_real


def test_each_stage_is_a_job_after_those_that_it_builds_on(story):
    said, first = story.told["submitted"], story.first
    assert said.startswith(f"teacher: job {first['teacher']}\n")
    assert f"pairs: job {first['pairs']}, an array of 2, after {first['teacher']}\n" in said
    assert f"2rf: job {first['2rf']}, after {first['teacher']} and {first['pairs']}\n" in said
    assert [line.split()[:2] for line in story.told["done"].splitlines()] == [[name, "done"] for name in first]
    assert sorted(re.findall(r"starts on (.*)", log(story.run, "pairs2"))) == ["node1", "node2"]
    assert set(re.findall(r"starts on (.*)", log(story.run, "direct"))) == {"node[1-2]"}


def test_a_node_that_goes_down_costs_no_shard_that_was_done(story):
    assert 2 < len(story.kept) < 8
    assert sorted(re.findall(r"starts on (.*)", log(story.run, "pairs"))) == ["node1", "node1", "node2"]
    assert {name: made(story.run)[name] for name in story.kept} == story.kept
    assert verify(story.run / "pairs") == []


def test_a_job_that_is_cancelled_takes_those_after_it_along_and_its_stage_goes_on_when_submitted_again(story):
    told = dict(line.split(maxsplit=1) for line in story.told["cancelled"].splitlines())
    assert re.fullmatch(rf"cancelled +[\d,]+ of 4,800 samples; job {story.first['2rf']}", told["2rf"])
    assert told["pairs2"] == f"waiting      for '2rf', which was cancelled; job {story.first['pairs2']}"
    assert told["student"].startswith("waiting      for '2rf', which was cancelled; ")
    assert told["direct"] == f"waiting      for its turn; job {story.first['direct']}"
    again = story.told["submitted again"]
    assert again.startswith("Done before: teacher, pairs, direct\n2rf: job ")
    assert not list((story.run / "jobs").glob(f"pairs2-{story.first['pairs2']}_*.log"))
    assert len(list((story.run / "jobs").glob("2rf-*.log"))) == 2
    assert "stopped at" in log(story.run, "2rf")


def test_a_training_on_two_nodes_that_is_preempted_or_at_its_limit_goes_on(story):
    said, lines = log(story.run, "direct"), figures(story.run, "direct")
    assert said.count("starts on node[1-2]") == 3
    assert "(SIGTERM)" in said and "(SIGUSR1)" in said
    first, second = story.preempted
    assert 0 < len(first) < len(second) < len(lines)
    assert first == lines[: len(first)] and second == lines[: len(second)]  # no step was made twice
    assert [line["samples_seen"] for line in lines] == list(range(64, 6081, 64))
    done = f"{first[-1]['samples_seen']:,} of 6,080 samples"
    assert re.search(rf"direct +interrupted +{done}; job", story.told["preempted"])
    assert re.search(r"direct +running +[\d,]+ of 6,080 samples, [\d,.]+/s, .* left; job", story.told["running"])


def test_a_second_submission_is_told_what_is_live(story):
    job = story.first["direct"]
    assert (
        f"has live jobs: 'direct' (job {job}: pending); '2rf' (job {story.by_hand}: pending)" in story.told["refused"]
    )
    assert f"scancel {job} {story.by_hand}\n" in story.told["refused"]


def test_the_doctor_looks_at_both_nodes(slurm, tmp_path):
    words = ["srun", "--nodes=2", "--ntasks-per-node=1", *command("doctor", tmp_path)]
    variables = environment() | slurm.environment | {"MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(words, capture_output=True, text=True, env=variables, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"^(\S.*?)  +(\w+) +(.*)$", done.stdout, re.MULTILINE)
    assert [words.partition(":")[0] for check, _, words in told if check == "disk"] == ["node1", "node2"]
    (nodes,) = (words for check, _, words in told if check == "Slurm")
    assert re.fullmatch(r"slurm.* [\d.]+; nodes: 2 \w+ in both", nodes)  # once: the first one speaks for both
    together = [(check, state) for check, state, _ in told if check.startswith("nodes: ")]
    assert together == [(f"nodes: {name}", "ok") for name in ("versions", "clocks", "folder", "locks", "gloo")]


def test_what_slurm_refuses_leaves_nothing_submitted(slurm, words, tmp_path):
    run = tmp_path / "run"
    for change, hint in (
        ("partition: none", "profile asks for\n"),
        ("gpus: 1", "; no node has its 1 GPU, and `gpus: 0` "),
    ):
        change = f"cluster.stages={{2rf: {{{change}}}}}"
        refused = typed(slurm, *words, "--run-dir", run, "--set", change, expect=1)
        assert "Error: Stage '2rf' was not submitted: sbatch failed: " in refused
        assert "Hint: No stage is: " in refused and hint in refused
        until(slurm, run, lambda: not queued(slurm))
        assert not (run / "jobs" / "jobs.json").exists()


def test_a_stage_that_fails_stops_those_after_it_and_the_status_tells_why(slurm, words, story, tmp_path):
    run = copy_parents(story.run, tmp_path / "run", "teacher")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a seven\n")
    changes = [f"stages.pairs.prompts={prompts}", f"cluster.stages={{couple: {{lines: [rm -f {prompts}]}}}}"]
    typed(slurm, *words, "--run-dir", run, *(word for change in changes for word in ("--set", change)))
    until(slurm, run, lambda: not queued(slurm))
    told = typed(slurm, "status", run, expect=1).splitlines()
    assert told[1].startswith("pairs    failed")
    assert told[2].strip() == f"The file '{prompts}' does not exist"
    assert told[3].strip().startswith("Hint: ")
    assert told[4].startswith("2rf      waiting      for 'pairs', which failed")
    assert told[5].startswith("pairs2   waiting      for '2rf'")
    assert not (run / "2rf").exists() and not list((run / "jobs").glob("2rf-*.log"))
