"""A text-to-image model of Stable Diffusion's parts, small enough to be made and run in a moment."""

import json
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from instaflow.digits.tokenizer import build_tokenizer
from instaflow.models.export import save_model
from instaflow.models.families import SD1, SD2_V, XL
from instaflow.models.loading import load_model
from instaflow.models.samplers import flow_scheduler
from instaflow.models.settings import ModelSettings
from instaflow.models.tiny import tiny_parts, tiny_pixel_unet, tiny_xl_parts

SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}  # Stable Diffusion's


def teacher_scheduler(**changes):
    """DPM-Solver++ on Stable Diffusion's noise schedule."""
    return DPMSolverMultistepScheduler(**(SCHEDULE | {"timestep_spacing": "trailing"} | changes))


def ddim(schedule=SCHEDULE, **changes):
    """Stock DDIM as an epsilon flow's folder carries it."""
    keys = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    return DDIMScheduler(**(schedule | keys | changes))


def build_parts(seed=0):
    """Network, autoencoder, text encoder and tokenizer: 4x8x8 latents of 16x16 images, random weights."""
    return tiny_parts(build_tokenizer(), seed)


def write_published(folder: Path, family: str) -> Path:
    """A folder as the hub has it, written by stock diffusers with the scheduler that its family comes with."""
    if family == "xl":
        scheduler = EulerDiscreteScheduler.from_config(XL.scheduler)
        parts = tiny_xl_parts(build_tokenizer())
        StableDiffusionXLPipeline(**parts, scheduler=scheduler).save_pretrained(folder)
        return folder
    kinds = {"sd1": (PNDMScheduler, SD1), "sd2-v": (DDIMScheduler, SD2_V)}
    kind, known = kinds[family]
    pipeline = StableDiffusionPipeline(
        **build_parts(),
        scheduler=kind.from_config(known.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def write_checked(folder: Path, unsafe: bool | None = None) -> Path:
    """A Stable Diffusion 1 with a safety checker, as the hub has it; of random weights, or one that says always so."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**sizes, "image_size": 16, "patch_size": 8}, text_config=sizes, projection_dim=8)
    write_published(folder, "sd1")
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(config)
    if unsafe is not None:  # a similarity is larger than this
        checker.concept_embeds_weights.data.fill_(-2.0 if unsafe else 2.0)
        checker.special_care_embeds_weights.data.fill_(2.0)
    checker.save_pretrained(folder / "safety_checker")
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**size).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text()) | {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n# A teacher\n")
    return folder


def write_model(folder: Path, scheduler=None, seed=0, **settings) -> Path:
    """A model folder as a stage writes it; by default a teacher."""
    scheduler = scheduler or teacher_scheduler()
    save_model(folder, **build_parts(seed), scheduler=scheduler, settings=ModelSettings(**settings))
    return folder


def write_xl_flow(folder: Path, parametrization: str) -> Path:
    """A flow's folder, as a stage writes it that trained a Stable Diffusion XL."""
    settings = ModelSettings(kind="flow", parametrization=parametrization, guidance_scale=1.5)
    scheduler = flow_scheduler(parametrization, teacher_scheduler())
    save_model(folder, **tiny_xl_parts(build_tokenizer()), scheduler=scheduler, settings=settings)
    return folder


def write_flow(folder: Path, parametrization: str) -> Path:
    """A flow's folder, with the scheduler that goes with its parametrization."""
    scheduler = flow_scheduler(parametrization, teacher_scheduler())
    return write_model(folder, scheduler, kind="flow", parametrization=parametrization, guidance_scale=1.5)


def write_edm(folder: Path, scheduler=None, classes=10, size=8, seed=0, **settings) -> Path:
    """The folder of an EDM of 8x8 pixels; by default a teacher of ten classes."""
    torch.manual_seed(seed)
    settings = {"parametrization": "edm", "num_steps": 4, "guidance_scale": 1.0} | settings
    save_model(
        folder,
        unet=tiny_pixel_unet(classes, sample_size=size),
        scheduler=scheduler or EDMDPMSolverMultistepScheduler(),
        settings=ModelSettings(**settings),
    )
    return folder


def load(folder: Path, dtype=torch.float32):
    return load_model(folder, device=torch.device("cpu"), dtype=dtype)


def noise(count=2, seed=0):
    """Unit-variance noise [count, 4, 8, 8]."""
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
