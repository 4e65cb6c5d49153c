"""A text-to-image model of Stable Diffusion's format: loading, text and guidance, sampling, decoding."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from instaflow.errors import DataError
from instaflow.flow.straightness import Trajectory, euler
from instaflow.flow.views import EpsilonView, VelocityView, View
from instaflow.models.settings import ModelSettings, read_settings

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


PARTS = {
    "unet": ("config.json",),
    "vae": ("config.json",),
    "text_encoder": ("config.json",),
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "tokenizer/": ("tokenizer_config.json",),
    "scheduler": ("scheduler_config.json",),
}
"""What a pipeline folder holds; any one of the files will do."""


class TextToImage:
    """A StableDiffusionPipeline's parts, with what sampling them needs.

    Latents are scaled (the VAE's `scaling_factor` applied) everywhere outside this class; images are [B, 3, H, W]
    in [-1, 1]; noise has unit variance.
    """

    def __init__(self, pipeline: Any, settings: ModelSettings, name: str) -> None:
        self.unet, self.vae = pipeline.unet, pipeline.vae
        self.text_encoder, self.tokenizer = pipeline.text_encoder, pipeline.tokenizer
        self.scheduler = pipeline.scheduler
        self.settings = settings
        self.name = name
        self.num_truncated = 0
        """How many prompts so far were longer than the tokenizer's length."""
        for part in (self.unet, self.vae, self.text_encoder):
            part.requires_grad_(False).eval()

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

    def view(self) -> View:
        """The network read as a velocity."""
        if self.settings.parametrization == "velocity":
            return VelocityView()
        return EpsilonView(self.scheduler.alphas_cumprod.float(), self.scheduler.config.prediction_type)

    # --- text ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Text embeddings [B, L, D]; a prompt that stands several times is encoded once, a long one cut and counted."""
        unique = list(dict.fromkeys(prompts))
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(unique, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        full = self.tokenizer(unique, truncation=False, verbose=False).input_ids
        too_long = {prompt for prompt, ids in zip(unique, full, strict=True) if len(ids) > length}
        self.num_truncated += sum(prompt in too_long for prompt in prompts)
        mask = tokens.attention_mask if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        embeddings = self.text_encoder(
            tokens.input_ids.to(self.device), attention_mask=mask.to(self.device) if mask is not None else None
        )[0]
        place = {prompt: index for index, prompt in enumerate(unique)}
        return embeddings[[place[prompt] for prompt in prompts]]

    # --- network ------------------------------------------------------------------------------------------------------

    def guided(self, x: Tensor, timestep: Tensor, embeddings: Tensor, guidance_scale: float) -> Tensor:
        """The network's output under classifier-free guidance, out(∅) + g (out(prompt) - out(∅)).

        x: [B, C, H, W]. `embeddings` are [2B, L, D], those of the empty prompt first, where the scale is above 1,
        and otherwise [B, L, D]: then the network is called without guidance.
        """
        if guidance_scale <= 1:
            return self.unet(x, timestep, encoder_hidden_states=embeddings, return_dict=False)[0]
        if timestep.ndim:
            timestep = torch.cat([timestep, timestep])
        both = self.unet(torch.cat([x, x]), timestep, encoder_hidden_states=embeddings, return_dict=False)[0]
        empty, prompted = both.chunk(2)
        return empty + guidance_scale * (prompted - empty)

    def predict(self, x: Tensor, timestep: Tensor, embeddings: Tensor, guidance_scale: float) -> Tensor:
        """`guided` on a float32 state, whatever the network's precision."""
        return self.guided(x.to(self.dtype), timestep, embeddings, guidance_scale).float()

    def conditioning(self, prompts: list[str], guidance_scale: float) -> Tensor:
        """The embeddings that `guided` wants."""
        embeddings = self.encode(prompts)
        if guidance_scale <= 1:
            return embeddings
        return torch.cat([self.encode([""]).expand_as(embeddings), embeddings])

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        prompts: list[str],
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: Any = None,
    ) -> Tensor:
        """Scaled latents [B, C, H, W] of unit-variance noise [B, C, H, W], as stock diffusers would make them.

        The network computes in its own precision, the sampler in float32. Steps and guidance default to what the
        model's folder recommends, the scheduler to the folder's own.
        """
        steps = self.settings.num_steps if num_steps is None else num_steps
        scale = self.settings.guidance_scale if guidance_scale is None else guidance_scale
        own = scheduler or self.scheduler
        scheduler = type(own).from_config(own.config)  # schedulers hold state: one for each call
        scheduler.set_timesteps(steps, device=self.device)
        embeddings = self.conditioning(prompts, scale)
        x = noise.to(self.device, torch.float32) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            output = self.predict(scheduler.scale_model_input(x, timestep), timestep, embeddings, scale)
            x = scheduler.step(output, timestep, x, return_dict=False)[0]
        return x

    @torch.no_grad()
    def trajectory(self, noise: Tensor, prompts: list[str], *, num_steps: int, guidance_scale: float) -> Trajectory:
        """Euler's path of the guided flow from noise [B, C, H, W], for straightness and parity checks."""
        embeddings = self.conditioning(prompts, guidance_scale)

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            return self.predict(x, timestep, embeddings, guidance_scale)

        return euler(self.view(), predict, noise.to(self.device, torch.float32), num_steps)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], float32, of scaled latents [B, C, h, w]."""
        latents = latents.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(latents, return_dict=False)[0].float().clamp(-1, 1)

    @torch.no_grad()
    def round_trip(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1], encoded to the mean of their latents and decoded again, float32."""
        parts = []
        for part in images.split(batch_size):
            means = self.vae.encode(part.to(self.device, self.vae.dtype)).latent_dist.mean
            parts.append(self.decode(means * self.vae.config.scaling_factor).cpu())
        return torch.cat(parts)


