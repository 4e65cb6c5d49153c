"""The digits experiment as its user runs it: figures, files, and stock diffusers."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instaflow.couplings.noise import coupled_noise
from instaflow.digits.protocol import DigitsProtocol, features
from instaflow.evaluation.frechet import Gaussian, frechet_distance
from instaflow.models.loading import load_model
from tests.pipelines.runs import instaflow

pytestmark = pytest.mark.slow

KEYS = {
    "model",
    "num_steps",
    "guidance_scale",
    "weights",
    "num_samples",
    "frechet_distance_real",
    "frechet_distance_teacher",
    "prompt_accuracy",
    "straightness",
    "seconds_per_image",
}


@pytest.fixture(scope="module")
def report(whole_run: Path) -> dict[str, Any]:
    return json.loads((whole_run / "report" / "report.json").read_text())


@pytest.fixture(scope="module")
def rows(report: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """By model and number of steps; the moving average's, but for "student (raw)"."""
    names = {"ema": "", "raw": " (raw)"}
    return {(row["model"] + names[row["weights"]], row["num_steps"]): row for row in report["rows"]}


def test_one_step_of_the_student_is_nearly_as_good_as_the_teacher(rows: dict) -> None:
    student, teacher = rows["student", 1], rows["teacher", 25]
    assert student["prompt_accuracy"] >= 0.97
    assert student["frechet_distance_real"] <= 1.6 * teacher["frechet_distance_real"]
    assert rows["teacher", 1]["frechet_distance_real"] > 4 * student["frechet_distance_real"]
    assert student["frechet_distance_teacher"] < 0.5 * rows["teacher", 2]["frechet_distance_teacher"]


@pytest.mark.parametrize(("folder", "name"), [("model", "student"), ("model-raw", "student (raw)")])
def test_the_reports_figures_are_those_of_noise_that_no_training_stage_saw(
    whole_run: Path, rows: dict, folder: str, name: str
) -> None:
    protocol = DigitsProtocol(2000)
    noise = torch.from_numpy(coupled_noise(0, "evaluate", range(2000), (4, 8, 8)))
    model = load_model(whole_run / "student" / folder, device=torch.device("cpu"))
    images = []
    for start in range(0, 2000, 100):
        batch = slice(start, start + 100)
        images.append(model.decode(model.sample(noise[batch], protocol.prompts[batch])))
    sampled, real = Gaussian.of(features(torch.cat(images))), Gaussian.of(features(protocol.real_images))
    row = rows[name, 1]
    assert row["frechet_distance_real"] == pytest.approx(frechet_distance(sampled, real), rel=1e-3)
    assert row["prompt_accuracy"] == protocol.accuracy(protocol.readings(torch.cat(images))).all


def test_the_control_is_trained_as_long_and_works(rows: dict, report: dict[str, Any]) -> None:
    samples = {stage["name"]: stage["samples"] for stage in report["stages"]}
    assert samples["direct"] == samples["2rf"] + samples["student"]
    assert rows["direct", 1]["prompt_accuracy"] >= 0.97


def test_reflow_straightens(rows: dict) -> None:
    assert rows["2rf", 25]["straightness"] < 0.5 * rows["teacher", 25]["straightness"]
    assert rows["2rf", 1]["frechet_distance_real"] < 0.5 * rows["teacher", 1]["frechet_distance_real"]


def test_the_report_holds_every_row_and_floor(rows: dict, report: dict[str, Any]) -> None:
    expected = {("teacher", n) for n in (25, 8, 4, 2, 1)} | {("2rf", n) for n in (25, 4, 2, 1)}
    assert set(rows) == expected | {("student", 1), ("student (raw)", 1), ("direct", 1)}
    for key, row in rows.items():
        assert set(row) >= KEYS
        assert row["num_samples"] == 2000
        assert (row["straightness"] is None) == (key[0] not in ("teacher", "2rf"))
        assert all(np.isfinite(row[name]) for name in KEYS - {"model", "weights", "straightness"})
    floors = report["floors"]
    assert 0 < floors["autoencoder"] < rows["teacher", 25]["frechet_distance_real"]
    assert 0 < floors["real_halves"] < rows["teacher", 4]["frechet_distance_real"]
    assert floors["reader_accuracy"] > 0.98


