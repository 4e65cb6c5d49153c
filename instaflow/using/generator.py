"""A model that draws: prompts and seeds or noise in, images out. What `instaflow.load` gives, and `sample` uses."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from instaflow.errors import ConfigError, InstaFlowError
from instaflow.image_files import fitted_pixels
from instaflow.models.device import device as own_device
from instaflow.models.loading import DTYPES, load_model
from instaflow.models.model import Model
from instaflow.models.safety import SafetyChecker, checker_of
from instaflow.models.sampling import Sampling, fetched
from instaflow.plurals import counted
from instaflow.prompt_sources import check_text
from instaflow.sections import Dtype
from instaflow.using.seeds import Seeds, noise_of

PIXELS = 1 << 21  # that a VAE decodes at a time: eight images of 512×512
STEPS = 1000  # a schedule has so many timesteps


def load(
    place: str | Path,
    *,
    device: str | None = None,
    dtype: Dtype = "float32",
    batch_size: int = 64,
    safety_checker: bool = True,
) -> "Generator":
    """The model in a folder, a .safetensors file or under a hub name. Raises DataError, ConfigError."""
    if dtype not in DTYPES:
        raise ConfigError(f"There is no precision {dtype!r}", f"Choose one of {', '.join(DTYPES)}")
    try:
        where = own_device() if device is None else torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # PyTorch built without it raises the latter
        hint = "PyTorch calls them cpu, cuda, cuda:1, mps"
        raise ConfigError(f"There is no device {device!r} here", hint) from error
    model = load_model(place, device=where, dtype=DTYPES[dtype])
    checker = checker_of(str(place), where) if safety_checker else None
    return Generator(model, batch_size=batch_size, checker=checker)


class Generator:
    """A model with all that drawing takes.

    `settings` is what its folder says of it, `latent_shape` the (C, H, W) of a noise or latent, `image_size` the (H, W)
    of an image in pixels, `model` the networks, `checker` the folder's safety checker, if it has one, which blackens
    what it takes for unsafe. Every image is else a function of prompt, noise, steps and guidance: not of
    the images beside it, but for rounding in the last bits, which depends on how many are computed at a time.
    """

    def __init__(self, model: Model, batch_size: int = 64, checker: SafetyChecker | None = None) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}", "It is how many images are drawn at a time: 1 or more")
        self.model, self.batch_size, self.checker = model, batch_size, checker
        self.settings, self.latent_shape, self.image_size = model.settings, model.latent_shape, model.image_size
        self.num_blackened = 0
        """Images that the safety checker took for unsafe so far."""
        self._sampling: Sampling | None = None

    def __repr__(self) -> str:
        height, width = self.image_size
        steps, scale = counted(self.settings.num_steps, "step"), self.settings.guidance_scale
        return f"<{self.model.name!r}: {height}×{width} pixels in {steps}, guidance {scale:g}>"

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: Seeds | None = None,
        noise: Tensor | np.ndarray | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[Image.Image]:
        """One image for each prompt and its seed; one prompt goes with many seeds, one seed with many prompts.

        seeds: numbers from 0 on. Seed s is the noise of the first image of `instaflow sample --seed s`; the pair
        (s, i) is that of its image i, from 0. Without seeds image i has (0, i), as `sample` without --seed.
        noise: in place of seeds, [N, C, H, W] or for one image [C, H, W], float32 of unit variance. num_steps: 1 to
        1000; guidance_scale: 1 or less for none. Both default to what the model's folder recommends.

        Raises ConfigError for what does not fit together, DataError for a prompt that the model does not know,
        InstaFlowError where the latents are not finite.
        """
        texts, start = self._paired(prompts, seeds, noise)
        waiting, sound = [], []
        for latents in self._batches(texts, start, num_steps, guidance_scale):
            sound.append(torch.isfinite(latents).all())
            waiting.append(self._begun(latents))
        self._check_finite(sound)
        return [image for wait in waiting for image in wait()]

    def latents(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: Seeds | None = None,
        noise: Tensor | np.ndarray | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """What a call decodes: scaled latents [N, C, h, w], float32, on the model's device.

        They are in the scale of the U-Net, the VAE's `scaling_factor` applied, as stock pipelines give and take them
        (`output_type="latent"`, and as the `image` of image-to-image).
        """
        texts, start = self._paired(prompts, seeds, noise)
        latents = torch.cat(list(self._batches(texts, start, num_steps, guidance_scale)))
        self._check_finite([torch.isfinite(latents).all()])
        return latents

    def noise(self, seeds: Seeds) -> Tensor:
        """The noises of seeds, [N, C, H, W] float32: the same bits on every machine."""
        many = list(seeds) if isinstance(seeds, Iterable) else [seeds]
        if not many:
            raise ConfigError("There is no seed", "Give at least one")
        return torch.from_numpy(noise_of(many, self.latent_shape))

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Images of scaled latents [N, C, h, w]. Raises InstaFlowError where they are not finite."""
        self._check_finite([torch.isfinite(latents).all()])
        return [image for part in latents.split(self.batch_size) for image in self._begun(part)()]

    def encode(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Scaled latents [N, C, h, w], float32, of images of any size: their middle, scaled to the model's size."""
        many = [images] if isinstance(images, Image.Image) else images
        pixels = np.stack([fitted_pixels(image, self.image_size) for image in many])
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.model.encode_images(values.to(self.model.device), self._decoded_at_a_time)

    def blended(
        self,
        prompts: tuple[str, str],
        shares: Sequence[float],
        *,
        noise: Tensor,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Latents [N, C, h, w] on the way between two prompts: (1 - s) of the first's embedding and s of the second's.

        shares: N numbers s, 0 for the first prompt; noise: [N, C, H, W] or [1, C, H, W] for all. Raises ConfigError for
        a model whose prompts are classes, InstaFlowError where the latents are not finite.
        """
        sampling = self.sampling(num_steps, guidance_scale)
        hidden, pooled = self.model.embed(prompts)
        if not hidden.is_floating_point():
            raise ConfigError(f"The prompts of '{self.model.name}' are classes, which have nothing between them")
        start = as_values(noise, self.latent_shape, "noises").expand(len(shares), -1, -1, -1)
        parts = []
        for batch in self._cut(len(shares)):
            rows = [mixed(one, shares[batch]) for one in (hidden, pooled) if one is not None]
            parts.append(sampling.of_embedded(start[batch], (rows[0], rows[1] if pooled is not None else None)).latents)
        self._check_finite([torch.isfinite(part).all() for part in parts])
        return torch.cat(parts)

    def invert(
        self, latents: Tensor, prompts: str | Sequence[str], *, num_steps: int = 25, guidance_scale: float = 1.0
    ) -> Tensor:
        """The noise [N, C, H, W], float32, from which the flow of this model comes to scaled latents [N, C, h, w].

        By Heun's method backwards in `num_steps` steps, two calls of the network each. It is the model's flow that is
        followed: take a teacher or a rectified flow for it, not a student of one step, which is right at noise alone.
        Prompts: one for each latent, or one for all.
        """
        texts, values = paired(texts_of(prompts), as_values(latents, self.latent_shape, "latents"), "latents")
        steps, scale = checked(num_steps, guidance_scale)
        parts = (
            self.model.inverted(values[batch], texts[batch], num_steps=steps, guidance_scale=scale)
            for batch in self._cut(len(texts))
        )
        return torch.cat(list(parts))

    # --- inside -------------------------------------------------------------------------------------------------------

    def sampling(self, num_steps: int | None = None, guidance_scale: float | None = None) -> Sampling:
        """What samples with these steps and this guidance, or with the folder's. Raises ConfigError."""
        steps = self.settings.num_steps if num_steps is None else num_steps
        scale = self.settings.guidance_scale if guidance_scale is None else guidance_scale
        steps, scale = checked(steps, scale)
        kept = self._sampling
        if kept is None or (kept.num_steps, kept.guidance_scale) != (steps, scale):
            self._sampling = kept = Sampling(self.model, num_steps=steps, guidance_scale=scale)
        return kept

    def _batches(
        self, prompts: list[str], noise: Tensor, num_steps: int | None, guidance_scale: float | None
    ) -> Iterator[Tensor]:
        """The latents, batch by batch."""
        sampling = self.sampling(num_steps, guidance_scale)
        for batch in self._cut(len(prompts)):
            yield sampling(noise[batch], prompts[batch])

    def _cut(self, count: int) -> Iterator[slice]:
        return (slice(start, start + self.batch_size) for start in range(0, count, self.batch_size))

    @property
    def _decoded_at_a_time(self) -> int:
        height, width = self.image_size
        return max(1, PIXELS // (height * width))

    def _begun(self, latents: Tensor) -> Callable[[], list[Image.Image]]:
        """Begin to decode latents; what waits for the images."""
        wait = fetched(self.model.pictures(latents, self._decoded_at_a_time))
        return lambda: [Image.fromarray(pixels) for pixels in self._checked(wait())]

    def _checked(self, pixels: np.ndarray) -> np.ndarray:
        if self.checker is not None:
            pixels, blackened = self.checker(pixels)
            self.num_blackened += blackened
        return pixels

    def _check_finite(self, sound: Iterable[Tensor]) -> None:
        if not all(bool(one) for one in sound):
            raise InstaFlowError(f"'{self.model.name}' gave latents that are not finite", "Try fewer or more num_steps")

    def _paired(
        self, prompts: str | Sequence[str], seeds: Seeds | None, noise: Tensor | np.ndarray | None
    ) -> tuple[list[str], Tensor]:
        """A prompt and a noise for each image. Raises ConfigError."""
        texts = texts_of(prompts)
        if noise is not None and seeds is not None:
            raise ConfigError("Both seeds and noise are given", "A seed stands for a noise: leave one of them out")
        if noise is not None:
            return paired(texts, as_values(noise, self.latent_shape, "noises"), "noises")
        return paired(
            texts, self.noise([(0, place) for place in range(len(texts))] if seeds is None else seeds), "seeds"
        )


def texts_of(prompts: str | Sequence[str]) -> list[str]:
    """Prompts as a list. Raises ConfigError where there is none, or one is no text."""
    texts = list(prompts) if isinstance(prompts, Iterable) and not isinstance(prompts, str) else [prompts]
    if not texts:
        raise ConfigError("There is no prompt", 'Give at least one; "" is the empty one')
    for place, text in enumerate(texts):
        if text is None:
            raise ConfigError(f"prompt {place} must be a text, not None", 'The empty one is ""')
        check_text(text, f"prompt {place}")
    return texts


def paired(texts: list[str], values: Tensor, what: str) -> tuple[list[str], Tensor]:
    """As many prompts as rows [N, C, H, W]; a single one of either goes with all of the other. Raises ConfigError."""
    count = max(len(texts), len(values))
    if not {len(texts), len(values)} <= {1, count}:
        raise ConfigError(
            f"There are {len(texts)} prompts and {len(values)} {what}",
            "Give one for each image, or a single one for all",
        )
    return texts * (count // len(texts)), values.expand(count, -1, -1, -1)


def as_values(given: Tensor | np.ndarray, shape: tuple[int, int, int], what: str) -> Tensor:
    """Noise or latents as float32 [N, C, H, W]. Raises ConfigError."""
    values = given if isinstance(given, Tensor) else torch.tensor(np.asarray(given))
    values = values[None] if values.ndim == 3 else values
    if values.dtype != torch.float32:
        kind = str(values.dtype).removeprefix("torch.")
        message = f"The {what} are of {kind}; float32 is needed: they are used bit by bit as they stand"
        raise ConfigError(message, "Convert them")
    if values.ndim != 4 or tuple(values.shape[1:]) != shape or not len(values):
        wanted = ", ".join(map(str, ("N", *shape)))
        raise ConfigError(f"The {what} have the shape {tuple(values.shape)}", f"This model's is ({wanted})")
    if not torch.isfinite(values).all():
        raise ConfigError(f"The {what} are not finite", "Draw them anew")
    return values


def mixed(pair: Tensor, shares: Sequence[float]) -> Tensor:
    """(1 - s) of the first and s of the second of two embeddings [2, ...], for each of N shares: [N, ...]."""
    weights = torch.tensor(shares).view(-1, *[1] * (pair.ndim - 1)).to(pair)
    return (1 - weights) * pair[:1] + weights * pair[1:]


def checked(num_steps: int, guidance_scale: float) -> tuple[int, float]:
    """Raises ConfigError for steps or a guidance that no sampler has."""
    if not isinstance(num_steps, int) or not 1 <= num_steps <= STEPS:
        raise ConfigError(f"num_steps must be a whole number from 1 to {STEPS}, not {num_steps!r}", "Try, say, 4")
    if not math.isfinite(guidance_scale) or guidance_scale < 0:
        raise ConfigError(f"guidance_scale must be a finite number from 0 on, not {guidance_scale}", "Try, say, 1.5")
    return num_steps, float(guidance_scale)
