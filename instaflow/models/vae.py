"""A model's autoencoder alone: what makes images of latents. None stands for that of a model of pixels."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from instaflow.errors import DataError, reason_of
from instaflow.places import configuration_of, find_model, is_of_pixels


def load_vae(place: str, *, device: torch.device) -> Any:
    """The VAE of the model in a pipeline's folder, a .safetensors file or under a hub name, in float32.

    None for a model of pixels. The model's other parts are not loaded. Raises DataError.
    """
    found = find_model(place)
    if is_of_pixels(found):
        return None
    try:
        vae = vae_in(found)
    except Exception as error:  # diffusers and safetensors each raise their own kinds
        reason = reason_of(error)
        raise DataError(f"The VAE of '{place}' cannot be loaded: {reason}", "Restore the model's files") from error
    return vae.float().to(device).requires_grad_(False).eval()


def vae_in(found: Path) -> Any:
    if found.is_file():
        folder = str(configuration_of(found))
        return AutoencoderKL.from_single_file(str(found), config=folder, subfolder="vae", local_files_only=True)
    full = any(file for file in found.glob("vae/*.safetensors") if ".fp16" not in file.name)
    return AutoencoderKL.from_pretrained(
        str(found),
        subfolder="vae",
        variant=None if full else "fp16",
        use_safetensors=True,
        low_cpu_mem_usage=False,
        local_files_only=True,
    )


def load_tiny(folder: Path, *, device: torch.device) -> Any:
    """An AutoencoderTiny, which decodes a large VAE's latents with far less memory. Raises DataError."""
    return load_alone(AutoencoderTiny, folder, "decoder", device)


def load_autoencoder(folder: Path, *, device: torch.device) -> Any:
    """The AutoencoderKL in a folder of its own, such as a pipeline's `vae`. Raises DataError."""
    return load_alone(AutoencoderKL, folder, "autoencoder", device)


def load_alone(kind: Any, folder: Path, what: str, device: torch.device) -> Any:
    try:
        vae = kind.from_pretrained(str(folder), use_safetensors=True, low_cpu_mem_usage=False, local_files_only=True)
    except Exception as error:  # diffusers and safetensors each raise their own kinds
        reason = reason_of(error)
        raise DataError(f"The {what} '{folder}' cannot be loaded: {reason}", "Restore its files") from error
    return vae.float().to(device).requires_grad_(False).eval()


@torch.no_grad()
def encoded(vae: Any, images: Tensor) -> Tensor:
    """Scaled latents [B, C, h, w], float32, of images [B, 3, H, W] in [-1, 1]: the means of their posteriors."""
    if vae is None:
        return images.float()
    means = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean
    return means.float() * vae.config.scaling_factor


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1], float32, of scaled latents [B, C, h, w]."""
    if vae is None:
        return latents.float().clamp(-1, 1)
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    images: Tensor = vae.decode(latents, return_dict=False)[0]
    return images.float().clamp(-1, 1)
