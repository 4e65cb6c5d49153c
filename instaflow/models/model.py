"""What every model is to a stage: a network that is read as a velocity, prompts, sampling, images."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from instaflow.flow.inversion import invert
from instaflow.flow.straightness import Trajectory, euler
from instaflow.flow.views import View
from instaflow.models.sampling import Sampling
from instaflow.models.settings import ModelSettings
from instaflow.models.vae import decoded, encoded

Text = dict[str, Any]
"""Prompts as arguments of the U-Net: encoder_hidden_states [B, L, D], and for Stable Diffusion XL added_cond_kwargs,
a dict of text_embeds [B, P] and time_ids [B, 6]; of a class-conditional network class_labels [B]."""
Embedded = tuple[Tensor, Tensor | None]
"""Text embeddings [B, L, D] and pooled ones, [B, P], of Stable Diffusion XL alone; or classes [B]."""


class Model(ABC):
    """The parts of a pipeline, with what sampling them needs; a text-to-image model, or one of pixels.

    Latents are scaled (the VAE's `scaling_factor` applied) everywhere outside of models; where there is no VAE they are
    the pixels. Images are [B, 3, H, W] in [-1, 1]; noise has unit variance.
    """

    vae: Any = None
    any_prompt = ""
    """One that the network can be tried with."""

    def __init__(self, pipeline: Any, settings: ModelSettings, name: str) -> None:
        self.unet, self.scheduler = pipeline.unet, pipeline.scheduler
        self.settings = settings
        self.name = name
        self.num_truncated = 0
        """How many prompts so far were longer than the tokenizer's length."""
        self.unet.requires_grad_(False).eval()

    @property
    @abstractmethod
    def parts(self) -> dict[str, Any]:
        """The pipeline's parts but its scheduler, by the names that `save_model` takes."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """(H, W) of an image in pixels."""

    @abstractmethod
    def view(self) -> View:
        """The network read as a velocity. Raises DataError for a diffusion that no flow can be read from."""

    @abstractmethod
    def embed(self, prompts: Sequence[str | None]) -> Embedded:
        """The prompts' embeddings; None is no prompt at all, guidance's other branch. Raises DataError."""

    @abstractmethod
    def arguments(self, hidden: Tensor, pooled: Tensor | None) -> Text:
        """Embeddings of `embed` as the network takes them."""

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one noise or latent."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (self.unet.config.in_channels, height, width)

    def encode(self, prompts: Sequence[str | None]) -> Text:
        """The prompts as the network takes them; None is no prompt at all, guidance's other branch."""
        return self.arguments(*self.embed(prompts))

    # --- network ------------------------------------------------------------------------------------------------------

    def guided(self, x: Tensor, timestep: Tensor, text: Text, guidance_scale: float) -> Tensor:
        """The network's output under classifier-free guidance, out(∅) + g (out(prompt) - out(∅)).

        x: [B, C, H, W]. `text` holds 2B rows, those of no prompt first, where the scale is above 1, and otherwise B:
        then the network is called without guidance.
        """
        if guidance_scale <= 1:
            return self.unet(x, timestep, **text, return_dict=False)[0]
        if timestep.ndim:
            timestep = torch.cat([timestep, timestep])
        both = self.unet(torch.cat([x, x]), timestep, **text, return_dict=False)[0]
        empty, prompted = both.chunk(2)
        return empty + guidance_scale * (prompted - empty)

    def predict(self, x: Tensor, timestep: Tensor, text: Text, guidance_scale: float) -> Tensor:
        """`guided` on a float32 state, whatever the network's precision."""
        return self.guided(x.to(self.dtype), timestep, text, guidance_scale).float()

    def conditioning(self, prompts: list[str], guidance_scale: float) -> Text:
        """The text that `guided` wants."""
        return self.joined(self.embed([None]) if guidance_scale > 1 else None, self.embed(prompts))

    def joined(self, no_prompt: Embedded | None, prompted: Embedded) -> Text:
        """Embeddings of no prompt, 1 row, and of B prompts as `guided` wants them: 2B rows, or B without the first."""
        if no_prompt is None:
            return self.arguments(*prompted)
        (none, pooled_none), (hidden, pooled) = no_prompt, prompted
        hidden = torch.cat([none.expand_as(hidden), hidden])
        if pooled is not None and pooled_none is not None:
            pooled = torch.cat([pooled_none.expand_as(pooled), pooled])
        return self.arguments(hidden, pooled)

    def sample(
        self,
        noise: Tensor,
        prompts: list[str],
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: Any = None,
    ) -> Tensor:
        """Scaled latents [B, C, H, W] of unit-variance noise [B, C, H, W]: one batch of a `Sampling`.

        Steps and guidance default to what the model's folder recommends, the scheduler to the folder's own.
        """
        steps = self.settings.num_steps if num_steps is None else num_steps
        scale = self.settings.guidance_scale if guidance_scale is None else guidance_scale
        return Sampling(self, num_steps=steps, guidance_scale=scale, scheduler=scheduler)(noise, prompts)

    @torch.no_grad()
    def trajectory(self, noise: Tensor, prompts: list[str], *, num_steps: int, guidance_scale: float) -> Trajectory:
        """Euler's path of the guided flow from noise [B, C, H, W], for straightness and parity checks."""
        text = self.conditioning(prompts, guidance_scale)

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            return self.predict(x, timestep, text, guidance_scale)

        return euler(self.view(), predict, noise.to(self.device, torch.float32), num_steps)

    @torch.no_grad()
    def inverted(self, latents: Tensor, prompts: list[str], *, num_steps: int, guidance_scale: float) -> Tensor:
        """The noise [B, C, H, W] from which the guided flow comes to scaled latents [B, C, H, W], float32."""
        text = self.conditioning(prompts, guidance_scale)

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            return self.predict(x, timestep, text, guidance_scale)

        return invert(self.view(), predict, latents.to(self.device), num_steps)

    def encode_images(self, images: Tensor, batch_size: int = 8) -> Tensor:
        """Scaled latents [B, C, h, w], float32, of images [B, 3, H, W] in [-1, 1]; few at a time, as in `pictures`."""
        return torch.cat([encoded(self.vae, part) for part in images.split(batch_size)])

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], float32, of scaled latents [B, C, h, w]."""
        return decoded(self.vae, latents)

    def pictures(self, latents: Tensor, batch_size: int = 8) -> Tensor:
        """Images [B, H, W, 3], uint8, of scaled latents [B, C, h, w]; few at a time, for a VAE takes much memory."""
        images = torch.cat([self.decode(part) for part in latents.split(batch_size)])
        return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    @torch.no_grad()
    def round_trip(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1], encoded to the mean of their latents and decoded again, float32."""
        return torch.cat([self.decode(encoded(self.vae, part)).cpu() for part in images.split(batch_size)])
