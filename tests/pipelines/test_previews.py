"""What a flow in training shows of itself: pictures and figures, from real stages of a small network."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from instaflow.couplings.contact_sheet import GAP, LINE, MARGIN, TILE, fitted
from instaflow.couplings.loader import Couplings
from instaflow.evaluation.frechet import frechet_distance
from instaflow.files import sha256_of
from instaflow.models.settings import ModelSettings
from instaflow.rundir import read_stats
from instaflow.sections import Preview
from pipelines.previews import Previews
from tests.models.made import load, write_model
from tests.pipelines.runs import instaflow, together
from tests.training.made import TIMINGS

pytestmark = pytest.mark.slow
TEXT = """
run: unused
stages:
  pairs:
    {kind: couple, model: MODEL, prompts: [a seven, an odd digit, the digit 4], count: 44, records_per_shard: 8,
     batch_size: 4, num_steps: 2, guidance_scale: 2}
  2rf:
    {kind: reflow, init: MODEL, couplings: pairs, num_steps: 5, guidance_scale: 1.5, ema_decay: 0.8,
     phases: [{samples: 16, global_batch_size: 4, learning_rate: 1e-2},
              {samples: 32, global_batch_size: 8, learning_rate: 1e-2}],
     checkpoint_every: 20, preview: {every: 14, images: 40, grid: 5, num_steps: 3}}
  student:
    {kind: distill, init: MODEL, couplings: pairs, parametrization: epsilon, ema_decay: 0.8, phases:
     [{samples: 16, global_batch_size: 8, learning_rate: 1e-2}], preview: {every: 100, images: 500}}
"""
SEEN = {"2rf": [16, 32, 48], "student": [16]}  # the first at or past each multiple, and the end; 44 couplings


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("previews")
    model = write_model(folder / "teacher")
    text = TEXT.replace("MODEL", str(model))
    (folder / "small.yaml").write_text(text)
    return str(folder / "small.yaml")


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    """The experiment, never stopped, on one process."""
    folder = tmp_path_factory.mktemp("run")
    instaflow("run", config, "--run-dir", folder)
    return folder


def lines(run, stage="2rf"):
    """What a stage logged, without the time and memory that it took."""
    stats = read_stats(run / stage / "stats.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in stats]


def figures(run, stage="2rf"):
    return [line for line in lines(run, stage) if "preview_distance" in line]


def pictures(run, stage="2rf"):
    return {file.name: sha256_of(file) for file in sorted((run / stage / "previews").iterdir())}


def weights(run, stage="2rf"):
    return {file.parent.parent.name: sha256_of(file) for file in (run / stage).glob("model*/unet/*.safetensors")}


def sampled(run, stage, num_steps):
    """By the exported model: the first couplings, its latents of their noises and prompts, both latents' images."""
    model, couplings = load(run / stage / "model"), Couplings(run / "pairs", seed=0)
    batch = couplings.batch(0, 40 if stage == "2rf" else 44)
    latents = model.sample(torch.from_numpy(batch.noise), batch.prompts, num_steps=num_steps)
    both = [model.pictures(part[:1])[0].numpy() for part in (torch.from_numpy(batch.latent), latents)]
    return batch, latents.numpy(), both


@pytest.mark.parametrize("stage", SEEN)
def test_a_preview_for_each_multiple_and_for_the_end(run, stage):
    assert [line["samples_seen"] for line in figures(run, stage)] == SEEN[stage]
    assert list(pictures(run, stage)) == [f"{seen:09d}.png" for seen in SEEN[stage]]


@pytest.mark.parametrize(("stage", "num_steps"), [("2rf", 3), ("student", 1)])
def test_the_last_figures_are_those_of_the_exported_model(run, stage, num_steps):
    batch, latents, _ = sampled(run, stage, num_steps)
    cells = [
        part.reshape(len(part), 4, 4, 2, 4, 2).mean((3, 5)).reshape(len(part), 64) for part in (latents, batch.latent)
    ]
    last = figures(run, stage)[-1]
    assert last["preview_distance"] == pytest.approx(np.sqrt(((latents - batch.latent) ** 2).mean()), rel=1e-4)
    assert last["preview_frechet"] == pytest.approx(frechet_distance(*cells), rel=1e-3)


