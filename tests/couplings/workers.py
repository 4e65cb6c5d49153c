"""Workers of a couple stage as processes of their own: they lease shards, make them, and can be killed."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

from instaflow.couplings import leases
from instaflow.couplings.leases import Leases
from instaflow.couplings.manifest import Manifest, write_manifest
from instaflow.couplings.prompts import save_prompts
from instaflow.couplings.shards import read_shard, read_sidecar
from tests.couplings.made import PROMPTS, at_once, make_shard, sample

TOUCHES = {"open", "write", "flush", "fsync", "close", "link", "replace", "unlink", "mkdir", "rmdir"}

fork = multiprocessing.get_context("fork")


def open_stage(folder: Path, manifest: Manifest) -> Path:
    """A couple stage without shards."""
    folder.mkdir(parents=True)
    write_manifest(folder, manifest)
    save_prompts(folder, PROMPTS)
    return folder


def work(folder: Path, manifest: Manifest, index: int = 0, count: int = 1) -> list[int]:
    """Make what is left, as `instaflow couple` does; returns the shards that this worker made."""
    leases.POLL = 0.01
    mine = [shard for shard in range(manifest.plan.num_shards) if shard % count == index]
    made = []
    with Leases(folder) as held:
        for shard, _lost in held.turns(mine, lambda: False):
            make_shard(folder, shard, manifest, PROMPTS, at_once(sample))
            held.give_back(shard)
            made.append(shard)
    return made


def work_until(call: int, folder: Path, manifest: Manifest) -> None:
    """Work, and die by SIGKILL just before the `call`-th of this thread's calls that touch the disk."""
    left = call

    def count(frame: object, event: str, function: object) -> None:
        nonlocal left
        if event == "c_call" and getattr(function, "__name__", "") in TOUCHES:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    work(folder, manifest)
    sys.setprofile(None)


def start(target, *arguments) -> multiprocessing.Process:
    process = fork.Process(target=target, args=arguments)
    process.start()
    return process


def records(folder: Path, manifest: Manifest) -> list[tuple[int, str, bytes, bytes]]:
    """Every record of a stage by index: prompt, noise, latent."""
    found = []
    for shard in range(manifest.plan.num_shards):
        held = read_shard(folder, read_sidecar(folder, shard, manifest.plan))
        for row, index in enumerate(held.indices):
            found.append((index, held.prompts[row], held.noise[row].tobytes(), held.latent[row].tobytes()))
    return found