def load_model(place: str | Path, *, device: torch.device, dtype: torch.dtype = torch.float32) -> TextToImage:
    """Load a pipeline folder, or a hub model by name. Raises DataError if it is not a Stable Diffusion pipeline."""
    folder = Path(place)
    if folder.is_dir():
        check_pipeline_folder(folder)
    elif folder.exists() or len(folder.parts) != 2:
        raise DataError(f"There is no model folder '{place}'", "A model is a diffusers pipeline folder or a hub name")
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(place),
            dtype=dtype,
            low_cpu_mem_usage=False,  # its other way needs one more library
            safety_checker=None,
            requires_safety_checker=False,
            local_files_only=folder.is_dir(),
        )
    except Exception as error:  # diffusers, transformers and safetensors each raise their own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = (
            "Restore the missing file, or make the model's stage again"
            if folder.is_dir()
            else "There is no such folder; a hub name needs network, or a model downloaded before"
        )
        raise DataError(f"The model '{place}' cannot be loaded: {reason}", hint) from error
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.to(device)
    return TextToImage(pipeline, read_settings(folder) if folder.is_dir() else ModelSettings(), str(place))


def check_pipeline_folder(folder: Path) -> None:
    """Raises DataError unless `folder` holds a StableDiffusionPipeline."""
    index = folder / "model_index.json"
    if not index.is_file():
        inside = folder / "model" / "model_index.json"
        hint = (
            f"Did you mean '{folder / 'model'}'?" if inside.is_file() else "A diffusers pipeline folder holds that file"
        )
        raise DataError(f"'{folder}' is no pipeline folder: it has no model_index.json", hint)
    try:
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise DataError(f"'{index}' is damaged: {error}", "Restore the file from where the model came from") from error
    if name != "StableDiffusionPipeline":
        raise DataError(f"'{folder}' holds a {name}; a StableDiffusionPipeline is needed")
    for part, choices in PARTS.items():
        # Without them, transformers makes up a tokenizer or a text encoder and says nothing.
        if not any((folder / part / file).is_file() for file in choices):
            raise DataError(
                f"'{folder / part}' has no {' or '.join(choices)}",
                "Restore the missing file, or make the model's stage again",
            )


def coupling_scheduler(model: TextToImage, timestep_spacing: str | None) -> Any:
    """The deterministic sampler that couples noise with a model's images.

    A flow brings its own. A diffusion teacher is sampled by DPM-Solver++ (multistep, second order) on its own noise
    schedule, with the spacing pinned: "trailing" begins at the last timestep, whose input the noise is.
    """
    if model.settings.kind != "teacher":
        return model.scheduler
    return DPMSolverMultistepScheduler.from_config(
        model.scheduler.config,
        timestep_spacing=timestep_spacing or "trailing",
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        use_lu_lambdas=False,
        use_flow_sigmas=False,
        thresholding=False,
    )


def flow_scheduler(parametrization: str, teacher: Any) -> Any:
    """The stock scheduler that a flow's folder carries: one of its steps is an Euler step of the flow."""
    if parametrization == "velocity":
        return DPMSolverMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            solver_order=1,
            final_sigmas_type="zero",
            steps_offset=1,  # no matter with these sigmas, but the pipeline insists
        )
    return DDIMScheduler.from_config(
        teacher.config,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        thresholding=False,
    )


def negate_output(unet: nn.Module) -> None:
    """Turn the sign of a U-Net's output, in place, by its last convolution."""
    with torch.no_grad():
        for parameter in unet.conv_out.parameters():  # type: ignore[union-attr]
            parameter.neg_()
