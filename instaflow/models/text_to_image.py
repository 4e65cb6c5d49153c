"""A text-to-image model of Stable Diffusion's format, its text above all."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from instaflow.errors import DataError
from instaflow.flow.views import EpsilonView, VelocityView, View
from instaflow.models.model import Embedded, Model, Text
from instaflow.models.settings import ModelSettings


class TextToImage(Model):
    """The parts of a StableDiffusionPipeline or StableDiffusionXLPipeline, with what sampling them needs."""

    def __init__(self, pipeline: Any, settings: ModelSettings, name: str) -> None:
        super().__init__(pipeline, settings, name)
        self.vae = pipeline.vae
        self.text_encoder, self.tokenizer = pipeline.text_encoder, pipeline.tokenizer
        self.text_encoder_2 = getattr(pipeline, "text_encoder_2", None)  # Stable Diffusion XL's, as the next two are
        self.tokenizer_2 = getattr(pipeline, "tokenizer_2", None)
        self.zeros_for_no_prompt = pipeline.config.get("force_zeros_for_empty_prompt", False)
        for part in (self.vae, *self.text_encoders):
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
        if prediction == "epsilon" and not alphas[-1] > 1e-6:  # DPM-Solver keeps 2^-24 where there is none
            raise DataError(
                f"The noise schedule of '{self.name}' ends without any signal (rescale_betas_zero_snr), where a "
                "prediction of the noise says nothing about the data",
                f"Such a teacher predicts v: {file} prediction_type v_prediction",
            )
        return EpsilonView(alphas, prediction)

    # --- text ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, prompts: Sequence[str | None]) -> Embedded:
        """The prompts' embeddings. One that stands several times is encoded once, a long one cut and counted."""
        unique = list(dict.fromkeys(prompts))
        self.count_truncated(prompts)
        hidden, pooled = self.embed_tokens(*self.tokens([prompt or "" for prompt in unique]))
        if self.zeros_for_no_prompt and None in unique:
            hidden[unique.index(None)] = 0
            if pooled is not None:
                pooled[unique.index(None)] = 0
        place = {prompt: index for index, prompt in enumerate(unique)}
        rows = torch.tensor([place[prompt] for prompt in prompts]).to(hidden.device, non_blocking=True)
        return hidden[rows], None if pooled is None else pooled[rows]

    def tokens(self, texts: list[str]) -> tuple[Tensor, Tensor | None]:
        """What `embed_tokens` takes: token numbers [B, L], and their mask if there is one or the second tokenizer's."""
        ids, mask = self.token_ids(self.tokenizer, texts)
        return ids, mask if self.text_encoder_2 is None else self.token_ids(self.tokenizer_2, texts)[0]

    @torch.no_grad()
    def embed_tokens(self, ids: Tensor, second: Tensor | None) -> Embedded:
        """The embeddings of the `tokens` of prompts; no device waits for the other."""
        if self.text_encoder_2 is None:
            return self.text_encoder(ids, attention_mask=second)[0], None
        first, last = (
            encoder(tokens, output_hidden_states=True)
            for encoder, tokens in zip(self.text_encoders, (ids, second), strict=True)
        )
        return torch.cat([first.hidden_states[-2], last.hidden_states[-2]], -1), last.text_embeds

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
        # The original size, the crop's corner and the target size, in pixels (SDXL, Sec. 2.2); made where they are used
        sizes = (*self.image_size, 0, 0, *self.image_size)
        time_ids = torch.stack([hidden.new_full((len(hidden),), size) for size in sizes], 1)  # [B, 6]
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": added}


def negate_output(unet: nn.Module) -> None:
    """Turn the sign of a U-Net's output, in place, by its last convolution."""
    with torch.no_grad():
        for parameter in unet.conv_out.parameters():  # type: ignore[union-attr]
            parameter.neg_()
