"""Trains in processes of its own and kills them at random moments, each time to go on from what the disk holds.

A fork of this process, which has everything loaded and computes nothing itself, costs a fraction of a start.
"""

import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

import deepspeed  # noqa: F401
import torch._dynamo  # noqa: F401  the optimizer's first line would load it, for seconds
from safetensors.torch import save_file

from instaflow.files import write_json
from instaflow.sections import Phase
from instaflow.training.checkpoint import complete_checkpoints
from instaflow.training.loop import train
from instaflow.world import leave, world
from tests.ports import free_port
from tests.training.made import Fit, StopAt, folder_of, job_of

STEPS = {1: 200, 2: 50}
"""How many steps a run of so many processes has, half of them in each phase."""

fork = multiprocessing.get_context("fork")


def checkpoints_of(run: Path) -> Path:
    return run / "2rf" / "checkpoints" / "fit"


def newest(run: Path) -> int:
    """The samples seen at the newest checkpoint."""
    return max((int(path.name) for path in complete_checkpoints(checkpoints_of(run))), default=0)


def train_as(rank: int, size: int, port: int, run: Path, keep: int) -> None:
    """One of `size` processes; a checkpoint is saved after every step."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    stage = 0 if size == 1 else 1  # whose weights are gathered to be saved
    phases = [
        Phase(samples=4 * STEPS[size] // 2, global_batch_size=4, learning_rate=1e-2, warmup_samples=8),
        Phase(samples=8 * STEPS[size] // 2, global_batch_size=8, learning_rate=4e-3, schedule="cosine"),
    ]
    job = job_of(Fit(), phases=phases, checkpoint_every=4, keep_checkpoints=keep, zero_stage=stage)
    trained = train(job, folder_of(run), StopAt())
    if world().leads:
        save_file(trained.raw, run / "raw.safetensors")
        save_file(trained.ema, run / "ema.safetensors")
    leave()


def start(size: int, run: Path, keep: int = 2) -> list[multiprocessing.Process]:
    port = free_port()
    processes = [fork.Process(target=train_as, args=(rank, size, port, run, keep)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def end(processes: list[multiprocessing.Process]) -> list[int | None]:
    """Their exit codes, None if one hangs: whoever lost another process gives up by itself."""
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def kill(run: Path, size: int, moments: random.Random) -> dict:
    """Start, kill one process at a random moment, and tell how things were before and after."""
    processes = start(size, run)
    victim = moments.choice(processes)
    goal = newest(run) + 4 * moments.randint(1, STEPS[size] // 25)
    early = size == 1 and moments.random() < 0.2  # one of several would be waited for: to end it is the launcher's part
    deadline = time.monotonic() + (moments.uniform(0, 0.5) if early else 120)
    while newest(run) < goal and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.03))
    before = newest(run)
    victim.kill()
    codes = end(processes)
    torn = [path.name for path in checkpoints_of(run).glob(".*")]
    return {"before": before, "after": newest(run), "torn": torn, "codes": codes}


def main(folder: Path, size: int, kills: int) -> None:
    assert set(end(start(size, folder / "whole", keep=10**6))) == {0}
    run, moments = folder / "killed", random.Random(size)
    run.mkdir()
    told = []
    for number in range(kills):
        told.append(kill(run, size, moments))
        if checkpoints_of(run).exists():
            shutil.copytree(checkpoints_of(run), folder / "after" / f"{number}")
    assert set(end(start(size, run))) == {0}
    write_json(folder / "kills.json", told)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
