"""A text-to-image model of Stable Diffusion's parts, small enough to be made and run in a moment."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from instaflow.digits.tokenizer import build_tokenizer
from instaflow.models.export import save_model
from instaflow.models.settings import ModelSettings
from instaflow.models.text_to_image import flow_scheduler, load_model

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


def build_parts(seed=0):
    """Network, autoencoder, text encoder and tokenizer: 4x8x8 latents of 16x16 images, random weights."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    return {
        "unet": UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            block_out_channels=(WIDTH,),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=WIDTH,
        ),
        "vae": AutoencoderKL(
            sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            scaling_factor=0.7,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                max_position_embeddings=tokenizer.model_max_length,
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ),
        "tokenizer": tokenizer,
    }


def write_model(folder: Path, scheduler=None, seed=0, **settings) -> Path:
    """A model folder as a stage writes it; by default a teacher."""
    scheduler = scheduler or teacher_scheduler()
    save_model(folder, **build_parts(seed), scheduler=scheduler, settings=ModelSettings(**settings))
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
