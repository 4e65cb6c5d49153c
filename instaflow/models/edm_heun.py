"""Heun's method as EDM samples by it, for which diffusers has no scheduler."""

from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from instaflow.flow.views import EdmView


class EdmHeunScheduler(SchedulerMixin, ConfigMixin):
    """EDM's deterministic sampler (Karras et al. 2022, Algorithm 1), behind the face of a diffusers scheduler.

    N steps on the grid of σ call the network 2 N - 1 times: at each step's end for a trial point, then for the state,
    save at σ = 0, where the last step is Euler's. As in diffusers' own Heun, `sigmas` holds the level of each call, and
    the data's at the end.
    """

    order = 2

    @register_to_config
    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5, rho: float = 7.0
    ) -> None:
        self.init_noise_sigma = (sigma_max**2 + sigma_data**2) ** 0.5
        """EDM multiplies by σ_max; so the network's first input is the noise itself, one part in 50,000 larger."""
        self.set_timesteps(18)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        config: Any = self.config
        view = EdmView(config.sigma_data, config.sigma_min, config.sigma_max, config.rho)
        timesteps = view.grid(num_inference_steps)[0]
        self.timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)]).to(device)
        sigmas = (4 * self.timesteps.double()).exp().cpu()
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        self.call = 0
        self.start: tuple[Tensor, Tensor] | None = None
        """Where the step began and its slope there, while its trial point is out."""

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """x = c_in x̃."""
        return self.c_in * sample

    @property
    def c_in(self) -> float:
        return (float(self.sigmas[self.call]) ** 2 + self.config["sigma_data"] ** 2) ** -0.5

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """The point x̃ at which the network is asked next, or the data at the end."""
        sigma = float(self.sigmas[self.call])
        # dx̃/dσ = (x̃ - D) / σ = ε̂, as EdmView has it
        slope = self.c_in * (sigma * self.c_in * sample - self.config["sigma_data"] * model_output)
        self.call += 1
        if self.start is None:
            self.start = sample, slope
            return (sample + (float(self.sigmas[self.call]) - sigma) * slope,)
        (before, first), self.start = self.start, None
        return (before + (sigma - float(self.sigmas[self.call - 2])) / 2 * (first + slope),)
