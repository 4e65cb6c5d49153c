"""Distillation in two phases, L2 and then LPIPS of decoded images, by the real commands."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file

from instaflow.config import load_experiment
from instaflow.errors import ConfigError
from instaflow.rundir import read_stats, stage_folders
from instaflow.weights import WEIGHTS
from pipelines.on_couplings import open_distance
from tests.models.made import load, write_model
from tests.pipelines.runs import instaflow
from tests.training.test_perceptual import write_backbone

TEXT = """
run: unused
stages:
  pairs: {kind: couple, model: MODEL, prompts: [a seven, an odd digit], count: 8, batch_size: 8, num_steps: 2,
          guidance_scale: 1}
  student:
    kind: distill
    init: MODEL
    couplings: pairs
    phases:
      - {samples: 4, global_batch_size: 2, learning_rate: 1e-3}
      - {samples: 4, global_batch_size: 2, learning_rate: 1e-3, loss: lpips}
    perceptual: {weights: WEIGHTS, crop: 6}
    preview: null
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    weights = write_backbone(folder / "alex.pth", "alex")
    text = TEXT.replace("MODEL", str(write_model(folder / "teacher"))).replace("WEIGHTS", str(weights))
    (folder / "lpips.yaml").write_text(text)
    return folder / "lpips.yaml"


@pytest.mark.slow
def test_a_student_by_l2_and_lpips(config, tmp_path):
    instaflow("run", config, "--run-dir", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "student" / "stats.jsonl").read_text().splitlines()]
    losses = {line["samples_seen"]: line["loss"] for line in lines if "loss" in line}
    assert [line["phase"] for line in lines if "loss" in line] == [0, 0, 1, 1]
    assert losses[6] < 0.2 * losses[4]  # another measure
    raw = load_file(tmp_path / "run" / "student" / "model-raw" / "unet" / "diffusion_pytorch_model.safetensors")
    assert raw.keys() == load(config.parent / "teacher").unet.state_dict().keys()


def distance_of(config, model, **changes):
    overrides = [f"stages.student.perceptual.{key}={value}" for key, value in changes.items()]
    return open_distance(stage_folders(load_experiment(str(config), overrides))["student"], model)


def test_weights_that_no_path_is_given_of_are_found(config, tmp_path, monkeypatch):
    model = load(config.parent / "teacher")
    named = distance_of(config, model)
    monkeypatch.setenv("INSTAFLOW_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(WEIGHTS, "lpips-alex", replace(WEIGHTS["lpips-alex"], sha256=""))
    shutil.copy(config.parent / "alex.pth", tmp_path / WEIGHTS["lpips-alex"].file)
    (config.parent / "alex.pth").rename(config.parent / "away.pth")
    try:
        found = distance_of(config, model, weights="null")
    finally:
        (config.parent / "away.pth").rename(config.parent / "alex.pth")
    for one, other in zip(found.network.parameters(), named.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_does_not_go_with_the_model_is_refused(config, tmp_path):
    model = load(config.parent / "teacher")
    assert distance_of(config, model).crop == 6
    with pytest.raises(ConfigError, match=r"perceptual\.crop is 9, a latent's side 8"):
        distance_of(config, model, crop=9)
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1)}
    for channels in (3, 4):
        tiny = AutoencoderTiny(**sizes, num_decoder_blocks=(1, 1), latent_channels=channels)
        tiny.save_pretrained(tmp_path / str(channels))
    assert isinstance(distance_of(config, model, decoder=tmp_path / "4").vae, AutoencoderTiny)
    with pytest.raises(ConfigError, match=r"takes latents of 3 channels, and '.*' makes 4"):
        distance_of(config, model, decoder=tmp_path / "3")


DIGITS = """
run: unused
stages:
  teacher:
    kind: teacher
    data: digits
    guidance_scale: 1
    autoencoder_phases: [{samples: 16, global_batch_size: 16, learning_rate: 1e-3}]
    phases: [{samples: 16, global_batch_size: 16, learning_rate: 1e-3}]
    perceptual_phases: [{samples: 3840, global_batch_size: 64, learning_rate: 3e-3}]
  pairs: {kind: couple, model: teacher, prompts: [a seven], count: 8, num_steps: 2, guidance_scale: 1}
  2rf:
    kind: reflow
    init: teacher
    couplings: pairs
    time_density: u-shaped
    phases: [{samples: 16, global_batch_size: 8, learning_rate: 1e-3, loss: lpips-huber}]
    perceptual: {network: teacher}
    preview: null
  student:
    kind: distill
    init: 2rf
    couplings: pairs
    phases: [{samples: 16, global_batch_size: 8, learning_rate: 1e-3, loss: lpips}]
    perceptual: {network: teacher}
    preview: null
"""


@pytest.mark.slow
def test_the_digits_teacher_trains_a_network_to_measure_by(tmp_path):
    (tmp_path / "digits.yaml").write_text(DIGITS)
    instaflow("run", tmp_path / "digits.yaml", "--run-dir", tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "teacher" / "perceptual").iterdir())
    assert names == ["config.json", "model.safetensors"]
    (saved,) = (tmp_path / "run" / "teacher" / "checkpoints" / "perceptual").glob("*/ema.safetensors")
    average, kept = load_file(saved), load_file(tmp_path / "run" / "teacher" / "perceptual" / "model.safetensors")
    assert len(kept) == 6 and all(torch.equal(value, average[f"layers.{name}"]) for name, value in kept.items())
    lines = [json.loads(line) for line in (tmp_path / "run" / "teacher" / "stats.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["job"] == "perceptual"]
    assert losses[-1] < 0.3 < 2 < losses[0]
    student = read_stats(tmp_path / "run" / "student" / "stats.jsonl")
    assert all(0 < line["loss"] < 3 * 4 for line in student)  # three layers, each at most 2² apart
    flow = read_stats(tmp_path / "run" / "2rf" / "stats.jsonl")
    assert flow[-1]["samples_seen"] == 16 and all(line["loss"] > 0 for line in flow)


def test_a_teacher_without_such_a_network_serves_no_loss(tmp_path):
    (tmp_path / "digits.yaml").write_text(DIGITS)
    with pytest.raises(ConfigError, match="needs a stage that gives a perceptual network, and 'teacher' gives none"):
        load_experiment(str(tmp_path / "digits.yaml"), ["stages.teacher.perceptual_phases=null"])
