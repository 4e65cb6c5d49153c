"""Real runs of the digits experiment by the real command, whole or with its counts cut to a tenth; what they made."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from instaflow.config import load_experiment
from instaflow.files import sha256_of
from tests.pipelines.started import Started
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "digits.yaml"
TRAINED = ("teacher", "2rf", "student", "direct")


def cut_to_a_tenth() -> list[str]:
    """`--set` options that cut every count of the experiment to a tenth; couple stages keep eight shards."""
    options = []
    for name, stage in load_experiment(str(CONFIG)).stages.items():
        settings = stage.model_dump()
        for key in ("phases", "autoencoder_phases", "text_phases", "perceptual_phases"):
            for index, phase in enumerate(settings.get(key) or []):
                for count in ("samples", "warmup_samples"):
                    options += ["--set", f"stages.{name}.{key}.{index}.{count}={phase[count] // 10}"]
        for key in ("count", "records_per_shard", "num_samples", "straightness_samples", "straightness_steps"):
            if key in settings:
                options += ["--set", f"stages.{name}.{key}={settings[key] // 10}"]
        if settings.get("preview"):
            options += ["--set", f"stages.{name}.preview.every={settings['preview']['every'] // 10}"]
        if settings["kind"] == "evaluate":  # its gaps and diversity are those of all prompts, whatever is counted
            options += ["--set", f"stages.{name}.perceptual=null"]
        if settings["kind"] == "couple":
            options += ["--set", f"stages.{name}.batch_size={settings['records_per_shard'] // 20}"]
    return options


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def instaflow(*arguments: str | Path, expect: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; fail with its output unless it exits as expected."""
    done = start(*arguments, cwd=cwd).ended()
    assert done.returncode == expect, (
        f"exit {done.returncode}, not {expect}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done


def start(*arguments: str | Path, cwd: Path | None = None) -> Started:
    """Start a command."""
    return Started("cli", *map(str, arguments), cwd=cwd or Path.cwd(), environment=environment())


def stop_when(
    ready: Callable[[], bool], number: signal.Signals, *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """Start a command, send it a signal once `ready()`, and wait for its end."""
    process = start(*arguments)
    deadline = time.monotonic() + 300
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    stopped_in_time = process.poll() is None
    process.send_signal(number)
    done = process.ended(timeout=120)
    assert stopped_in_time, (
        f"the command ended before it could be stopped:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    )
    return done


def together(processes: int, *arguments: str | Path, module: str = "cli") -> subprocess.CompletedProcess[str]:
    """Run a command in several processes, as torchrun does, and give what the first of them said.

    Fail with their output unless all of them succeed.
    """
    among = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": free_port()}
    begun = []
    for rank in range(processes):
        named = {name: str(value) for name, value in {**among, "RANK": rank, "LOCAL_RANK": rank}.items()}
        where = environment() | named | {"MASTER_ADDR": "127.0.0.1"}
        begun.append(Started(module, *map(str, arguments), cwd=Path.cwd(), environment=where))
    ended = [one.ended(timeout=600) for one in begun]
    for done in ended:
        assert not done.returncode, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return ended[0]


def copy_parents(run: Path, to: Path, *stages: str) -> Path:
    """A new run that holds copies of these stages of another."""
    for stage in stages:
        shutil.copytree(run / stage, to / stage)
    return to


def shards(run: Path, stage: str) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in sorted((run / stage / "shards").iterdir())}


def losses(run: Path, stage: str) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (run / stage / "stats.jsonl").read_text().splitlines()]
    return [(line["job"], line["samples_seen"], line["loss"]) for line in lines if "loss" in line]
