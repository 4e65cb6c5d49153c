"""Models of Stable Diffusion's parts at random weights, small enough to be made and run in a moment."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from instaflow.models.architecture import Architecture
from instaflow.models.export import save_model

WIDTH = 16


def write_tiny(folder: Path, architecture: Architecture, tokenizer: Any) -> None:
    """A model folder with an architecture's pipeline, scheduler and settings, and tiny networks of seed 0.

    4×8×8 latents of 16×16 images, or 16×16 pixels. The tokenizer is a CLIPTokenizer, of any size.
    """
    if architecture.is_edm:
        torch.manual_seed(0)
        parts: dict[str, Any] = {"unet": tiny_pixel_unet(architecture.unet.get("num_class_embeds"), sample_size=16)}
    else:
        parts = tiny_xl_parts(tokenizer) if architecture.is_xl else tiny_parts(tokenizer)
    scheduler = getattr(diffusers, architecture.scheduler["_class_name"]).from_config(architecture.scheduler)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(folder, **parts, scheduler=scheduler, settings=architecture.settings)


def tiny_parts(tokenizer: Any, seed: int = 0) -> dict[str, Any]:
    """The parts of a Stable Diffusion 1 or 2, but for the scheduler, as `save_model` takes them."""
    torch.manual_seed(seed)
    return {
        "unet": tiny_unet(),
        "vae": tiny_vae(scaling_factor=0.7),
        "text_encoder": CLIPTextModel(text_config(tokenizer)),
        "tokenizer": tokenizer,
    }


def tiny_xl_parts(tokenizer: Any, seed: int = 0) -> dict[str, Any]:
    """The parts of a Stable Diffusion XL: text encoders of two layers and two widths, pooled embeddings, time ids."""
    torch.manual_seed(seed)
    unet = tiny_unet(
        cross_attention_dim=3 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 2 * WIDTH,
        use_linear_projection=True,
    )
    return {
        "unet": unet,
        "vae": tiny_vae(scaling_factor=0.13025, force_upcast=True),
        "text_encoder": CLIPTextModel(text_config(tokenizer, layers=2)),
        "tokenizer": tokenizer,
        "text_encoder_2": CLIPTextModelWithProjection(text_config(tokenizer, layers=2, width=2 * WIDTH)),
        "tokenizer_2": tokenizer,
        "force_zeros_for_empty_prompt": True,
    }


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "block_out_channels": (WIDTH,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
    }
    return UNet2DConditionModel(**(settings | changes))


def tiny_pixel_unet(num_classes: int | None, **changes: Any) -> UNet2DModel:
    """An EDM's network on 8×8 pixels."""
    settings = {
        "sample_size": 8,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "block_out_channels": (WIDTH, WIDTH),
        "layers_per_block": 1,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "attn_norm_num_groups": 4,
        "num_class_embeds": num_classes,
    }
    return UNet2DModel(**(settings | changes))


def tiny_vae(**changes: Any) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        **changes,
    )


def text_config(tokenizer: Any, layers: int = 1, width: int = WIDTH) -> CLIPTextConfig:
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
