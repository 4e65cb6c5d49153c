"""One stage trained by itself, with the couplings and first checks of a run that is done; what it leaves."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from instaflow.config import load_experiment
from pipelines.experiment import run_one
from tests.training.made import TIMINGS, StopAt


def train(config: str, stage: str, run: Path, done: Path, *changes: str, stop_at: int | None = None) -> StopAt:
    """Run `stage` in the folder `run`, until it is told to stop; `changes` are of its settings."""
    prepare(run, stage, done)
    stop = StopAt(stop_at)
    run_one(load_experiment(config, [f"stages.{stage}.{change}" for change in changes], str(run)), stage, stop)
    return stop


def prepare(run: Path, stage: str, done: Path) -> None:
    """Make the folder `run`, if that was not done, with what `train` takes from a run that is done."""
    (run / stage).mkdir(parents=True, exist_ok=True)
    if not (run / "pairs").exists():
        (run / "pairs").symlink_to(done / "pairs")
        shutil.copy(done / stage / "start_checks.json", run / stage)


def weights(run: Path, stage: str, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / stage / name / "unet" / "diffusion_pytorch_model.safetensors")


def lines(run: Path, stage: str) -> list[dict]:
    """Its figures over time, but for those that tell the time."""
    found = [json.loads(line) for line in (run / stage / "stats.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in found]
