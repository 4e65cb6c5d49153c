"""A stage that trains two U-Nets in series, and what is done with its model, by the real command."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from instaflow.files import sha256_of
from instaflow.models.stacked import StackedUNet
from tests.models.made import load, noise, write_flow
from tests.pipelines.runs import instaflow, stop_when

pytestmark = pytest.mark.slow
TEXT = """
run: unused
stages:
  pairs:
    {kind: couple, model: MODEL, prompts: [a seven, an odd digit, the digit 4], count: 24, records_per_shard: 8,
     batch_size: 8, num_steps: 2, guidance_scale: 1}
  student:
    {kind: distill, init: MODEL, couplings: pairs, stacked: true, ema_decay: 0.8, checkpoint_every: 8,
     phases: [{samples: 48, global_batch_size: 4, learning_rate: 1e-3}], preview: {every: 24, images: 8, grid: 2}}
  pairs2: {kind: couple, model: student, prompts: [a seven], count: 8, num_steps: 1, guidance_scale: 1}
  again:
    {kind: reflow, init: student, couplings: pairs2, guidance_scale: 1.5, num_steps: 2, preview: null,
     phases: [{samples: 8, global_batch_size: 4, learning_rate: 1e-3}]}
  thrice:
    {kind: distill, init: student, couplings: pairs2, stacked: true,
     phases: [{samples: 8, global_batch_size: 4, learning_rate: 1e-3}]}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("stacked")
    (folder / "small.yaml").write_text(TEXT.replace("MODEL", str(write_flow(folder / "flow", "velocity"))))
    return str(folder / "small.yaml")


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    """The experiment but its last stage, which can't be made; the student is stopped once, and goes on."""
    folder = tmp_path_factory.mktemp("run")
    instaflow("couple", config, "--run-dir", folder, "--stage", "pairs")
    stats = folder / "student" / "stats.jsonl"
    arguments = ("distill", config, "--run-dir", folder, "--stage", "student")
    stopped = stop_when(lambda: stats.exists() and stats.read_text().count("\n") > 3, signal.SIGTERM, *arguments)
    assert stopped.returncode == 75, stopped.stderr
    refused = instaflow("run", config, "--run-dir", folder, expect=1)
    assert "'student' is two U-Nets in series already" in refused.stderr
    assert "Hint: Leave out stacked" in refused.stderr
    return folder


def weights(run: Path, name: str, stage: str = "student") -> dict[str, torch.Tensor]:
    return load_file(run / stage / name / "unet" / "diffusion_pytorch_model.safetensors")


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "student" / "stats.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_it_begins_with_the_loss_of_its_init(run):
    checks = json.loads((run / "student" / "start_checks.json").read_text())
    values = {check["what"]: check["value"] for check in checks}
    assert values["first loss"] == values["loss of the initial model's own velocity"]
    assert losses(run)[0] < 2 * values["first loss"]  # of the first batch


def test_a_stopped_training_ends_in_the_same_bytes(config, run, tmp_path):
    shutil.copytree(run / "pairs", tmp_path / "pairs")
    instaflow("distill", config, "--run-dir", tmp_path, "--stage", "student")
    assert losses(tmp_path) == losses(run)
    for name in ("model", "model-raw"):
        file = Path("student", name, "unet", "diffusion_pytorch_model.safetensors")
        assert sha256_of(run / file) == sha256_of(tmp_path / file)


def test_both_are_trained_and_averaged(config, run):
    before = load(Path(config).parent / "flow").unet.state_dict()
    raw, average = weights(run, "model-raw"), weights(run, "model")
    assert raw.keys() == average.keys()
    for half in ("first.mid_block.", "mid_block."):
        names = [name for name in raw if name.startswith(half) and name.endswith("conv1.weight")]
        assert names
        for name in names:
            assert not torch.equal(raw[name], before[name.removeprefix("first.")])
            assert not torch.equal(raw[name], average[name])


def test_it_is_sampled(run, tmp_path):
    model = run / "student" / "model"
    np.save(tmp_path / "noise.npy", noise(1).numpy())
    files = ("--noise-in", tmp_path / "noise.npy", "--latents-out", tmp_path / "latents.npy")
    instaflow("sample", model, "--prompt", "a seven", *files, "--output", tmp_path / "out.png")
    expected = load(model).sample(noise(1), ["a seven"]).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "latents.npy"), expected, atol=1e-5)


def test_what_it_is_the_init_of_stays_two(run):
    assert type(load(run / "again" / "model").unet) is StackedUNet
    assert weights(run, "model", "again").keys() == weights(run, "model").keys()
