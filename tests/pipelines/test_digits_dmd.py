"""configs/digits-dmd.yaml at small counts: each of the method's two terms does what it is there for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from instaflow.config import load_experiment
from instaflow.couplings.noise import coupled_noise
from instaflow.couplings.shards import ShardPlan, read_shard, read_sidecar
from pipelines.experiment import run_all
from pipelines.on_couplings import guided
from tests.models.made import load
from tests.training.made import StopAt

COUPLINGS, IMAGES = 128, 256
MATCHED = ("dmd", "no-regression", "no-matching")
"""Here they all begin where `direct` ends, and see as many samples each."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    phase, small = "global_batch_size: 64, schedule: cosine", "global_batch_size: 32, schedule: cosine"
    changes = [
        f"teacher.autoencoder_phases=[{{samples: 3200, learning_rate: 3e-3, warmup_samples: 320, {small}}}]",
        f"teacher.phases=[{{samples: 9600, learning_rate: 3e-3, warmup_samples: 640, {phase}}}]",
        "teacher.ema_decay=0.98",
        *(f"pairs.{key}={COUPLINGS}" for key in ("count", "records_per_shard", "batch_size")),
        "pairs.num_steps=10",
        f"direct.phases=[{{samples: 3200, learning_rate: 1e-3, warmup_samples: 320, {phase}}}]",
        "direct.ema_decay=0.95",
        "no-regression.init=direct",
        *(f"{stage}.preview=null" for stage in ("direct", "no-matching")),
        *(
            f"{stage}.phases=[{{samples: 1120, learning_rate: 4e-4, warmup_samples: 160, {small}}}]"
            for stage in MATCHED
        ),
        *(f"{stage}.ema_decay=0.9" for stage in MATCHED),
    ]
    folder = tmp_path_factory.mktemp("digits-dmd") / "run"
    experiment = load_experiment("digits-dmd", [f"stages.{change}" for change in changes], str(folder))
    trained = {name: experiment.stages[name] for name in ("teacher", "pairs", "direct", *MATCHED)}
    run_all(replace(experiment, stages=trained), StopAt())
    return folder


@pytest.mark.slow
def test_matching_pleases_the_teacher_and_regression_holds_the_couplings(run: Path) -> None:
    """In one step: how far images are from what the teacher sees in them noised, and from the coupled latents."""
    shard = read_shard(run / "pairs", read_sidecar(run / "pairs", 0, ShardPlan(COUPLINGS, COUPLINGS)))
    coupled, data = (torch.from_numpy(values).float() for values in (shard.noise, shard.latent))
    first, second = (torch.from_numpy(coupled_noise(0, name, range(IMAGES), (4, 8, 8))) for name in ("one", "two"))
    prompts = [shard.prompts[index % COUPLINGS] for index in range(IMAGES)]
    teacher = load(run / "teacher" / "model")
    view, score = teacher.view(), guided(teacher, 3.0)(prompts)
    timestep = view.timestep(torch.full((IMAGES,), 0.2))
    surprise, error = {}, {}
    for name in ("direct", *MATCHED):
        model = load(run / name / "model")
        made = model.sample(first, prompts)
        noised = view.noised(second, made, timestep)
        with torch.no_grad():
            seen = view.predicted_data(noised, timestep, score(noised, timestep))
        surprise[name] = float((made - seen).square().mean())
        error[name] = float((model.sample(coupled, shard.prompts) - data).square().mean())

    assert surprise["no-regression"] < 0.8 * surprise["direct"]
    assert surprise["dmd"] < 0.95 * surprise["no-matching"]
    assert error["no-matching"] < 0.9 * error["direct"]
    assert error["dmd"] < 0.7 * error["no-regression"]
