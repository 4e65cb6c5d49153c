"""A couple stage shared by several commands: fixed shares, leases alone, one that is killed."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from instaflow.config import load_experiment
from instaflow.errors import InstaFlowError
from instaflow.files import write_file
from instaflow.interruption import Stop
from instaflow.rundir import locked
from instaflow.world import ALONE, Worker
from pipelines.couple import repair
from pipelines.experiment import run_one
from tests.models.made import write_model
from tests.pipelines.runs import command, environment, instaflow

TEXT = """
run: unused
stages:
  pairs:
    {kind: couple, model: MODEL, prompts: [a seven, an odd digit], count: 44, records_per_shard: 8, batch_size: 4,
     num_steps: 2, guidance_scale: 2}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("experiment")
    path = folder / "pairs.yaml"
    path.write_text(TEXT.replace("MODEL", str(write_model(folder / "teacher"))))
    return str(path)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> dict[str, bytes]:
    """The shards as one command makes them."""
    run = tmp_path_factory.mktemp("alone")
    couple(config, run)
    return shards(run)


def couple(config: str, run: Path, worker: Worker = ALONE) -> None:
    run_one(load_experiment(config, (), str(run)), "pairs", Stop(), worker)


def shards(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "pairs" / "shards").iterdir()}


@pytest.mark.parametrize("count", [2, 3])
def test_workers_with_fixed_shares_make_what_one_makes(config, alone, tmp_path, capsys, count):
    for index in range(count):
        assert not (tmp_path / "pairs" / "done.json").exists()
        couple(config, tmp_path, Worker(index, count))
        made = {int(name[:5]) for name in shards(tmp_path)}
        assert made == {shard for shard in range(6) if shard % count <= index}
        assert ("other workers are not done yet" in capsys.readouterr().out) == (index < count - 1)
    assert shards(tmp_path) == alone
    assert (tmp_path / "pairs" / "done.json").exists() and not (tmp_path / "pairs" / "leases").exists()


def test_a_worker_with_other_settings_is_refused(config, tmp_path):
    couple(config, tmp_path, Worker(0, 2))
    other = load_experiment(config, ("seed=1",), str(tmp_path))
    with pytest.raises(InstaFlowError, match="'seed' was 0, is now 1"):
        run_one(other, "pairs", Stop(), Worker(1, 2))


def test_who_comes_second_does_not_mark_it_done_again(config, tmp_path, monkeypatch, capsys):
    from pipelines import couple as module

    found = module.shards_fingerprint

    def another_was_first(folder, manifest):
        write_file(folder / "done.json", json.dumps({"fingerprint": "theirs", "seconds": 1.0}))
        return found(folder, manifest)

    monkeypatch.setattr(module, "shards_fingerprint", another_was_first)
    couple(config, tmp_path)
    assert json.loads((tmp_path / "pairs" / "done.json").read_text())["fingerprint"] == "theirs"
    assert "another worker was the first" in capsys.readouterr().out


def test_repair_waits_for_no_worker_but_refuses_to_mix_with_one(config, alone, tmp_path):
    couple(config, tmp_path)
    tar = tmp_path / "pairs" / "shards" / "00003.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with locked(tmp_path / "pairs", shared=True), pytest.raises(InstaFlowError, match="is being worked on"):
        repair(tmp_path / "pairs")
    assert repair(tmp_path / "pairs") == [3]
    assert shards(tmp_path) == alone
    assert not (tmp_path / "pairs" / "leases").exists()


def test_commands_that_share_a_stage_outlive_one_that_is_killed(config, alone, tmp_path):
    arguments = ("couple", config, "--run-dir", tmp_path)
    first = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.DEVNULL)
    while not list((tmp_path / "pairs").glob("leases/*.json")) and first.poll() is None:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)  # it holds a lease, and lives
    second = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.PIPE, text=True)
    while len(list((tmp_path / "pairs").glob("shards/*.json"))) < 5 and second.poll() is None:
        time.sleep(0.05)
    assert second.poll() is None  # it waits for the last shard
    first.kill()
    first.wait()
    out, _ = second.communicate(timeout=300)
    assert second.returncode == 0 and "pairs: done in" in out
    assert shards(tmp_path) == alone
    assert "done before" in instaflow(*arguments).stdout
