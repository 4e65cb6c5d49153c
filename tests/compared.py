"""Runs of one small experiment that differ in their seed, with reports of made-up figures, made in a moment."""

import json
from pathlib import Path

import numpy as np

from instaflow.evaluation.history import stages_so_far
from instaflow.evaluation.report import Protocol, Report, Row, Stage, report_json
from instaflow.files import write_json
from tests.experiments import folders, mark_done, write


def make_runs(folder: Path, seeds: tuple[int, ...] = (0, 1, 2), *overrides: str) -> list[Path]:
    """Finished runs FOLDER/SEED of tests.experiments' experiment."""
    return [make_run(folder / str(seed), seed, *overrides) for seed in seeds]


def make_run(run: Path, seed: int, *overrides: str) -> Path:
    run.mkdir(parents=True)
    stages = folders(write(run.parent), f"seed={seed}", *overrides, run=run)
    for stage in stages.values():
        mark_done(stage, payload=f"weights of seed {seed}")
    write_json(run / "report" / "report.json", report_json(made_report(seed, stages_so_far(stages["report"]))))
    return run


def made_report(seed: int, stages: list[Stage]) -> Report:
    """Three rows: a student near the teacher's one step, and the teacher at 25 steps."""
    rng = np.random.default_rng(seed)
    rows = [
        made_row("teacher", "teacher", 25, 0.300 + rng.normal(scale=0.01)),
        made_row("teacher", "teacher", 1, 2.400 + rng.normal(scale=0.01)),
        made_row("student", "student", 1, 0.320 + rng.normal(scale=0.01)),
    ]
    protocol = Protocol(noise=f"keyed by seed {seed} and 'evaluate'", timing="batches of 100, a core", samples="100")
    hardware = "a core"
    return Report(
        title=str(seed), config="small.yaml", seed=seed, hardware=hardware, protocol=protocol, rows=rows, stages=stages
    )


def made_row(model: str, kind: str, num_steps: int, distance: float) -> Row:
    return Row(
        model=model,
        kind=kind,
        num_steps=num_steps,
        guidance_scale=1.0,
        weights="ema",
        num_samples=100,
        frechet_distance_real=distance,
        frechet_distance_teacher=None if num_steps > 1 else distance / 10,
        prompt_accuracy=1 - distance / 100,
        seconds_per_image=0.001 * num_steps,
    )


def change_report(run: Path, **changes: object) -> None:
    """Put other values into a run's report.json."""
    file = run / "report" / "report.json"
    write_json(file, {**json.loads(file.read_text()), **changes})
