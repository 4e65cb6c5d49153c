"""Stable Diffusion 1, 2 and XL, and EDM's ADM: configurations, and the names that stand for them.

The numbers are those of the models' own config.json files, as far as they are not the libraries' defaults.
"""

from dataclasses import replace
from pathlib import Path

from instaflow.errors import DataError
from instaflow.models.architecture import Architecture, Config, read_architecture, velocity_sampler
from instaflow.models.settings import FLOW, INSTAFLOW, ONE_STEP, TWO_RECTIFIED_FLOW, ModelSettings
from instaflow.places import configured_model, is_hub_name, is_to_import

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}
LEADING = {"set_alpha_to_one": False, "clip_sample": False}
PNDM = SCHEDULE | LEADING | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
DDIM_V = SCHEDULE | LEADING | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
EULER = SCHEDULE | {
    "_class_name": "EulerDiscreteScheduler",
    "timestep_spacing": "leading",
    "interpolation_type": "linear",
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
VAE = {
    "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
UNET_1 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
UNET_2 = UNET_1 | {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
UNET_XL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD1 = Architecture(UNET_1, VAE, (CLIP_L,), PNDM)
SD2 = Architecture(UNET_2, VAE, (CLIP_H,), PNDM)
SD2_V = Architecture(UNET_2 | {"sample_size": 96}, VAE | {"sample_size": 768}, (CLIP_H,), DDIM_V)
XL = Architecture(
    UNET_XL, VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}, (CLIP_L, CLIP_G), EULER
)
HUB_NAMES = {
    "CompVis/stable-diffusion-v1-1": SD1,
    "CompVis/stable-diffusion-v1-2": SD1,
    "CompVis/stable-diffusion-v1-3": SD1,
    "CompVis/stable-diffusion-v1-4": SD1,
    "runwayml/stable-diffusion-v1-5": SD1,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD1,
    f"XCLiu/{ONE_STEP}": replace(SD1, scheduler=velocity_sampler(), settings=INSTAFLOW),
    f"XCLiu/{FLOW}": replace(SD1, scheduler=velocity_sampler(), settings=TWO_RECTIFIED_FLOW),
    "stabilityai/stable-diffusion-2-base": SD2,
    "stabilityai/stable-diffusion-2-1-base": SD2,
    "stabilityai/stable-diffusion-2": SD2_V,
    "stabilityai/stable-diffusion-2-1": SD2_V,
    "stabilityai/stable-diffusion-xl-base-0.9": XL,
    "stabilityai/stable-diffusion-xl-base-1.0": XL,
}


def adm(side: int, classes: int | None, channels: tuple[int, ...], attention: tuple[bool, ...]) -> Architecture:
    """EDM's ADM with three blocks a level, as `instaflow import-edm` makes it; channels and attention of each level."""
    unet: Config = {
        "sample_size": side,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": channels,
        "layers_per_block": 3,
        "down_block_types": tuple("AttnDownBlock2D" if on else "ResnetDownsampleBlock2D" for on in attention),
        "up_block_types": tuple("AttnUpBlock2D" if on else "ResnetUpsampleBlock2D" for on in reversed(attention)),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 64,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "time_embedding_dim": 4 * channels[0],
        "num_class_embeds": classes,
    }
    scheduler = {"_class_name": "EDMDPMSolverMultistepScheduler", "solver_order": 2}
    return Architecture(unet, None, (), scheduler, ModelSettings(parametrization="edm", num_steps=18, guidance_scale=1))


TO_IMPORT = {
    "edm-imagenet-64x64-cond-adm": adm(64, 1000, (192, 384, 576, 768), (False, True, True, True)),
    # None of EDM's own networks for CIFAR-10 is an ADM: these are of its code's --arch=adm --cbase=256 --cres=1,1,1.
    "edm-cifar10-32x32-cond-adm": adm(32, 10, (256, 256, 256), (True, True, True)),
    "edm-cifar10-32x32-uncond-adm": adm(32, None, (256, 256, 256), (True, True, True)),
}
"""Folders that are made by `instaflow import-edm`, by their names: the first is EDM's own."""


def architecture_of(place: str) -> Architecture:
    """What the model in a folder, a single file or under a hub name is made of; no network is asked. Raises DataError.

    A hub model need not be here: its small files in the cache do, or a name that is known; nor need a folder of a known
    name that is yet to be imported.
    """
    folder = configured_model(place)
    if folder is not None:
        return read_architecture(folder)
    if place in HUB_NAMES:
        return HUB_NAMES[place]
    if is_to_import(place):
        return TO_IMPORT[Path(place).name]
    hint = "A model is a pipeline's folder, a .safetensors file or a hub name"
    if is_hub_name(place):
        hint = f"Fetch its small files, where there is network: hf download {place} --include '*.json' '*.txt'"
    raise DataError(f"What '{place}' is made of is not known on this machine", hint)
