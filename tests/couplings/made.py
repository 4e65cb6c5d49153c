"""Small couplings for the tests: made as a stage makes them, with a sampler of one line."""

from pathlib import Path

import numpy as np

from instaflow.couplings.generate import Made, make_records, write_records
from instaflow.couplings.manifest import Manifest, write_manifest
from instaflow.couplings.prompts import save_prompts
from instaflow.couplings.shards import shards_to_make
from instaflow.prompt_sources import prompts_hash

PROMPTS = ["a handwritten seven", "", "the digit 7\nin two lines", "naïve café 七", "# not a comment"]


def manifest_of(**changes) -> Manifest:
    """23 records in 5 shards, the last one of 3."""
    keys = {
        "stage": "pairs",
        "seed": 0,
        "count": 23,
        "records_per_shard": 5,
        "latent_shape": (2, 4, 4),
        "prompts_hash": prompts_hash(PROMPTS),
        "model": "teacher",
        "model_fingerprint": "0" * 64,
        "sampler": {"class": "DPMSolverMultistepScheduler", "solver_order": 2},
        "num_steps": 25,
        "guidance_scale": 3.0,
        "timestep_spacing": "linspace",
        "dtype": "float32",
        "batch_size": 2,
        "hardware": {"device": "cpu"},
    }
    return Manifest(**(keys | changes))


def sample(noise: np.ndarray, prompts: list[str]) -> np.ndarray:
    """A latent that tells noise and prompt."""
    return noise / 2 + np.array([len(prompt) for prompt in prompts], np.float32).reshape(-1, 1, 1, 1)


def at_once(sampler):
    """A plain function from noise and prompts to latents as a `Sampler`."""
    return lambda indices, noise, prompts: lambda: Made(sampler(noise, prompts))


def make_shard(folder: Path, shard: int, manifest: Manifest, prompts, sampler, **options):
    """Sample a shard and write it, one after the other; its sidecar, or None where it was stopped."""
    records = make_records(folder, shard, manifest, prompts, sampler, **options)
    return None if records is None else write_records(folder, shard, manifest, records)


def make_couplings(folder: Path, manifest: Manifest, sampler=sample) -> Path:
    """A couple stage: what is missing is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, manifest)
    save_prompts(folder, PROMPTS)
    for shard in shards_to_make(folder, manifest.plan):
        make_shard(folder, shard, manifest, PROMPTS, at_once(sampler))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