def test_the_run_stays_in_its_memory(report: dict[str, Any]) -> None:
    assert 0.3e9 < report["peak_memory"] < 3e9


def test_the_page_stands_alone(whole_run: Path) -> None:
    page = (whole_run / "report" / "report.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", page)
    assert page.count("data:image/") > 100  # the gallery and the gaps


def test_what_a_flow_draws_comes_nearer_to_its_couplings_while_it_trains(whole_run: Path) -> None:
    for stage, count in (("2rf", 5), ("student", 4), ("direct", 5)):
        lines = [json.loads(line) for line in (whole_run / stage / "stats.jsonl").read_text().splitlines()]
        distances = [line["preview_distance"] for line in lines if "preview_distance" in line]
        assert len(distances) == len(list((whole_run / stage / "previews").glob("*.png"))) == count
        assert distances[-1] < distances[0]


def test_every_stage_tells_its_seconds(whole_run: Path) -> None:
    for stage in ("teacher", "pairs", "2rf", "pairs2", "student", "direct", "report"):
        lines = [json.loads(line) for line in (whole_run / stage / "stats.jsonl").read_text().splitlines()]
        seconds = [line["seconds"] for line in lines]
        assert seconds == sorted(seconds)
        assert 0 < seconds[-1] <= json.loads((whole_run / stage / "done.json").read_text())["seconds"]


def test_the_same_command_again_does_nothing(whole_run: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in whole_run.rglob("*") if file.is_file()}
    done = instaflow("run", "digits", "--run-dir", whole_run)
    assert done.stdout.count("done before") == 7
    assert {file: file.stat().st_mtime_ns for file in whole_run.rglob("*") if file.is_file()} == before


STOCK = """
import sys
sys.modules["instaflow"] = sys.modules["cli"] = sys.modules["pipelines"] = None  # importing them fails
import numpy, torch
from diffusers import StableDiffusionPipeline
folder, steps, scale, noise, prompts, out = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
pipeline.set_progress_bar_config(disable=True)
latents = pipeline(
    prompts.split("|"), num_inference_steps=int(steps), guidance_scale=float(scale),
    latents=torch.from_numpy(numpy.load(noise)), output_type="latent",
).images
numpy.save(out, latents.numpy())
"""


@pytest.mark.parametrize("stage", ["teacher", "2rf", "student", "direct"])
def test_stock_diffusers_gives_the_same_latents(whole_run: Path, tmp_path: Path, stage: str) -> None:
    prompts = ["a handwritten seven", "an odd digit", "the digit 4"]
    folder = whole_run / stage / "model"
    settings = json.loads((folder / "instaflow.json").read_text())
    noise = np.random.default_rng(5).standard_normal((3, 4, 8, 8)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    options = [option for prompt in prompts for option in ("--prompt", prompt)]
    files = ["--noise-in", tmp_path / "noise.npy", "--latents-out", tmp_path / "ours.npy"]
    instaflow("sample", folder, *options, *files, "--output", tmp_path / "grid.png")
    sampling = [str(settings["num_steps"]), str(settings["guidance_scale"])]
    paths = [tmp_path / "noise.npy", "|".join(prompts), tmp_path / "stock.npy"]
    subprocess.run([sys.executable, "-c", STOCK, folder, *sampling, *paths], check=True, cwd=tmp_path)
    ours, stock = np.load(tmp_path / "ours.npy"), np.load(tmp_path / "stock.npy")
    assert ours.shape == noise.shape
    assert np.abs(ours - stock).max() < 1e-5
    assert ours.std() > 0.3  # images, not zeros
    assert (tmp_path / "grid.png").stat().st_size > 100
