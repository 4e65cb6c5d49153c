"""Models that draw for a server, one step at a time."""

import io
from collections.abc import Generator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from instaflow.errors import InstaFlowError
from instaflow.flow.paths import slerp
from instaflow.models.device import device
from instaflow.models.drawing import Drawing, can_record
from instaflow.models.loading import load_model
from instaflow.models.model import Model
from instaflow.models.pixels import PixelModel
from instaflow.models.safety import SafetyChecker, checker_of, told_of
from instaflow.models.sampling import Sampling
from instaflow.models.settings import note_on_guidance
from instaflow.models.text_to_image import TextToImage
from instaflow.places import short_names
from instaflow.serving.painter import Images, Offer
from instaflow.serving.requests import ImageRequest
from instaflow.serving.turns import FEW
from instaflow.using.metadata import About, Drawn
from instaflow.using.seeds import noise_of as seeded
from instaflow.using.seeds import written

KEPT = 8
"""Pairs of steps and guidance whose sampling is kept ready."""


class Models:
    """A Painter of models by their short names."""

    def __init__(self, places: Sequence[str], safety_checker: bool = True) -> None:
        self.models = {
            name: Ready(
                load_model(place, device=device()),
                name,
                place,
                checker_of(place, device()) if safety_checker else None,
            )
            for name, place in zip(short_names(places), places, strict=True)
        }
        self.offers = [ready.offer for ready in self.models.values()]

    def draw(self, model: str, asked: ImageRequest) -> Generator[None, None, Images]:
        return self.models[model].draw(asked)

    def try_all(self) -> None:
        """Draw once with each, so that the first request finds it ready, and a model that cannot is told at once."""
        for ready in self.models.values():
            steps = ready.offer.num_steps if ready.offer.num_steps <= FEW else 1
            for _ in ready.draw(ImageRequest(prompt=ready.model.any_prompt, num_steps=steps)):
                pass


class Ready:
    """One model, with what was made ready for the settings asked for last."""

    def __init__(self, model: Model, name: str, place: str, checker: SafetyChecker | None = None) -> None:
        self.place, self.checker = place, checker
        model.name = name  # which messages call it by
        self.model, self.offer = model, offer_of(model, name)
        self.samplings: dict[tuple[int, float], Sampling] = {}
        self.drawing: Drawing | None = None

    def draw(self, asked: ImageRequest) -> Generator[None, None, Images]:
        """A pause after each step. Raises DataError for a prompt that is no class, InstaFlowError."""
        model, settings = self.model, self.model.settings
        steps = asked.num_steps or settings.num_steps
        scale = settings.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
        noise = noise_of(asked, model.latent_shape)
        truncated = isinstance(model, TextToImage) and is_cut(model, asked.prompt)
        recommended = (steps, scale) == (settings.num_steps, settings.guidance_scale)
        at_once = recommended and steps <= FEW and can_record(model.scheduler, steps)
        if isinstance(model, TextToImage) and at_once and len(noise) == 1:
            drawing = self.drawing = self.drawing or Drawing(model, 1, compiled=False)
            embedded = drawing.encode(*model.tokens([asked.prompt]))
            latents, decode = drawing.sample(noise.to(model.device), *embedded), drawing.decode
        else:
            latents, decode = noise, model.pictures
            for latents in self.sampling(steps, scale).steps(noise, [asked.prompt] * len(noise)):  # noqa: B007
                if model.device.type == "cuda":
                    torch.cuda.synchronize()  # or all steps would be queued at once, and a pause be none
                yield
        if not torch.isfinite(latents).all():
            raise InstaFlowError(f"'{model.name}' gave latents that are not finite", "Try fewer or more num_steps")
        pixels, blackened = decode(latents).cpu().numpy(), 0
        if self.checker is not None:
            pixels, blackened = self.checker(pixels)
        images = [png(one, self.about(asked, seed, steps, scale)) for one, seed in zip(pixels, asked.many, strict=True)]
        notes = [
            told_of(blackened) if blackened else "",
            note_on_guidance(model.name, settings.kind, settings.guidance_scale, scale),
        ]
        return Images(images, steps, scale, truncated, "; ".join(filter(None, notes)))

    def about(self, asked: ImageRequest, seed: int, steps: int, scale: float) -> About:
        """How one image was drawn."""
        drawn = Drawn(asked.prompt, written(seed))
        if asked.seed_to is not None:
            drawn = Drawn(asked.prompt, None, (written(seed), written(asked.seed_to)), asked.position)
        return About([self.place], [steps], [scale], str(self.model.dtype).removeprefix("torch."), [drawn])

    def sampling(self, steps: int, scale: float) -> Sampling:
        key = (steps, scale)
        if key not in self.samplings:
            if len(self.samplings) == KEPT:
                del self.samplings[next(iter(self.samplings))]
            self.samplings[key] = Sampling(self.model, num_steps=steps, guidance_scale=scale)
        return self.samplings[key]


def offer_of(model: Model, name: str) -> Offer:
    settings, (height, width) = model.settings, model.image_size
    is_text = isinstance(model, TextToImage)
    return Offer(
        name=name,
        kind=settings.kind,
        num_steps=settings.num_steps,
        guidance_scale=settings.guidance_scale,
        prompts="text" if is_text else "class" if model.any_prompt else "none",
        classes=list(model.numbers) if isinstance(model, PixelModel) else [],
        width=width,
        height=height,
        max_tokens=model.tokenizer.model_max_length if isinstance(model, TextToImage) else None,
    )


def noise_of(asked: ImageRequest, shape: tuple[int, int, int]) -> Tensor:
    """The noises [N, C, H, W] of unit variance: a seed's is that of the first image of `instaflow sample --seed`."""
    if asked.seed_to is not None and asked.position is not None:
        start, end = torch.from_numpy(seeded([asked.seed, asked.seed_to], shape)).split(1)
        return slerp(start, end, asked.position)
    return torch.from_numpy(seeded(asked.many, shape))


def is_cut(model: TextToImage, prompt: str) -> bool:
    """Whether a prompt is longer than the tokenizer's length."""
    before = model.num_truncated
    model.count_truncated([prompt])
    return model.num_truncated > before


def png(pixels: np.ndarray, about: About) -> bytes:
    """A PNG file of pixels [H, W, 3], uint8, that tells how they were drawn."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", pnginfo=about.chunk(), compress_level=1)
    return content.getvalue()
