"""The teacher stage by method edm: a small EDM of the digits' pixels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from instaflow.couplings.noise import coupled_noise
from instaflow.digits.captions import WORDS
from instaflow.digits.data import DigitsData
from instaflow.digits.images import smaller
from instaflow.digits.networks import PIXELS, build_pixel_scheduler, build_pixel_unet
from instaflow.flow.views import EdmView
from instaflow.interruption import Stop
from instaflow.models.device import device
from instaflow.models.settings import ModelSettings
from instaflow.rundir import StageFolder
from instaflow.training.denoising import EdmLoss
from instaflow.training.loop import as_tensors, train
from pipelines.teacher import digits_job, write_teacher

MEAN = 0.4
"""Of ln σ in training. An enlarged scan's pixels tell of one another, so what a digit is drowns in more noise than what
a photograph shows: at EDM's own -1.2 fewer are drawn right."""


def run(stage: StageFolder, stop: Stop) -> Callable[[], str]:
    """Train the network on digits and noise drawn anew for each sample; write it with EMA and raw weights."""
    settings, place = stage.stage, device()
    data = DigitsData(stage.seed, place)
    torch.manual_seed(stage.seed)
    unet: Any = build_pixel_unet(len(WORDS) if settings.classes else None)
    loss = EdmLoss(unet.to(place), EdmView(), MEAN)

    def batch(position: int, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        images, labels = data.labelled_at("denoiser", position, size)
        places = range(position, position + size)
        (noise,) = as_tensors(place, coupled_noise(stage.seed, stage.name, places, (3, PIXELS, PIXELS)))
        return noise, smaller(images, PIXELS), labels if settings.classes else None

    job = digits_job(stage, "denoiser", loss, batch, settings.phases)
    trained = train(job, stage, stop)
    kind = "class-conditional" if settings.classes else "unconditional"
    summary = f"{kind} EDM of handwritten digits' pixels, {trained.samples_seen:,} training samples"
    exported = ModelSettings(
        parametrization="edm",
        num_steps=settings.num_steps,
        guidance_scale=1.0,
        class_names=list(WORDS) if settings.classes else [],
    )
    return write_teacher(stage, loss, trained, exported, summary, unet=unet, scheduler=build_pixel_scheduler())
