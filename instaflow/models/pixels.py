"""A model of pixels: an EDM's network (Karras et al. 2022, arXiv 2206.00364), with classes for prompts or without."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from instaflow.errors import DataError
from instaflow.flow.views import EdmView
from instaflow.models.model import Embedded, Model, Text
from instaflow.models.settings import ModelSettings


class PixelModel(Model):
    """A UNet2DModel and an EDM's scheduler. Its latents are the pixels, in [-1, 1].

    A prompt is a class, by its number or by the name that the model's folder gives it; where the network knows no
    classes it is empty, or none at all.
    """

    def __init__(self, pipeline: Any, settings: ModelSettings, name: str) -> None:
        super().__init__(pipeline, settings, name)
        self.num_classes: int = self.unet.config.num_class_embeds or 0
        """0 for a network without classes."""
        self.numbers = {str(number): number for number in range(self.num_classes)}
        """Of each prompt that there is."""
        self.numbers |= {name: number for number, name in enumerate(settings.class_names) if name not in self.numbers}
        self.any_prompt = "0" if self.num_classes else ""

    @property
    def parts(self) -> dict[str, Any]:
        return {"unet": self.unet}

    @property
    def image_size(self) -> tuple[int, int]:
        return self.latent_shape[1:]

    def view(self) -> EdmView:
        config = self.scheduler.config
        return EdmView(config.sigma_data, config.sigma_min, config.sigma_max, config.rho)

    # --- classes ------------------------------------------------------------------------------------------------------

    def embed(self, prompts: Sequence[str | None]) -> Embedded:
        """The classes' numbers [B]; zeros where the network knows no classes."""
        numbers = [self.number_of(prompt) for prompt in prompts]
        return torch.tensor(numbers).to(self.device, non_blocking=True), None

    def number_of(self, prompt: str | None) -> int:
        """Raises DataError for a prompt that is no class."""
        if not self.num_classes:
            if not prompt:
                return 0
            raise DataError(
                f"'{self.name}' draws without any prompt, and {prompt!r} is one", 'Write "" for each prompt'
            )
        if prompt is None:
            raise DataError(
                f"'{self.name}' knows images of a class alone, and none without",
                "So it is sampled without guidance: guidance_scale 1; and trained without caption_dropout: 0",
            )
        if prompt not in self.numbers:
            names = f", or its name, such as {self.settings.class_names[0]!r}" if self.settings.class_names else ""
            raise DataError(
                f"{prompt!r} is no class of '{self.name}'",
                f"A prompt is the class's number, 0 to {self.num_classes - 1}{names}",
            )
        return self.numbers[prompt]

    def arguments(self, hidden: Tensor, pooled: Tensor | None) -> Text:
        return {"class_labels": hidden} if self.num_classes else {}

    def joined(self, no_prompt: Embedded | None, prompted: Embedded) -> Text:
        """The classes. Raises DataError where guidance is asked for, which an EDM's network does not know."""
        if no_prompt is not None:
            raise DataError(f"'{self.name}' has no prompt to be guided by", "Write guidance_scale: 1")
        return super().joined(no_prompt, prompted)
