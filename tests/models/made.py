"""A text-to-image model of Stable Diffusion's parts, small enough to be made and run in a moment."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from instaflow.digits.tokenizer import build_tokenizer
from instaflow.models.export import save_model
from instaflow.models.loading import load_model
from instaflow.models.samplers import flow_scheduler
from instaflow.models.settings import ModelSettings

SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}  # Stable Diffusion's
WIDTH = 16


def teacher_scheduler(**changes):
    """DPM-Solver++ on Stable Diffusion's noise schedule."""
    return DPMSolverMultistepScheduler(**(SCHEDULE | {"timestep_spacing": "trailing"} | changes))


def ddim(schedule=SCHEDULE, **changes):
    """Stock DDIM as an epsilon flow's folder carries it."""
    keys = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    return DDIMScheduler(**(schedule | keys | changes))


def text_config(tokenizer, layers=1, width=WIDTH):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_unet(**changes):
    keys = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "block_out_channels": (WIDTH,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
    }
    return UNet2DConditionModel(**(keys | changes))


def build_vae(**changes):
    return AutoencoderKL(
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        **changes,
    )


def build_parts(seed=0):
    """Network, autoencoder, text encoder and tokenizer: 4x8x8 latents of 16x16 images, random weights."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    return {
        "unet": build_unet(),
        "vae": build_vae(scaling_factor=0.7),
        "text_encoder": CLIPTextModel(text_config(tokenizer)),
        "tokenizer": tokenizer,
    }


def build_xl_parts(seed=0):
    """The parts of a Stable Diffusion XL: text encoders of two layers and two widths, pooled embeddings, time ids."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    unet = build_unet(
        cross_attention_dim=3 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 2 * WIDTH,
        use_linear_projection=True,
    )
    return {
        "unet": unet,
        "vae": build_vae(scaling_factor=0.13025, force_upcast=True),
        "text_encoder": CLIPTextModel(text_config(tokenizer, layers=2)),
        "tokenizer": tokenizer,
        "text_encoder_2": CLIPTextModelWithProjection(text_config(tokenizer, layers=2, width=2 * WIDTH)),
        "tokenizer_2": tokenizer,
        "force_zeros_for_empty_prompt": True,
    }


def write_published(folder: Path, family: str) -> Path:
    """A folder as the hub has it, written by stock diffusers with the scheduler that its family comes with."""
    schedule = SCHEDULE | {"num_train_timesteps": 1000}
    if family == "xl":
        scheduler = EulerDiscreteScheduler(**schedule, timestep_spacing="leading", interpolation_type="linear")
        StableDiffusionXLPipeline(**build_xl_parts(), scheduler=scheduler).save_pretrained(folder)
        return folder
    keys = {"skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": False}
    if family == "sd1":
        scheduler = PNDMScheduler.from_config(schedule | keys)
    else:  # "sd2-v"
        scheduler = DDIMScheduler.from_config(schedule | keys | {"prediction_type": "v_prediction"})
    pipeline = StableDiffusionPipeline(
        **build_parts(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
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
    save_model(folder, **build_xl_parts(), scheduler=scheduler, settings=settings)
    return folder


def write_flow(folder: Path, parametrization: str) -> Path:
    """A flow's folder, with the scheduler that goes with its parametrization."""
    scheduler = flow_scheduler(parametrization, teacher_scheduler())
    return write_model(folder, scheduler, kind="flow", parametrization=parametrization, guidance_scale=1.5)


def load(folder: Path, dtype=torch.float32):
    return load_model(folder, device=torch.device("cpu"), dtype=dtype)


def noise(count=2, seed=0):
    """Unit-variance noise [count, 4, 8, 8]."""
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
