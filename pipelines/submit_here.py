"""A chain of jobs on this machine, without Slurm: one stage after another, each in processes of its own."""

import shlex
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress

from instaflow.cluster import Cluster
from instaflow.errors import InstaFlowError, Interrupted
from instaflow.interruption import Stop, listening
from instaflow.rundir import StageFolder, read_json
from pipelines.batch_scripts import Job

ONE_NODE = Cluster(nodes=1, array=1, time=None)
"""What jobs here are held to: this machine is one node, which sets no limit and shares no array."""
POLL = 0.2
"""Seconds between two looks at a stage's process."""


def run(jobs: Mapping[str, Job], scripts: Mapping[str, str], again: list[str]) -> None:
    """Run each stage's script after those it builds on. again: the command that goes on, for a hint.

    As on a cluster, a stage that fails ends those that build on it, and no other. Raises Interrupted when told to stop,
    and InstaFlowError once the rest has run if a stage failed.
    """
    failed: list[str] = []
    left_out: list[str] = []
    hint = f"To go on: {shlex.join(again)}"
    with listening() as stop:
        for name, job in jobs.items():
            if broken := [parent for parent in job.after if parent in (*failed, *left_out)]:
                print(f"{name}: left out, for it builds on '{broken[0]}'", flush=True)
                left_out.append(name)
            elif stop():
                raise Interrupted(f"Stopped before stage '{name}' ({stop.signal})", hint)
            elif not succeeds(job.stage, scripts[name], stop):
                if stop() or was_interrupted(job.stage):
                    raise Interrupted(f"Stage '{name}' was told to stop{f' ({stop.signal})' if stop() else ''}", hint)
                print(f"{name}: failed", flush=True)
                failed.append(name)
    if failed:
        told = f"{' and '.join(map(repr, failed))} failed; why stands above"
        if left_out:
            told += f". Left out, for {'it builds' if len(left_out) == 1 else 'they build'} on it: "
            told += ", ".join(left_out)
        raise InstaFlowError(told, f"Mend it, and go on: {shlex.join(again)}")


def succeeds(stage: StageFolder, script: str, stop: Stop) -> bool:
    """Run a stage's script to its end; False if the stage is not done then.

    Ctrl-C reaches its processes as it does this one; any other signal is handed on.
    """
    handed_on = False
    with subprocess.Popen(["bash", "-c", script], stdin=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(POLL)
            if stop() and stop.signal != "SIGINT" and not handed_on:
                process.terminate()
                handed_on = True
    return process.returncode == 0 and stage.is_done()


def was_interrupted(stage: StageFolder) -> bool:
    """By its own word: torchrun makes every exit code its own 1."""
    with suppress(OSError, InstaFlowError):
        return bool(read_json(stage.folder / "state.json")["state"] == "interrupted")
    return False
