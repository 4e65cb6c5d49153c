"""A network read as a velocity: what it is fed, and what its output means.

Two parametrizations, each with the sampler that stock diffusers brings for it. Every method takes and returns tensors;
shapes are [B, C, H, W] for images and [B] for times and timesteps.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from instaflow.flow.paths import interpolate
from instaflow.flow.schedules import (
    data_to_velocity,
    epsilon_to_data,
    epsilon_to_velocity,
    flow_state,
    flow_time,
    v_prediction_to_data,
    v_prediction_to_velocity,
    velocity_to_data,
)

NUM_TIMESTEPS = 1000


@dataclass(frozen=True)
class VelocityView:
    """A network in diffusers' flow convention: at timestep 1000 (1 - t) it returns noise - data.

    Sampled by DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1).
    Its grid begins at noise level 0.999, where the network's input is the noise itself.
    """

    def time(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) as flow times t in [0, 1)."""
        return uniform

    def point(self, noise: Tensor, data: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input and timestep at time t of a coupling."""
        return interpolate(noise, data, t), (NUM_TIMESTEPS * (1 - t)).clamp(max=NUM_TIMESTEPS - 1)

    def velocity(self, x: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        """The velocity data - noise that the network's output stands for."""
        return -output

    def data(self, x: Tensor, timestep: Tensor, velocity: Tensor) -> Tensor:
        """Where the velocity leads from the network's input: x + (1 - t) v."""
        return x + (timestep / NUM_TIMESTEPS).view(-1, 1, 1, 1) * velocity

    def one_step(self, noise: Tensor, output: Tensor) -> Tensor:
        """Data after one step from noise, given the output there: noise - 0.999 output, as the scheduler has it."""
        return noise - (NUM_TIMESTEPS - 1) / NUM_TIMESTEPS * output

    def timestep(self, share: Tensor) -> Tensor:
        """The timestep at a share in [0, 1) of the noise schedule, which rises from data to noise."""
        return NUM_TIMESTEPS * share

    def noised(self, noise: Tensor, data: Tensor, timestep: Tensor) -> Tensor:
        """The network's input at a timestep of noise and data that need not be coupled."""
        return interpolate(noise, data, 1 - timestep.to(data.dtype) / NUM_TIMESTEPS)

    def predicted_data(self, x: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        """The data that the network's output stands for: x - (1 - t) output."""
        return x - (timestep / NUM_TIMESTEPS).view(-1, 1, 1, 1) * output

    def target(self, noise: Tensor, data: Tensor, timestep: Tensor) -> Tensor:
        """The output that would be right: the network's own training is the mean squared error to it."""
        return noise - data

    def state(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The flow's point z that the network's input x is."""
        return x

    def model_input(self, z: Tensor, timestep: Tensor) -> Tensor:
        """The network's input at the flow's point z: the inverse of `state`."""
        return z

    def grid(self, num_steps: int) -> tuple[Tensor, Tensor]:
        """The sampler's timesteps [N] and flow times [N + 1], the last of which is 1."""
        # In the scheduler's own arithmetic, whose rounding decides whether a timestep is 666 or 665.
        levels = (1 - torch.from_numpy(np.linspace(1, 1 / NUM_TIMESTEPS, num_steps + 1))).flip(0)
        return (levels[:-1] * NUM_TIMESTEPS).long(), 1 - levels


@dataclass(frozen=True)
class EpsilonView:
    """A diffusion teacher's network, read through the exact map of `schedules`.

    Sampled by DDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=True): one of its steps is an Euler step
    of the flow. At the last timestep the network's input is the noise itself, in training as in sampling, although
    Stable Diffusion's schedule still holds a trace of data there. A network that predicts ε can't be read where no
    trace is left.
    """

    alphas_cumprod: Tensor
    """[1000], of the teacher's noise schedule."""
    prediction_type: str = "epsilon"
    """"epsilon", "v_prediction" or "sample"."""

    def alpha_sigma(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at integer timesteps, shaped to broadcast over images."""
        alpha_bar = self.alphas_cumprod.to(timestep.device)[timestep.long()].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def times(self) -> Tensor:
        """The flow time of each timestep, [1000], falling from 0.97 to 0.06 for Stable Diffusion."""
        return flow_time(self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt())

    def time(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) as flow times in the range that the teacher knows."""
        times = self.times().to(uniform.device)
        return times[-1] + (times[0] - times[-1]) * uniform

    def point(self, noise: Tensor, data: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input and timestep at the timestep nearest to time t of a coupling."""
        rising = self.times().flip(0).to(t.device)
        right = torch.searchsorted(rising, t.contiguous()).clamp(1, len(rising) - 1)
        index = torch.where(t - rising[right - 1] < rising[right] - t, right - 1, right)
        timestep = len(rising) - 1 - index
        alpha, sigma = self.alpha_sigma(timestep)
        x = alpha * data + sigma * noise
        return torch.where((timestep == NUM_TIMESTEPS - 1).view(-1, 1, 1, 1), noise, x), timestep

    def velocity(self, x: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        """The velocity data - noise that the network's output stands for, in float32 or better."""
        to_velocity = {
            "epsilon": epsilon_to_velocity,
            "v_prediction": v_prediction_to_velocity,
            "sample": data_to_velocity,
        }[self.prediction_type]
        return to_velocity(widened(x), widened(output), *self.alpha_sigma(timestep))

    def data(self, x: Tensor, timestep: Tensor, velocity: Tensor) -> Tensor:
        """Where the velocity leads from the network's input: z + (1 - t) v."""
        return velocity_to_data(x, velocity, *self.alpha_sigma(timestep))

    def one_step(self, noise: Tensor, output: Tensor) -> Tensor:
        """Data after one step from noise, given the output there: the data that it predicts at the last timestep."""
        last = torch.full((len(noise),), NUM_TIMESTEPS - 1, device=noise.device)
        return self.predicted_data(noise, last, output)

    def timestep(self, share: Tensor) -> Tensor:
        """The timestep at a share in [0, 1) of the noise schedule, which rises from data to noise."""
        return (share * NUM_TIMESTEPS).long()

    def noised(self, noise: Tensor, data: Tensor, timestep: Tensor) -> Tensor:
        """The network's input at a timestep of noise and data that need not be coupled: α data + σ noise."""
        alpha, sigma = self.alpha_sigma(timestep)
        return alpha * data + sigma * noise

    def predicted_data(self, x: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        """The data that the network's output stands for, in float32 or better."""
        x, output = widened(x), widened(output)
        if self.prediction_type == "sample":
            return output
        to_data = epsilon_to_data if self.prediction_type == "epsilon" else v_prediction_to_data
        return to_data(x, output, *self.alpha_sigma(timestep))

    def target(self, noise: Tensor, data: Tensor, timestep: Tensor) -> Tensor:
        """The output that would be right: the network's own training is the mean squared error to it."""
        if self.prediction_type == "sample":
            return data
        alpha, sigma = self.alpha_sigma(timestep)
        return noise if self.prediction_type == "epsilon" else alpha * noise - sigma * data

    def state(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The flow's point z that the network's input x is."""
        return flow_state(x, *self.alpha_sigma(timestep))

    def model_input(self, z: Tensor, timestep: Tensor) -> Tensor:
        """The network's input at the flow's point z: the inverse of `state`."""
        alpha, sigma = self.alpha_sigma(timestep)
        return (alpha + sigma) * z

    def grid(self, num_steps: int) -> tuple[Tensor, Tensor]:
        """The sampler's timesteps [N] and flow times [N + 1], the last of which is 1.

        DDIMScheduler steps by 1000 // N timesteps. Where N does not divide 1000 it therefore lands beside the timestep
        that it asks the network for next, and stops short of the data: there, Euler on this grid is the better sampler.
        """
        # np.arange may reach one step too far, where the scheduler would ask for timestep -1.
        rounded = np.arange(NUM_TIMESTEPS, 0, -NUM_TIMESTEPS / num_steps).round()[:num_steps]
        timesteps = torch.from_numpy(rounded).long() - 1
        times = self.times().double()[timesteps]
        return timesteps, torch.cat([times, times.new_ones(1)])


View = VelocityView | EpsilonView


def widened(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
