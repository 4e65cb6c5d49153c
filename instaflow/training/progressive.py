"""Progressive distillation: a student whose one step lands where two steps of its teacher do (arXiv 2202.00512).

Salimans & Ho write diffusions x = α data + σ ε. Here it is the same in the flow's z = x / (α + σ) and t = α / (α + σ),
where their DDIM step is Euler's.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from instaflow.flow.paths import interpolate
from instaflow.flow.views import View
from instaflow.training.draws import TIME
from instaflow.training.figures import LossByTime
from instaflow.training.losses import Encode

Teacher = Callable[[list[str]], Callable[[Tensor, Tensor], Tensor]]
"""Prompts to a frozen network's output under its guidance, a function of input [B, C, H, W] and timestep [B]."""


class HalvingLoss(nn.Module):
    """E max(SNR, 1) ||x̃ - x̂||² over data, noise and the points of the student's grid (Algorithm 2, Eq. 9).

    From z at time t the teacher takes two steps, with velocities v and v', to times t' and t''. The student's one step
    lands there if its velocity is their mean ṽ = ((t' - t) v + (t'' - t') v') / (t'' - t). The paper compares the data
    that the two lead to, x̃ = z + (1 - t) ṽ and x̂ = z + (1 - t) v̂. With SNR = (α/σ)² = (t / (1 - t))² that is

        max(SNR, 1) ||x̃ - x̂||² = max(t, 1 - t)² ||ṽ - v̂||²,

    which stays finite at both ends of time. At the first point of the grid z is the noise alone, as in sampling.
    """

    def __init__(self, unet: nn.Module, view: View, encode: Encode, teacher: Teacher, num_steps: int) -> None:
        """`num_steps` are the student's; `view` is how both networks are read."""
        super().__init__()
        self.unet, self.view, self.encode, self.teacher, self.num_steps = unet, view, encode, teacher, num_steps
        self.timesteps, self.times = view.grid(2 * num_steps)
        self.by_time = LossByTime()

    def forward(self, noise: Tensor, data: Tensor, prompts: list[str], draws: np.ndarray) -> Tensor:
        """Scalar. noise, unit variance, and data: [B, C, H, W], not coupled; draws: [B, COLUMNS], the time's in it."""
        step = torch.as_tensor(draws[:, TIME] * self.num_steps).long()  # [B], of the student
        t, timestep = self.times[2 * step].to(noise), self.timesteps[2 * step].to(noise.device)
        z = interpolate(noise, data, t)
        z = torch.where((step == 0).to(z.device).view(-1, 1, 1, 1), self.view.state(noise, timestep), z)
        wanted = self.mean_velocity(z, step, prompts)
        x = self.view.model_input(z, timestep)
        output = self.unet(x, timestep, **self.encode(prompts), return_dict=False)[0]
        errors = self.view.velocity(x, timestep, output) - wanted
        losses = torch.maximum(t, 1 - t).square().view(-1, 1, 1, 1) * errors.square()
        self.by_time.add(t, losses.detach().mean((1, 2, 3)))
        return losses.mean()

    @torch.no_grad()
    def mean_velocity(self, z: Tensor, step: Tensor, prompts: list[str]) -> Tensor:
        """ṽ of the teacher's two steps from z [B, C, H, W], the flow's point at the student's grid point `step` [B]."""
        predict, mean = self.teacher(prompts), torch.zeros_like(z)
        times = self.times.to(z)
        span = (times[2 * step + 2] - times[2 * step]).view(-1, 1, 1, 1)
        for place in (2 * step, 2 * step + 1):
            timestep, length = self.timesteps[place].to(z.device), (times[place + 1] - times[place]).view(-1, 1, 1, 1)
            x = self.view.model_input(z, timestep)
            velocity = self.view.velocity(x, timestep, predict(x, timestep))
            z = z + length * velocity
            mean = mean + length / span * velocity
        return mean
