"""What reflow and distillation minimise. Each is a module whose forward takes a batch of couplings to its mean loss."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from instaflow.flow.densities import DENSITIES
from instaflow.flow.paths import velocity
from instaflow.flow.views import NUM_TIMESTEPS, EpsilonView, View
from instaflow.sections import FlowPhase, Loss
from instaflow.stages import TimeDensity
from instaflow.training.draws import DROPOUT, TIME
from instaflow.training.figures import LossByTime
from instaflow.training.perceptual import PerceptualDistance

Encode = Callable[[Sequence[str | None]], dict[str, Any]]
"""Prompts, or None for no prompt, to the network's arguments, by the frozen text encoder."""
HUBER = 0.00054
"""c of the pseudo-Huber loss for each of a sample's values (2-rectified flow++, arXiv 2405.20320)."""
VALUE_HUBER = 0.001
"""c of the pseudo-Huber loss of a single value (Rectified Diffusion's code)."""
EDGE = 1e-5
"""Nearer to neither end of time does 2-rectified flow++ go, so that 1/t' stays finite."""


class FlowLoss(nn.Module):
    """A network that is trained on couplings, and how its errors are measured: by "l2" until a phase begins."""

    def __init__(self, unet: nn.Module, view: View, encode: Encode, distance: PerceptualDistance | None = None) -> None:
        """`distance` is what the perceptual losses measure by."""
        super().__init__()
        self.unet, self.view, self.encode, self.distance = unet, view, encode, distance
        self.loss: Loss = "l2"

    def begin(self, phase: FlowPhase) -> None:
        self.loss = phase.loss

    def perceptual(self, latents: Tensor, data: Tensor, draws: np.ndarray) -> Tensor:
        """LPIPS of the decoded images, [B, 1, 1, 1]."""
        if self.distance is None:
            raise ValueError(f"the loss {self.loss} measures by a perceptual distance")
        return self.distance(latents, data, draws).view(-1, 1, 1, 1)


