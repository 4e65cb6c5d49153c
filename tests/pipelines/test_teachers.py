"""Stable Diffusion XL all the way: coupled, reflowed, coupled again, distilled, and sampled by stock diffusers."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from instaflow.couplings.manifest import read_manifest
from pipelines.couple import repair
from pipelines.sample import run as sample
from pipelines.sample_request import Request, wanted_by
from tests.models.made import noise, write_published

ROOT = Path(__file__).parents[2]
PHASE = "{samples: 8, global_batch_size: 4, learning_rate: 1e-3}"
CONFIG = f"""
run: run
stages:
  pairs: {{kind: couple, model: TEACHER, prompts: [a seven, an odd digit, the digit 7], count: 8,
    records_per_shard: 4, batch_size: 2, sampler: heun, num_steps: 3, guidance_scale: 3}}
  2rf: {{kind: reflow, init: TEACHER, couplings: pairs, phases: [{PHASE}], caption_dropout: 0.5}}
  pairs2: {{kind: couple, model: 2rf, prompts: [a seven], count: 8, num_steps: 2, guidance_scale: 1.5}}
  student: {{kind: distill, init: 2rf, couplings: pairs2, phases: [{PHASE}]}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("xl")
    teacher = write_published(place / "teacher", "xl")
    (place / "xl.yaml").write_text(CONFIG.replace("TEACHER", str(teacher)))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from cli import main; main()"
    words = [sys.executable, "-c", code, "run", "xl.yaml"]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "run"


def test_the_manifest_records_the_sampler(run: Path) -> None:
    manifest = read_manifest(run / "pairs")
    assert manifest.sampler["class"] == "HeunDiscreteScheduler"
    assert manifest.sampler["timestep_spacing"] == manifest.timestep_spacing == "trailing"


def test_a_repaired_shard_has_the_same_bytes(run: Path) -> None:
    shard = run / "pairs" / "shards" / "00001.tar"
    before = hashlib.sha256(shard.read_bytes()).hexdigest()
    shard.unlink()
    assert repair(run / "pairs") == [1]
    assert hashlib.sha256(shard.read_bytes()).hexdigest() == before


@pytest.mark.parametrize(("stage", "num_steps", "guidance_scale"), [("2rf", 3, 1.5), ("student", 1, 1.0)])
def test_stock_diffusers_samples_what_was_trained(run: Path, stage: str, num_steps: int, guidance_scale: float) -> None:
    np.save(run / "noise.npy", noise(1).numpy())
    request = Request(
        models=(str(run / stage / "model"),),
        prompts=("an odd digit",),
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        noise_file=run / "noise.npy",
        latents_file=run / f"{stage}.npy",
        output=f"{run}/{stage}.png",
    )
    sample(request, wanted_by(request))
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(run / stage / "model"), local_files_only=True)
    stock = pipeline(
        ["an odd digit"],
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        latents=noise(1),
        output_type="latent",
    )
    ours = torch.from_numpy(np.load(run / f"{stage}.npy"))
    torch.testing.assert_close(ours, stock.images, rtol=1e-5, atol=1e-5)