def test_a_flow_that_learns_comes_nearer(run):
    distances = [line["preview_distance"] for line in figures(run)]
    assert distances[-1] < distances[0]


@pytest.mark.parametrize(("stage", "num_steps"), [("2rf", 3), ("student", 1)])
def test_the_picture_shows_the_coupled_image_and_the_model_s(run, stage, num_steps):
    sheet = np.asarray(Image.open(max((run / stage / "previews").iterdir()))).astype(int)
    top = MARGIN + 3 * LINE
    for place, image in enumerate(sampled(run, stage, num_steps)[2]):
        x = MARGIN + place * (TILE + GAP)
        assert np.abs(sheet[top : top + TILE, x : x + TILE] - np.asarray(fitted(image))).max() <= 1


def reflowed_again(config, run, to, setting, processes=1):
    """The reflow stage anew, on the same couplings, with another setting."""
    shutil.copytree(run / "pairs", to / "pairs")
    arguments = ("reflow", config, "--run-dir", to, "--set", f"stages.2rf.{setting}")
    instaflow(*arguments) if processes == 1 else together(processes, *arguments)
    return to


def test_previews_change_no_weight(config, run, tmp_path):
    none = reflowed_again(config, run, tmp_path, "preview=null")
    assert weights(none) == weights(run) and len(weights(run)) == 2
    assert lines(none) == [line for line in lines(run) if "loss" in line]
    assert not (none / "2rf" / "previews").exists()


def test_two_processes_that_share_the_weights_show_what_one_shows(config, run, tmp_path):
    shared = reflowed_again(config, run, tmp_path, "zero_stage=3", processes=2)
    assert list(pictures(shared)) == list(pictures(run))
    for line, expected in zip(figures(shared), figures(run), strict=True):
        assert line.pop("job") == expected.pop("job")
        assert line == pytest.approx(expected, rel=1e-3)


def test_latents_that_are_not_finite_are_no_figure_and_no_end(run, tmp_path):
    model = load(run / "2rf" / "model")
    stage = SimpleNamespace(name="2rf", folder=tmp_path, stage=SimpleNamespace(preview=Preview(images=2, grid=2)))
    stage.stage.mixed_precision = None
    previews = Previews(stage, model, Couplings(run / "pairs", 0), ModelSettings("flow", "velocity", 2, 1.0))
    spoilt = {f"unet.{name}": value * torch.nan for name, value in model.unet.state_dict().items()}
    assert json.loads(json.dumps(previews(spoilt, 8))) == {"preview_distance": None, "preview_frechet": None}
    assert all(value.isfinite().all() for value in model.unet.state_dict().values())
    assert (tmp_path / "previews" / "000000008.png").exists()


def test_bfloat16_is_sampled_as_it_trains(run, tmp_path):
    model = load(run / "2rf" / "model")
    stage = SimpleNamespace(name="2rf", folder=tmp_path, stage=SimpleNamespace(preview=Preview(images=8, grid=2)))
    weights = {f"unet.{name}": value for name, value in model.unet.state_dict().items()}
    found = []
    for stage.stage.mixed_precision in (None, "bfloat16"):
        previews = Previews(stage, model, Couplings(run / "pairs", 0), ModelSettings("flow", "velocity", 4, 1.5))
        kinds = set()
        previews.model.unet.conv_out.register_forward_hook(lambda *call, kinds=kinds: kinds.add(call[-1].dtype))
        found.append((kinds, previews(weights, 8)["preview_distance"]))
    (full, exact), (half, rounded) = found
    assert (full, half) == ({torch.float32}, {torch.bfloat16})
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.02)
