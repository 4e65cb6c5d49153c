from types import SimpleNamespace

import pytest

from instaflow.methods import DistillStage
from instaflow.sections import FlowPhase
from instaflow.training.losses import DistillLoss
from pipelines import on_couplings
from tests.models.made import load, write_flow

PHASES = [FlowPhase(samples=8, global_batch_size=4, learning_rate=1e-3)]


@pytest.mark.parametrize("wanted", [False, True])
def test_gradient_checkpointing_is_what_the_setting_says(tmp_path, monkeypatch, wanted):
    model = load(write_flow(tmp_path / "model", "velocity"))
    loss = DistillLoss(model.unet, model.view(), model.encode)
    settings = DistillStage(
        kind="distill", init="2rf", couplings="pairs", phases=PHASES, gradient_checkpointing=wanted, preview=None
    )
    jobs = []
    monkeypatch.setattr(on_couplings, "train", lambda job, stage, stop: jobs.append(job))
    material = on_couplings.Material(model, SimpleNamespace(), model.view())
    on_couplings.train_on(SimpleNamespace(stage=settings), None, material, loss, model.settings)
    assert model.unet.is_gradient_checkpointing is wanted
    assert jobs[0].settings is settings and jobs[0].loss is loss and jobs[0].preview is jobs[0].preview_every is None
