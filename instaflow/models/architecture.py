"""The networks of a Stable Diffusion or an EDM by their configuration alone: what they need, without weights.

Networks are built of shapes only: on PyTorch's meta device, where operations are counted, and as its fake tensors,
where memory is; both are as large as real ones and hold nothing.
"""

import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from instaflow.errors import DataError
from instaflow.models.samplers import flow_scheduler
from instaflow.models.settings import ModelSettings, read_settings
from instaflow.models.stacked import StackedUNet
from instaflow.places import is_of_pixels, is_released, pipeline_class

Config = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Architecture:
    """The configurations of a pipeline's parts, as its files hold them."""

    unet: Config
    vae: Config | None
    """None for a model of pixels, an EDM."""
    text_encoders: tuple[Config, ...]
    """One, or Stable Diffusion XL's two, the second with a projection; none for a model of pixels."""
    scheduler: Config
    """With `_class_name`."""
    settings: ModelSettings = field(default_factory=ModelSettings)

    @property
    def is_xl(self) -> bool:
        return len(self.text_encoders) > 1

    @property
    def is_edm(self) -> bool:
        return self.vae is None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one noise or latent."""
        size = self.unet["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return (self.unet.get("in_channels", 4), height, width)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of an image in pixels."""
        scale = 2 ** (len(self.vae["block_out_channels"]) - 1) if self.vae else 1
        _, height, width = self.latent_shape
        return (scale * height, scale * width)

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """(L, D) of a prompt's embedding; a class has none."""
        if self.is_edm:
            return (0, 0)
        return (self.text_encoders[0].get("max_position_embeddings", 77), self.unet["cross_attention_dim"])

    @property
    def pooled_size(self) -> int:
        """P of a prompt's pooled embedding; 0 where there is none."""
        return self.text_encoders[1]["projection_dim"] if self.is_xl else 0

    # --- networks -----------------------------------------------------------------------------------------------------

    @property
    def unet_class(self) -> Any:
        if self.is_edm:
            return UNet2DModel
        return StackedUNet if self.unet.get("_class_name") == StackedUNet.__name__ else UNet2DConditionModel

    def stacked(self) -> "Architecture":
        """The same with two U-Nets in series."""
        return replace(self, unet=self.unet | {"_class_name": StackedUNet.__name__})

    def build_unet(self) -> Any:
        return self.unet_class.from_config(self.unet)

    def build_vae(self) -> Any:
        """The autoencoder; a network of nothing for a model of pixels."""
        return AutoencoderKL.from_config(self.vae) if self.vae else Pixels()

    def build_text_encoders(self) -> list[Any]:
        classes: tuple[Any, ...] = (CLIPTextModel, CLIPTextModelWithProjection)
        return [kind(CLIPTextConfig(**config)) for kind, config in zip(classes, self.text_encoders, strict=False)]

    def text(self, batch: int) -> dict[str, Any]:
        """Prompts as the network takes them, by their shapes alone."""
        if self.is_edm:
            return {"class_labels": torch.zeros(batch, dtype=torch.long)} if self.unet.get("num_class_embeds") else {}
        hidden = torch.empty(batch, *self.embedding_shape)
        if not self.is_xl:
            return {"encoder_hidden_states": hidden}
        pooled, times = torch.empty(batch, self.pooled_size), torch.empty(batch, 6)
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}

    # --- counts -------------------------------------------------------------------------------------------------------

    @cache  # noqa: B019 - an experiment has a handful
    def parameters(self) -> dict[str, int]:
        """The parameters of "unet", "vae" and "text"."""
        with torch.device("meta"):
            parts = {"unet": [self.build_unet()], "vae": [self.build_vae()], "text": self.build_text_encoders()}
        return {name: sum(map(num_parameters, networks)) for name, networks in parts.items()}

    @cache  # noqa: B019
    def flops(self) -> dict[str, int]:
        """Floating-point operations, for one record, of "unet", "text", "encode" and "decode" (the VAE's halves)."""
        height, width = self.image_size
        with torch.device("meta"):
            vae, encoders = self.build_vae(), self.build_text_encoders()
            image, latent = torch.empty(1, 3, height, width), torch.empty(1, *self.latent_shape)
            ids = torch.zeros(1, self.embedding_shape[0], dtype=torch.long)
        return {
            "unet": unet_flops(self.unet_class, self.unet, self.latent_shape, self.text(1)),
            "text": flops_of(lambda: [encoder(ids) for encoder in encoders]),
            "encode": flops_of(lambda: vae.encode(image)),
            "decode": flops_of(lambda: vae.decode(latent)),
        }

    @cache  # noqa: B019
    def training_memory(self, batch: int, *, bfloat16: bool = False, checkpointing: bool = False) -> int:
        """Bytes alive at the highest moment of a U-Net's forward and backward pass, besides weights and gradients."""

        def build() -> Any:
            unet = self.build_unet()
            if checkpointing:
                unet.enable_gradient_checkpointing()
            return unet

        def work(unet: Any) -> Tensor:
            noise, timestep = torch.empty(batch, *self.latent_shape), torch.zeros(batch)
            return unet(noise, timestep, **self.text(batch), return_dict=False)[0]

        return backward_memory(build, work, bfloat16=bfloat16)

    @cache  # noqa: B019
    def autoencoder_memory(self, batch: int, *, bfloat16: bool = False) -> int:
        """The same of the VAE's way there and back."""

        def work(vae: Any) -> Tensor:
            posterior = vae.encode(torch.empty(batch, 3, *self.image_size)).latent_dist
            return vae.decode(posterior.mean).sample

        return backward_memory(self.build_vae, work, bfloat16=bfloat16)

    @cache  # noqa: B019
    def perceptual_memory(
        self, batch: int, *, bfloat16: bool = False, checkpointing: bool = False, crop: int | None = None
    ) -> int:
        """The same of the VAE's frozen decoder alone, for latents of `crop` cells a side."""
        channels, *sides = self.latent_shape
        height, width = [crop, crop] if crop else sides

        def work(vae: Any) -> Tensor:
            return vae.decode(torch.empty(batch, channels, height, width, requires_grad=True)).sample

        def build() -> Any:
            vae = self.build_vae().requires_grad_(False)
            if checkpointing and not self.is_edm:
                vae.enable_gradient_checkpointing()
            return vae

        return backward_memory(build, work, bfloat16=bfloat16)

    @cache  # noqa: B019
    def sampling_memory(self, batch: int, dtype: torch.dtype) -> int:
        """Bytes alive at the highest moment of a call of the U-Net without gradient, besides its weights."""
        with FakeTensorMode(), torch.no_grad(), default_dtype(dtype):
            unet, text = self.build_unet(), self.text(batch)
            noise, timestep = torch.empty(batch, *self.latent_shape), torch.zeros(batch)
            return peak_memory(lambda: unet(noise, timestep, **text))

    @cache  # noqa: B019
    def decoding_memory(self, batch: int, dtype: torch.dtype) -> int:
        """The same of the VAE's decoder."""
        with FakeTensorMode(), torch.no_grad(), default_dtype(dtype):
            vae, latents = self.build_vae(), torch.empty(batch, *self.latent_shape)
            return peak_memory(lambda: vae.decode(latents))


