"""The teacher stage: the miniature of Stable Diffusion that the digits' experiments start from."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from instaflow.digits.data import DATA
from instaflow.digits.images import real_images
from instaflow.digits.losses import measure_scaling_factor
from instaflow.digits.networks import PERCEPTUAL, build_autoencoder, build_scheduler, build_text_encoder, build_unet
from instaflow.digits.stream import AutoencoderLoss, CaptionLoss, ClassifierLoss, DenoiserLoss
from instaflow.digits.tokenizer import build_tokenizer
from instaflow.files import fingerprint_of
from instaflow.interruption import Stop
from instaflow.models.device import device
from instaflow.models.export import save_model
from instaflow.models.settings import ModelSettings
from instaflow.rundir import StageFolder
from instaflow.sections import Phase
from instaflow.training.loop import Job, Trained, train
from instaflow.training.perceptual import save_network, small_layers
from instaflow.world import world


def run(stage: StageFolder, stop: Stop) -> Callable[[], str]:
    """Train the autoencoder, then text encoder and U-Net together; write them as one pipeline folder.

    Before that the text encoder trains alone, if so asked. The perceptual network lies beside the pipeline, in a
    folder `perceptual`.
    """
    settings, place = stage.stage, device()
    data = DATA[settings.data](stage.seed, place)
    torch.manual_seed(stage.seed)
    tokenizer = build_tokenizer(settings.data)
    scheduler: Any = build_scheduler()
    vae: Any = build_autoencoder()
    text_encoder: Any = build_text_encoder(tokenizer, settings.data)
    unet: Any = build_unet()
    for network in (vae, text_encoder, unet):
        network.to(place)

    # Autoencoder
    def image_batch(position: int, size: int) -> tuple[Tensor]:
        return (data.images_at("autoencoder", position, size),)

    job = digits_job(stage, "autoencoder", AutoencoderLoss(vae), image_batch, settings.autoencoder_phases)
    trained = train(job, stage, stop)
    job.loss.load_state_dict(trained.ema)
    vae.requires_grad_(False).eval()
    vae.register_to_config(scaling_factor=measure_scaling_factor(vae, real_images(data.side).to(place)))

    # Text encoder
    if settings.text_phases:

        def caption_batch(position: int, size: int) -> tuple[list[str]]:
            return (data.captions_at("text", position, size),)

        reading = CaptionLoss(text_encoder, tokenizer=tokenizer, allowed_by=data.allowed_by, cells=data.side**2)
        trained = train(digits_job(stage, "text", reading.to(place), caption_batch, settings.text_phases), stage, stop)
        reading.load_state_dict(trained.ema)

    # Text encoder and U-Net
    latents_at = data.latents_by(vae)

    def latent_batch(position: int, size: int) -> tuple[Tensor, list[str]]:
        return latents_at("denoiser", position, size), data.captions_at("denoiser", position, size)

    loss = DenoiserLoss(
        unet,
        text_encoder,
        tokenizer=tokenizer,
        alphas_cumprod=scheduler.alphas_cumprod,
        caption_dropout=settings.caption_dropout,
    )
    trained = train(digits_job(stage, "denoiser", loss, latent_batch, settings.phases), stage, stop)

    # Perceptual network
    if settings.perceptual_phases:

        def labelled_batch(position: int, size: int) -> tuple[Tensor, Tensor]:
            return data.labelled_at("perceptual", position, size)

        layers = small_layers(**PERCEPTUAL).to(place)
        classifier = ClassifierLoss(layers, layers(data.digits[:1]).numel()).to(place)
        trained_classifier = train(
            digits_job(stage, "perceptual", classifier, labelled_batch, settings.perceptual_phases), stage, stop
        )
        classifier.load_state_dict(trained_classifier.ema)
        if world().leads:
            save_network(stage.folder / "perceptual", layers, **PERCEPTUAL)

    # Model folders
    summary = f"latent diffusion model of handwritten digits, {trained.samples_seen:,} training samples"
    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}
    exported = ModelSettings(num_steps=settings.num_steps, guidance_scale=settings.guidance_scale)
    return write_teacher(stage, loss, trained, exported, summary, **parts)


def write_teacher(
    stage: StageFolder, loss: nn.Module, trained: Trained, settings: ModelSettings, summary: str, **parts: Any
) -> Callable[[], str]:
    """The leader's: model/ (EMA) and model-raw/ of the networks in `loss`, which are among the pipeline's parts."""
    lineage = [{"stage": stage.name, "kind": "teacher", "summary": summary}]
    if world().leads:
        for name, weights in (("model-raw", trained.raw), ("model", trained.ema)):
            loss.load_state_dict(weights)
            own = replace(settings, weights="ema" if name == "model" else "raw", lineage=lineage)
            save_model(stage.folder / name, **parts, settings=own)
    return lambda: fingerprint_of(stage.model)


def digits_job(stage: StageFolder, name: str, loss: nn.Module, batch: Callable[..., tuple], phases: list[Phase]) -> Job:
    """A training job on the digits with the stage's settings."""
    return Job(
        name=name,
        loss=loss,
        batch=batch,
        describe=lambda position, size: f"the digits' samples {position:,} to {position + size - 1:,}",
        phases=phases,
        settings=stage.stage,
    )