class ReflowLoss(FlowLoss):
    """E D(v, v̂) over couplings and times, v = data - noise and v̂ = v(x_t, t | prompt) (InstaFlow, Eq. 5).

    D is of 2-rectified flow++ (config F), with its time t' = 1 - t, of which t' = 0 is data:
    "l2" ||v - v̂||², "pseudo-huber" H(v - v̂), "lpips" LPIPS(x̂, data) / t' of the images that x̂ = x_t + t' v̂ and data
    decode to, and "lpips-huber" (1 - t') H(v - v̂) + LPIPS(x̂, data) / t'.
    A share `caption_dropout` of the prompts is left out, so that the unguided branch stays trained.
    """

    def __init__(
        self,
        unet: nn.Module,
        view: View,
        encode: Encode,
        caption_dropout: float,
        distance: PerceptualDistance | None = None,
        *,
        time_density: TimeDensity = "uniform",
    ) -> None:
        super().__init__(unet, view, encode, distance)
        self.caption_dropout, self.density = caption_dropout, DENSITIES[time_density]
        self.by_time = LossByTime()

    def forward(self, noise: Tensor, data: Tensor, prompts: list[str], draws: np.ndarray) -> Tensor:
        """Scalar. noise, data: [B, C, H, W]; draws: [B, COLUMNS], the time's and the dropout's among them."""
        dropped = draws[:, DROPOUT] < self.caption_dropout
        kept = [None if drop else prompt for drop, prompt in zip(dropped, prompts, strict=True)]
        t = self.times(torch.as_tensor(draws[:, TIME])).to(noise.device, torch.float32)
        x, timestep = self.view.point(noise, data, t)
        output = self.unet(x, timestep, **self.encode(kept), return_dict=False)[0]
        read = self.view.velocity(x, timestep, output)

        def reached() -> Tensor:
            return self.view.data(x.float(), timestep, read.float())

        losses = self.losses(read - velocity(noise, data), reached, data, t, draws)
        self.by_time.add(t, losses.detach().mean((1, 2, 3)))
        return losses.mean()

    def times(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) as the flow times that training visits."""
        return self.view.time(self.density(uniform).to(torch.float32))

    def losses(
        self, errors: Tensor, reached: Callable[[], Tensor], data: Tensor, t: Tensor, draws: np.ndarray
    ) -> Tensor:
        """[B, C, H, W] or [B, 1, 1, 1], of v̂ - v and x̂."""
        if self.loss == "l2":
            return errors.square()
        if self.loss == "pseudo-huber":
            return pseudo_huber(errors)
        level = (1 - t).clamp(EDGE, 1 - EDGE).view(-1, 1, 1, 1)  # t'
        # In float32: near the data what is divided by t' is as small as bfloat16's rounding.
        with torch.autocast(data.device.type, enabled=False):
            losses = self.perceptual(reached(), data, draws) / level
        return (1 - level) * pseudo_huber(errors) + losses if self.loss == "lpips-huber" else losses


class RectifiedDiffusionLoss(ReflowLoss):
    """E D(data, x̂(x_τ, τ | prompt)) over couplings and uniform timesteps τ (Rectified Diffusion, arXiv 2410.07303).

    The teacher's own training, but that noise and data are coupled: its network goes on to predict what it always did,
    and x̂ is the data that this means. D is "l2", "pseudo-huber" of each value by itself, or "lpips" of decoded images.
    """

    def times(self, uniform: Tensor) -> Tensor:
        """The flow times of timesteps 999 to 0, each equally often."""
        if not isinstance(self.view, EpsilonView):
            raise ValueError("Rectified Diffusion trains a diffusion's network")
        return self.view.times().to(uniform.device)[((1 - uniform) * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)]

    def losses(
        self, errors: Tensor, reached: Callable[[], Tensor], data: Tensor, t: Tensor, draws: np.ndarray
    ) -> Tensor:
        with torch.autocast(data.device.type, enabled=False):
            if self.loss == "lpips":
                return self.perceptual(reached(), data, draws)
            misses = reached() - data
        if self.loss == "pseudo-huber":
            return (misses.square() + VALUE_HUBER**2).sqrt() - VALUE_HUBER
        return misses.square()


class DistillLoss(FlowLoss):
    """E D(data, student(noise | prompt)) over couplings: the student is one step of the flow (InstaFlow, Eq. 6).

    D is the squared error or the pseudo-Huber loss of latents, or LPIPS of their images.
    """

    def __init__(self, unet: nn.Module, view: View, encode: Encode, distance: PerceptualDistance | None = None) -> None:
        super().__init__(unet, view, encode, distance)
        self.first_timestep = view.grid(1)[0]  # [1]

    def forward(self, noise: Tensor, data: Tensor, prompts: list[str], draws: np.ndarray) -> Tensor:
        """Scalar. noise, data: [B, C, H, W]; draws: [B, COLUMNS], needed where the images are cropped."""
        timestep = self.first_timestep.to(noise.device).expand(len(noise))
        output = self.unet(noise, timestep, **self.encode(prompts), return_dict=False)[0]
        made = self.view.one_step(noise, output)
        if self.loss == "lpips":
            return self.perceptual(made, data, draws).mean()
        if self.loss == "pseudo-huber":
            return pseudo_huber(made - data).mean()
        return (made - data).square().mean()


def pseudo_huber(errors: Tensor) -> Tensor:
    """(√(||e||² + c²) - c) / d with c = 0.00054 d, [B, 1, 1, 1]; d is the number of an error's values.

    (2-rectified flow++, as its code divides by d.) errors: [B, C, H, W].
    """
    d = errors[0].numel()
    c = HUBER * d
    squares = errors.square().sum((1, 2, 3), keepdim=True)
    return squares / ((squares + c * c).sqrt() + c) / d  # the same, without the difference of two near numbers
