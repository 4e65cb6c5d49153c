"""The miniature's networks: the parts of a StableDiffusionPipeline, in sizes that two processor cores can train."""

from dataclasses import dataclass

from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PERCEPTUAL = {"channels": (3, 16, 32, 64), "strides": (1, 2, 2)}
"""Sizes of the classifier's convolutions, on 32x32, 16x16 and 8x8 places."""

PIXELS = 16
"""The side of an image that the pixel network draws: half of the others', a quarter of the work."""


@dataclass(frozen=True)
class Sizes:
    """What grows with the images: their side in pixels, a prompt's hidden states, the U-Net's channels."""

    image: int
    text_width: int
    text_layers: int
    channels: tuple[int, ...]


SIZES = {
    "digits": Sizes(image=32, text_width=64, text_layers=1, channels=(32, 64)),
    # Two layers of text, for a digit's place stands elsewhere in the caption; a level more, so that attention is at
    # 8x8, where each cell has 4x4 places of its own, and all cells still meet at 4x4.
    "digits-grid": Sizes(image=64, text_width=96, text_layers=2, channels=(32, 64, 96)),
}


def build_autoencoder(data: str = "digits") -> AutoencoderKL:
    """RGB images to latents of four channels and a quarter of their side, and back."""
    return AutoencoderKL(
        sample_size=SIZES[data].image,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 16),
        layers_per_block=0,  # one residual block a level in the decoder, none in the encoder: enlarged scans are smooth
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, data: str = "digits") -> CLIPTextModel:
    """Prompts to a hidden state for each token."""
    sizes = SIZES[data]
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            hidden_size=sizes.text_width,
            intermediate_size=2 * sizes.text_width,
            projection_dim=sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(data: str = "digits") -> UNet2DConditionModel:
    """Noisy latents, a timestep and a prompt's hidden states to the noise in the latents."""
    sizes = SIZES[data]
    lower = len(sizes.channels) - 1
    return UNet2DConditionModel(
        sample_size=sizes.image // 4,
        down_block_types=(
            "DownBlock2D",
            *["CrossAttnDownBlock2D"] * lower,
        ),  # attention below the top: there it is cheap
        up_block_types=("UpBlock2D",) * (1 + lower),
        block_out_channels=sizes.channels,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,  # the number of heads, by an old slip of diffusers that checkpoints rely on
        cross_attention_dim=sizes.text_width,
        use_linear_projection=True,
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Stable Diffusion's noise schedule, with the solver that makes good images in 25 steps."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="epsilon",
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="trailing",  # the first step is at timestep 999, where the noise is
        steps_offset=1,  # as in Stable Diffusion; no matter with this spacing
        final_sigmas_type="zero",
    )


def build_pixel_unet(num_classes: int | None) -> UNet2DModel:
    """Noisy pixels and ln(σ) / 4, with a class if there are some, to what an EDM's network answers.

    Blocks are ADM's: time and class scale and shift, and resolution changes inside of residual layers.
    """
    return UNet2DModel(
        sample_size=PIXELS,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=32,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        num_class_embeds=num_classes,
    )


def build_pixel_scheduler() -> EDMDPMSolverMultistepScheduler:
    """EDM's noise levels, with the solver of diffusers that makes good images in 18 steps."""
    return EDMDPMSolverMultistepScheduler(solver_order=2)
