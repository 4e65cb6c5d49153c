"""Loading a model from a folder, a single file or the hub's cache."""

import math
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ConsistencyModelPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open

from instaflow.errors import DataError, reason_of
from instaflow.models.architecture import read_config
from instaflow.models.guidance_lock import unlock_guidance
from instaflow.models.model import Model
from instaflow.models.pixels import PixelModel
from instaflow.models.released import from_released
from instaflow.models.samplers import flow_scheduler
from instaflow.models.settings import read_settings
from instaflow.models.stacked import StackedUNet
from instaflow.models.text_to_image import TextToImage
from instaflow.places import configuration_of, find_model, is_of_pixels, is_released, pipeline_class

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""By what a stage's `dtype` calls them."""


def load_model(place: str | Path, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Model:
    """Load a model from a pipeline's folder, a .safetensors file or a hub name. Raises DataError if it is none.

    In float16 the VAE stays in float32 where its configuration says that it would overflow (`force_upcast`).
    """
    found = find_model(str(place))
    pixels = is_of_pixels(found)
    if pixels:
        check_edm(found)
    try:
        pipeline = load_pipeline(found, dtype)
    except Exception as error:  # diffusers, transformers and safetensors each raise their own kinds
        reason = reason_of(error)
        raise DataError(
            f"The model '{place}' cannot be loaded: {reason}", "Restore its files, or make the model's stage again"
        ) from error
    settings = read_settings(found if found.is_dir() else configuration_of(found))
    if pixels:
        edm = PixelModel(pipeline, settings, str(place))
        edm.unet.to(device)
        return edm
    unlock_guidance(pipeline.unet)
    model = TextToImage(pipeline, settings, str(place))
    check_network(model)
    if found.is_file():
        check_whole(model, found)
    for part in (model.unet, model.vae, *model.text_encoders):
        part.to(device)
    if dtype == torch.float16 and model.vae.config.force_upcast:
        model.vae.float()
    return model


def load_pipeline(found: Path, dtype: torch.dtype) -> Any:
    """The stock pipeline in a folder or a single file, without network and without pickles."""
    folder = found if found.is_dir() else configuration_of(found)
    if is_of_pixels(folder):
        return ConsistencyModelPipeline.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
        )
    xl = pipeline_class(folder) == "StableDiffusionXLPipeline"
    pipeline: Any = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "feature_extractor": None}
    options["low_cpu_mem_usage"] = False  # the other way needs accelerate, and leaves tensors without values
    options |= {"add_watermarker": False} if xl else {"safety_checker": None, "requires_safety_checker": False}
    if found.is_file():
        return as_ours(pipeline.from_single_file(str(found), config=str(folder), **options), folder)
    full = any(file for file in folder.glob("unet/*.safetensors") if ".fp16" not in file.name)
    how = {"variant": None if full else "fp16", "use_safetensors": True}
    if pipeline.load_config(str(folder))["unet"][1] == StackedUNet.__name__:  # by our code: the folder's is never run
        options["unet"] = StackedUNet.from_pretrained(
            str(folder / "unet"), torch_dtype=dtype, low_cpu_mem_usage=False, **how
        )
    return as_ours(pipeline.from_pretrained(str(folder), **how, **options), folder)


def as_ours(pipeline: Any, folder: Path) -> Any:
    """The pipeline, its network read from InstaFlow's convention where the folder is in that one."""
    if is_released(folder):
        from_released(pipeline.unet)
        pipeline.scheduler = flow_scheduler("velocity", pipeline.scheduler)
    return pipeline


def check_edm(folder: Path) -> None:
    """Raises DataError for a model of pixels that is no EDM."""
    scheduler = read_config(folder / "scheduler" / "scheduler_config.json")
    if read_settings(folder).parametrization == "edm" and str(scheduler.get("_class_name")).startswith("EDM"):
        return
    raise DataError(
        f"'{folder}' is a model of pixels, and no EDM: there is no flow of noise to images to be read from it",
        "Of such models, those will do that a teacher stage of method edm or `instaflow import-edm` made",
    )


def check_network(model: TextToImage) -> None:
    """Raises DataError for a network that takes more than noise, a timestep and text."""
    config = model.unet.config
    if config.in_channels != model.vae.config.latent_channels:
        raise DataError(
            f"The U-Net of '{model.name}' takes {config.in_channels} channels where its VAE has "
            f"{model.vae.config.latent_channels}: it does not start from noise alone",
            "Take the text-to-image model, not the one for inpainting or editing",
        )
    if config.time_cond_proj_dim is not None:
        raise DataError(
            f"The U-Net of '{model.name}' takes the guidance scale as an input (time_cond_proj_dim): it is distilled "
            "for a sampler that adds noise at each step",
            "Take the model that it was distilled from",
        )


def check_whole(model: TextToImage, file: Path) -> None:
    """Raises DataError where a single file has fewer numbers than a part of the model.

    The stock loader leaves what it does not find as it was drawn, and says nothing.
    """
    parts = {
        "model.diffusion_model.": [model.unet],
        "first_stage_model.": [model.vae],
        "cond": model.text_encoders,  # cond_stage_model, and Stable Diffusion XL's conditioner
    }
    with safe_open(str(file), "pt") as weights:
        sizes = {name: math.prod(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    for prefix, networks in parts.items():
        held = sum(size for name, size in sizes.items() if name.startswith(prefix))
        needed = sum(parameter.numel() for network in networks for parameter in network.parameters())
        if held < needed:
            raise DataError(
                f"'{file}' holds {held:,} numbers under '{prefix}', where its configuration makes {needed:,}",
                f"Take a whole checkpoint, and the configuration of its own family in '{file.with_suffix('')}'",
            )
