"""The miniature's networks: the parts of a StableDiffusionPipeline, in sizes that two processor cores can train."""

from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from instaflow.digits.images import SIZE

PERCEPTUAL = {"channels": (3, 16, 32, 64), "strides": (1, 2, 2)}
"""Sizes of the classifier's convolutions; the second and the third halve the places of the one before."""

PIXELS = 16
"""The side of an image that the pixel network draws: half of the others', a quarter of the work."""


TEXT_WIDTH = 64
TEXT_LAYERS = {"digits": 1, "digits-grid": 2}  # a digit's place stands elsewhere in the caption than the digit


def build_autoencoder() -> AutoencoderKL:
    """RGB images to latents of four channels and a quarter of their side, and back."""
    return AutoencoderKL(
        sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 16),
        layers_per_block=0,  # one residual block a level in the decoder, none in the encoder: enlarged scans are smooth
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, data: str = "digits") -> CLIPTextModel:
    """Prompts to a hidden state for each token."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=TEXT_LAYERS[data],
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Noisy latents, a timestep and a prompt's hidden states to the noise in the latents."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),  # attention at 4x4, where it is cheap
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,  # the number of heads, by an old slip of diffusers that checkpoints rely on
        cross_attention_dim=TEXT_WIDTH,
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
