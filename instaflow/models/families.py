"""Stable Diffusion 1, 2 and XL as they were published: configurations, and the hub names that stand for them.

The numbers are those of the models' own config.json files, as far as they are not the libraries' defaults.
"""

from instaflow.errors import DataError
from instaflow.models.architecture import Architecture, read_architecture
from instaflow.places import configured_model, is_hub_name

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
    "stabilityai/stable-diffusion-2-base": SD2,
    "stabilityai/stable-diffusion-2-1-base": SD2,
    "stabilityai/stable-diffusion-2": SD2_V,
    "stabilityai/stable-diffusion-2-1": SD2_V,
    "stabilityai/stable-diffusion-xl-base-0.9": XL,
    "stabilityai/stable-diffusion-xl-base-1.0": XL,
}


def architecture_of(place: str) -> Architecture:
    """What the model in a folder, a single file or under a hub name is made of; no network is asked. Raises DataError.

    A hub model need not be here: its small files in the cache do, or a name that is known.
    """
    folder = configured_model(place)
    if folder is not None:
        return read_architecture(folder)
    if place in HUB_NAMES:
        return HUB_NAMES[place]
    hint = "A model is a pipeline's folder, a .safetensors file or a hub name"
    if is_hub_name(place):
        hint = f"Fetch its small files, where there is network: hf download {place} --include '*.json' '*.txt'"
    raise DataError(f"What '{place}' is made of is not known on this machine", hint)
