"""Training that is killed at random moments and goes on: no checkpoint is lost or half-read, and no bit differs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from instaflow.training.checkpoint import complete_checkpoints, load_checkpoint
from tests.training.kill_worker import STEPS, checkpoints_of
from tests.training.made import figures, folder_of


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def same_checkpoint(one, other):
    parts = all(same(getattr(one, part), getattr(other, part)) for part in ("model", "ema", "optimizer"))
    return parts and one.state == other.state


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 24), (2, 5)])
def test_a_run_that_was_killed_again_and_again_equals_one_that_never_was(tmp_path, processes, kills):
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    worker = [sys.executable, "-m", "tests.training.kill_worker", str(tmp_path), str(processes), str(kills)]
    subprocess.run(worker, cwd=root, env=environment, check=True, timeout=600)
    told = json.loads((tmp_path / "kills.json").read_text())

    # The kills came in the middle, some of them while a checkpoint was written or an old one removed.
    assert len(told) == kills
    for kill in told:
        assert -signal.SIGKILL in kill["codes"] and 0 not in kill["codes"] and None not in kill["codes"]
    assert all(kill["after"] < 6 * STEPS[processes] for kill in told)
    assert sum(bool(kill["torn"]) for kill in told) >= kills // 8

    # What was complete before a kill is there after it, and is what the other run had at this point.
    whole, last = checkpoints_of(tmp_path / "whole"), 0
    for number, kill in enumerate(told):
        assert last <= kill["before"] <= kill["after"]
        last = kill["after"]
        if last == 0:
            continue
        saved = load_checkpoint(tmp_path / "after" / str(number))
        assert saved.state["samples_seen"] == last
        assert same_checkpoint(saved, at(whole, last, tmp_path / "at"))
    assert last > 0

    # So is the end.
    run = tmp_path / "killed"
    for name in ("raw", "ema"):
        assert same(load_file(run / f"{name}.safetensors"), load_file(tmp_path / "whole" / f"{name}.safetensors"))
    assert same_checkpoint(load_checkpoint(checkpoints_of(run)), load_checkpoint(whole))
    assert figures(folder_of(run)) == figures(folder_of(tmp_path / "whole"))
    assert not list(checkpoints_of(run).glob(".*")) and len(complete_checkpoints(checkpoints_of(run))) == 2


def at(checkpoints, samples, place):
    """The checkpoint of a run that kept them all."""
    place.mkdir(exist_ok=True)
    (link := place / f"{samples:012d}").symlink_to(checkpoints / f"{samples:012d}")
    saved = load_checkpoint(place)
    link.unlink()
    return saved
