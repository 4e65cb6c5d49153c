"""A small refiner of Stable Diffusion XL's, in the format of the published one."""

from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline

from instaflow.digits.tokenizer import build_tokenizer
from instaflow.models.families import XL
from instaflow.models.tiny import WIDTH, tiny_unet, tiny_xl_parts


def write_refiner(folder: Path) -> Path:
    """One text encoder, the second; five time ids, of which the last is the aesthetic score."""
    parts = tiny_xl_parts(build_tokenizer())
    torch.manual_seed(2)
    unet = tiny_unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + 2 * WIDTH,
        use_linear_projection=True,
    )
    StableDiffusionXLImg2ImgPipeline(
        vae=parts["vae"],
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=parts["text_encoder_2"],
        tokenizer_2=parts["tokenizer_2"],
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(XL.scheduler),
        requires_aesthetics_score=True,
    ).save_pretrained(folder)
    return folder
