"""What reflow and distillation minimise. Each is a module whose forward takes a batch of couplings to its mean loss."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from instaflow.flow.paths import velocity
from instaflow.flow.views import View
from instaflow.training.figures import LossByTime

Encode = Callable[[Sequence[str | None]], dict[str, Any]]
"""Prompts, or None for no prompt, to the network's arguments, by the frozen text encoder."""


class ReflowLoss(nn.Module):
    """E ||(data - noise) - v(x_t, t | prompt)||² over couplings, t uniform (InstaFlow, Eq. 5).

    A share `caption_dropout` of the prompts is left out, so that the unguided branch stays trained.
    """

    def __init__(self, unet: nn.Module, view: View, encode: Encode, caption_dropout: float) -> None:
        super().__init__()
        self.unet, self.view, self.encode, self.caption_dropout = unet, view, encode, caption_dropout
        self.by_time = LossByTime()

    def forward(self, noise: Tensor, data: Tensor, prompts: list[str], draws: np.ndarray) -> Tensor:
        """Scalar. noise, data: [B, C, H, W]; draws: [B, >= 2], the time's and the dropout's uniform numbers."""
        kept = [None if u < self.caption_dropout else prompt for u, prompt in zip(draws[:, 1], prompts, strict=True)]
        t = self.view.time(torch.as_tensor(draws[:, 0], dtype=torch.float32, device=noise.device))
        x, timestep = self.view.point(noise, data, t)
        output = self.unet(x, timestep, **self.encode(kept), return_dict=False)[0]
        squares = (self.view.velocity(x, timestep, output) - velocity(noise, data)).square()
        self.by_time.add(t, squares.detach().mean((1, 2, 3)))
        return squares.mean()


class DistillLoss(nn.Module):
    """E ||data - student(noise | prompt)||² over couplings: the student is one step of the flow (InstaFlow, Eq. 6)."""

    def __init__(self, unet: nn.Module, view: View, encode: Encode) -> None:
        super().__init__()
        self.unet, self.view, self.encode = unet, view, encode
        self.first_timestep = int(view.grid(1)[0])

    def forward(self, noise: Tensor, data: Tensor, prompts: list[str], draws: np.ndarray) -> Tensor:
        """Scalar. noise, data: [B, C, H, W]; `draws` is not needed."""
        timestep = torch.full((len(noise),), self.first_timestep, device=noise.device)
        output = self.unet(noise, timestep, **self.encode(prompts), return_dict=False)[0]
        return (self.view.one_step(noise, output) - data).square().mean()
