"""The reflow stage: the next rectified flow, trained on couplings of the one before."""

from collections.abc import Callable

from instaflow.flow.views import View
from instaflow.interruption import Stop
from instaflow.rundir import StageFolder
from instaflow.training.losses import RectifiedDiffusionLoss, ReflowLoss
from pipelines.exporting import settings_of
from pipelines.on_couplings import open_distance, open_material, prepare, save_both, train_on


def run(stage: StageFolder, stop: Stop) -> Callable[[], str]:
    """Train on the straight paths between coupled noise and data; write the flow with EMA and raw weights."""
    settings = stage.stage
    material = open_material(stage)
    model = material.model
    distance = open_distance(stage, model)
    if settings.caption_dropout:
        model.embed([None])  # raises DataError for a network that knows no absence of a prompt

    def make_loss(view: View) -> ReflowLoss:
        dropout, density = settings.caption_dropout, settings.time_density
        kind = RectifiedDiffusionLoss if settings.parametrization == "rectified-diffusion" else ReflowLoss
        return kind(model.unet, view, model.encode, dropout, distance, time_density=density)

    loss = prepare(stage, material, make_loss)
    exported = settings_of(settings, model)
    among = f", {settings.real.share:.1%} of them real, from {settings.real.couplings}" if settings.real else ""
    trained = train_on(stage, stop, material, loss, exported)
    return save_both(
        stage,
        material,
        trained,
        exported,
        summary=f"rectified flow, {trained.samples_seen:,} training samples from {settings.couplings}{among}",
    )
