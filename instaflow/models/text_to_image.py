"""A text-to-image model of Stable Diffusion's format: text and guidance, sampling, decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from instaflow.errors import DataError
from instaflow.flow.inversion import invert
from instaflow.flow.straightness import Trajectory, euler
from instaflow.flow.views import EpsilonView, VelocityView, View
from instaflow.models.sampling import Sampling
from instaflow.models.settings import ModelSettings
from instaflow.models.vae import decoded, encoded

Text = dict[str, Any]
"""Prompts as arguments of the U-Net: encoder_hidden_states [B, L, D], and for Stable Diffusion XL added_cond_kwargs,
a dict of text_embeds [B, P] and time_ids [B, 6]."""
Embedded = tuple[Tensor, Tensor | None]
"""Text embeddings [B, L, D] and pooled ones, [B, P], of Stable Diffusion XL alone."""


class TextToImage:
    """The parts of a StableDiffusionPipeline or StableDiffusionXLPipeline, with what sampling them needs.

    Latents are scaled (the VAE's `scaling_factor` applied) everywhere outside this class; images are [B, 3, H, W]
    in [-1, 1]; noise has unit variance.
    """

    def __init__(self, pipeline: Any, settings: ModelSettings, name: str) -> None:
        self.unet, self.vae, self.scheduler = pipeline.unet, pipeline.vae, pipeline.scheduler
        self.text_encoder, self.tokenizer = pipeline.text_encoder, pipeline.tokenizer
        self.text_encoder_2 = getattr(pipeline, "text_encoder_2", None)  # Stable Diffusion XL's, as the next two are
        self.tokenizer_2 = getattr(pipeline, "tokenizer_2", None)
        self.zeros_for_no_prompt = pipeline.config.get("force_zeros_for_empty_prompt", False)
        self.settings = settings
        self.name = name
        self.num_truncated = 0
        """How many prompts so far were longer than the tokenizer's length."""
        for part in (self.unet, self.vae, *self.text_encoders):
            part.requires_grad_(False).eval()

    @property
    def text_encoders(self) -> list[Any]:
        return [self.text_encoder] if self.text_encoder_2 is None else [self.text_encoder, self.text_encoder_2]

    @property
    def parts(self) -> dict[str, Any]:
        """The pipeline's parts but its scheduler, by the names that `save_model` takes."""
        parts = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder, "tokenizer": self.tokenizer}
        if self.text_encoder_2 is None:
            return parts
        return parts | {
            "text_encoder_2": self.text_encoder_2,
            "tokenizer_2": self.tokenizer_2,
            "force_zeros_for_empty_prompt": self.zeros_for_no_prompt,
        }

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

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of an image in pixels."""
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        _, height, width = self.latent_shape
        return (scale * height, scale * width)

    def view(self) -> View:
        """The network read as a velocity. Raises DataError for a diffusion that no flow can be read from."""
        if self.settings.parametrization == "velocity":
            return VelocityView()
        file = "its scheduler_config.json should say"
        if not hasattr(self.scheduler, "alphas_cumprod"):
            raise DataError(
                f"'{self.name}' comes with a {type(self.scheduler).__name__}, which has no noise schedule like Stable "
                "Diffusion's",
                f"If it is a Stable Diffusion, {file}, say, DDIMScheduler",
            )
        alphas, prediction = self.scheduler.alphas_cumprod.float(), self.scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise DataError(
                f"The scheduler of '{self.name}' has prediction_type '{prediction}', which is no diffusion's",
                f"If it is one, {file} epsilon, v_prediction or sample",
            )
        if prediction == "epsilon" and not alphas[-1] > 0:
            raise DataError(
                f"The noise schedule of '{self.name}' ends without any signal (rescale_betas_zero_snr), where a "
                "prediction of the noise says nothing about the data",
                f"Such a teacher predicts v: {file} prediction_type v_prediction",
            )
        return EpsilonView(alphas, prediction)

    # --- text ---------------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str | None]) -> Text:
        """The prompts as the network takes them; None is no prompt at all, guidance's other branch."""
        return self.arguments(*self.embed(prompts))

    @torch.no_grad()
    def embed(self, prompts: Sequence[str | None]) -> Embedded:
        """The prompts' embeddings. One that stands several times is encoded once, a long one cut and counted."""
        unique = list(dict.fromkeys(prompts))
        texts = [prompt or "" for prompt in unique]
        self.count_truncated(prompts)
        if self.text_encoder_2 is None:
            ids, mask = self.token_ids(self.tokenizer, texts)
            hidden, pooled = self.text_encoder(ids, attention_mask=mask)[0], None
        else:
            ids, ids_2 = self.token_ids(self.tokenizer, texts)[0], self.token_ids(self.tokenizer_2, texts)[0]
            first = self.text_encoder(ids, output_hidden_states=True)
            second = self.text_encoder_2(ids_2, output_hidden_states=True)
            hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
            pooled = second.text_embeds
            if self.zeros_for_no_prompt and None in unique:
                hidden[unique.index(None)] = 0
                pooled[unique.index(None)] = 0
        place = {prompt: index for index, prompt in enumerate(unique)}
        rows = torch.tensor([place[prompt] for prompt in prompts]).to(hidden.device, non_blocking=True)
        return hidden[rows], None if pooled is None else pooled[rows]

    def token_ids(self, tokenizer: Any, texts: list[str]) -> tuple[Tensor, Tensor | None]:
        """Token numbers [B, L], padded or cut to the tokenizer's length, and a mask if the text encoder wants one."""
        length = tokenizer.model_max_length
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids = tokens.input_ids.to(self.device, non_blocking=True)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        return ids, tokens.attention_mask.to(self.device, non_blocking=True) if masked else None

    def count_truncated(self, prompts: Sequence[str | None]) -> None:
        texts = list(dict.fromkeys(prompt for prompt in prompts if prompt))
        ids = self.tokenizer(texts, truncation=False, verbose=False).input_ids if texts else []
        long = {text for text, found in zip(texts, ids, strict=True) if len(found) > self.tokenizer.model_max_length}
        self.num_truncated += sum(prompt in long for prompt in prompts)

    def arguments(self, hidden: Tensor, pooled: Tensor | None) -> Text:
        """Embeddings of `embed` as the network takes them. Stable Diffusion XL is told that images are whole."""
        if pooled is None:
            return {"encoder_hidden_states": hidden}
        # The original size, the crop's corner and the target size, in pixels (SDXL, Sec. 2.2)
        time_ids = torch.tensor([*self.image_size, 0, 0, *self.image_size], dtype=hidden.dtype).to(
            hidden.device, non_blocking=True
        )
        added = {"text_embeds": pooled, "time_ids": time_ids.expand(len(hidden), -1)}
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": added}

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


def negate_output(unet: nn.Module) -> None:
    """Turn the sign of a U-Net's output, in place, by its last convolution."""
    with torch.no_grad():
        for parameter in unet.conv_out.parameters():  # type: ignore[union-attr]
            parameter.neg_()
