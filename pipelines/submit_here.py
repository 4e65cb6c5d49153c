"""A chain of jobs on this machine, without Slurm: one stage after another, each in processes of its own."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from instaflow.cluster import Cluster
from instaflow.errors import InstaFlowError, Interrupted
from instaflow.files import write_file
from instaflow.interruption import Stop, listening
from instaflow.jobs import ENDS, STARTS
from instaflow.meeting import host
from instaflow.rundir import StageFolder, read_json
from pipelines.batch_scripts import Job

ONE_NODE = Cluster(nodes=1, array=1, time=None)
"""What jobs here are held to: this machine is one node, which sets no limit and shares no array."""
POLL = 0.2
"""Seconds between two looks at a stage's process."""


def run(jobs: Mapping[str, Job], scripts: Mapping[str, str], folder: Path, again: list[str]) -> None:
    """Run each stage's script after those it builds on. folder: RUN/jobs. again: the command that goes on, for a hint.

    As on a cluster, a stage that fails ends those that build on it, and no other. Raises Interrupted when told to stop,
    and InstaFlowError once the rest has run if a stage failed.
    """
    failed: list[str] = []
    left_out: list[str] = []
    hint = f"To go on: {shlex.join(again)}"
    with listening(signal.SIGHUP) as stop:
        for name, job in jobs.items():
            if broken := [parent for parent in job.after if parent in (*failed, *left_out)]:
                print(f"{name}: left out, for it builds on '{broken[0]}'", flush=True)
                left_out.append(name)
                continue
            if stop():
                raise Interrupted(f"Stopped before stage '{name}' ({stop.signal})", hint)
            code = exit_code(job.stage, scripts[name], folder, stop)
            if code == Interrupted.exit_code:
                raise Interrupted(f"Stage '{name}' was told to stop{f' ({stop.signal})' if stop() else ''}", hint)
            if code:
                print(f"{name}: failed", flush=True)
                failed.append(name)
    if failed:
        told = f"{' and '.join(map(repr, failed))} failed; why stands above"
        if left_out:
            told += f". Left out, for {'it builds' if len(left_out) == 1 else 'they build'} on it: "
            told += ", ".join(left_out)
        raise InstaFlowError(told, f"Mend it, and go on: {shlex.join(again)}")


def exit_code(stage: StageFolder, script: str, folder: Path, stop: Stop) -> int:
    """Run a stage's script to its end: 0 if the stage is done then, 75 if it was told to stop, else 1.

    Its processes are a group of their own, which hears of the first signal as SIGTERM, and of Ctrl-C's second by
    SIGKILL. A log of its begin and its end has `instaflow status` tell how it stands, as of a job of Slurm's.
    """
    before = state_of(stage)
    told = False
    with subprocess.Popen(["bash", "-c", script], stdin=subprocess.DEVNULL, start_new_session=True) as process:
        log, begin = folder / f"{stage.name}-{process.pid}.log", STARTS.format(process.pid, host())
        write_file(log, f"{begin}\n")
        try:
            while process.poll() is None:
                time.sleep(POLL)
                if stop() and not told:
                    os.killpg(process.pid, signal.SIGTERM)
                    told = True
        except BaseException:  # above all Ctrl-C's second
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    code, after = process.returncode, state_of(stage)
    its_word = {} if after == before else after  # not that of an earlier try
    if not code and stage.is_done():
        pass
    elif stop() or code == Interrupted.exit_code or its_word.get("state") == "interrupted":  # torchrun ends with 1
        code = Interrupted.exit_code
    else:
        said = (
            its_word.get("reason")
            or f"its commands ended with exit code {code}, and the stage is not done; the terminal has why"
        )
        code = 1
    error = f"Error: {said}\n" if code == 1 else ""
    write_file(log, f"{begin}\n{error}{ENDS.format(process.pid, code)}\n")
    return code


def state_of(stage: StageFolder) -> dict[str, str]:
    """What a stage says of itself, with the time at which it did; nothing where it has not begun."""
    file = stage.folder / "state.json"
    with suppress(OSError, InstaFlowError):
        return {**read_json(file), "at": str(file.stat().st_mtime_ns)}
    return {}
