"""What the miniature teacher minimises, and the measurements between its two phases.

All randomness comes in as an argument, so that a training step is a function of its arguments.
"""

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from torch.nn import functional
from transformers import CLIPTextModel

KL_WEIGHT = 1e-3  # per latent value against the squared error per pixel value


def autoencoder_loss(
    vae: AutoencoderKL, images: torch.Tensor, generator: torch.Generator | list[torch.Generator]
) -> torch.Tensor:
    """Scalar: mean squared error of the round trip, plus a little of KL(q(z|x) || N(0, I)).

    Args:
        images: [B, 3, H, W] in [-1, 1]
        generator: draws the latents from the encoder's distribution; or one for each image
    """
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample(generator)).sample
    return functional.mse_loss(decoded, images) + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: torch.Tensor, *, batch_size: int = 256) -> torch.Tensor:
    """The means of all images' latents times the autoencoder's scaling factor: [N, 4, H/4, W/4]."""
    means = [vae.encode(batch).latent_dist.mean for batch in images.split(batch_size)]
    return torch.cat(means) * vae.config["scaling_factor"]


def measure_scaling_factor(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """The factor that gives the latents of `images` unit standard deviation; 0.18215 for Stable Diffusion's."""
    return float(vae.config["scaling_factor"] / encode_all(vae, images).std())


def denoiser_loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    alphas_cumprod: torch.Tensor,
    *,
    latents: torch.Tensor,
    input_ids: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """Scalar: mean of |eps_theta(x_t, t, c) - eps|^2, x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps (DDPM, eq. 14).

    Args:
        alphas_cumprod: [T], the scheduler's
        latents: [B, 4, h, w], scaled
        input_ids: [B, L], tokens of the captions
        noise: [B, 4, h, w], unit variance
        timesteps: [B], int64, uniform in 0..T-1
    """
    abar = alphas_cumprod[timesteps].view(-1, 1, 1, 1)  # [B, 1, 1, 1]
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    hidden = text_encoder(input_ids).last_hidden_state  # [B, L, width]
    return functional.mse_loss(unet(noisy, timesteps, hidden).sample, noise)
