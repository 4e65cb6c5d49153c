"""The distill stage: a one-step student, trained on couplings."""

from collections.abc import Callable

from instaflow.interruption import Stop
from instaflow.rundir import StageFolder
from instaflow.training.losses import DistillLoss
from pipelines.exporting import settings_of
from pipelines.on_couplings import open_distance, open_material, prepare, save_both, train_on


def run(stage: StageFolder, stop: Stop) -> Callable[[], str]:
    """Train one step from noise to its coupled data; write the student with EMA and raw weights."""
    settings = stage.stage
    material = open_material(stage)
    model = material.model
    distance = open_distance(stage, model)
    loss = prepare(stage, material, lambda view: DistillLoss(model.unet, view, model.encode, distance))
    exported = settings_of(settings, model)
    trained = train_on(stage, stop, material, loss, exported)
    return save_both(
        stage,
        material,
        trained,
        exported,
        summary=f"one-step student, {trained.samples_seen:,} training samples from {settings.couplings}",
    )