class Pixels(nn.Module):
    """In an autoencoder's place where latents are the pixels."""

    def encode(self, images: Tensor) -> Any:
        return images

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=latents)


def read_architecture(folder: Path) -> Architecture:
    """The architecture that a pipeline's folder describes; its weights need not be there. Raises DataError."""
    if is_of_pixels(folder):
        unet, scheduler = (
            read_config(folder / part) for part in ("unet/config.json", "scheduler/scheduler_config.json")
        )
        return Architecture(unet, None, (), scheduler, read_settings(folder))
    second = ["text_encoder_2"] if pipeline_class(folder) == "StableDiffusionXLPipeline" else []
    unet, vae, scheduler, *encoders = (
        read_config(folder / part / name)
        for part, name in [
            ("unet", "config.json"),
            ("vae", "config.json"),
            ("scheduler", "scheduler_config.json"),
            *((part, "config.json") for part in ("text_encoder", *second)),
        ]
    )
    if is_released(folder):
        scheduler = velocity_sampler()
    return Architecture(unet, vae, tuple(encoders), scheduler, read_settings(folder))


def velocity_sampler() -> Config:
    """The configuration of a velocity flow's scheduler."""
    scheduler = flow_scheduler("velocity", None)
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def read_config(file: Path) -> Config:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"'{file}' cannot be read: {error}", "Restore it from where the model came from") from error


# --- counting ---------------------------------------------------------------------------------------------------------


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def unet_flops(kind: Any, config: Config, latent_shape: tuple[int, int, int], text: dict[str, Any]) -> int:
    """Floating-point operations of one call of a U-Net of some class for one record, with the text of one prompt."""
    text = on_meta(text)
    with torch.device("meta"):
        unet = kind.from_config(config)
        noise, timestep = torch.empty(1, *latent_shape), torch.tensor(0)
    return flops_of(lambda: unet(noise, timestep, **text))


def on_meta(values: Any) -> Any:
    """The same tensors without their values, numbers in float32."""
    if isinstance(values, dict):
        return {key: on_meta(value) for key, value in values.items()}
    return values.to("meta", torch.float32 if values.is_floating_point() else values.dtype)


def flops_of(work: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention, a multiplication and an addition each
    counted as one."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, for as long as they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        given = {storage_of(value) for value in tree_leaves((arguments, keywords)) if isinstance(value, Tensor)}
        result = function(*arguments, **(keywords or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and (place := storage_of(value)) not in self.known | given:
                storage = value.untyped_storage()
                self.known.add(place)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, place, storage.nbytes())
        return result

    def forget(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def storage_of(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def peak_memory(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by `work` take at a time."""
    with Alive() as alive:
        work()
    return alive.peak


def backward_memory(build: Callable[[], Any], work: Callable[[Any], Tensor], *, bfloat16: bool) -> int:
    """Bytes alive at the highest moment of a network's forward and backward pass, besides weights and gradients.

    Counted as the operations run on a CPU, one by one, attention without its matrix (as PyTorch's kernels have it on a
    GPU too). In bfloat16 the weights' copies in it are part of it.
    """
    with FakeTensorMode():
        network = build()
        network.train()
        for parameter in filter(lambda parameter: parameter.requires_grad, network.parameters()):
            parameter.register_post_accumulate_grad_hook(drop_gradient)

        def both() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = work(network).float().square().mean()
            loss.backward()

        return peak_memory(both)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors of this kind."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
