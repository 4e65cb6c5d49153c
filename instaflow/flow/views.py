"""A network read as a velocity: what it is fed, and what its output means.

Three parametrizations, each with the sampler that stock diffusers brings for it. Every method takes and returns
tensors; shapes are [B, C, H, W] for images and [B] for times and timesteps. At a grid's first timestep the network's
input is the noise itself.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

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

    parametrization: ClassVar[Literal["velocity"]] = "velocity"

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

    # What the network is trained on as a denoiser, of noise and data that are not coupled

    def timestep(self, share: Tensor) -> Tensor:
        """A share in [0, 1) of the noise levels as a timestep, 1000 share; noise rises with it."""
        return NUM_TIMESTEPS * share

    def noised(self, noise: Tensor, data: Tensor, timestep: Tensor) -> Tensor:
        """The network's input at a timestep: the straight path's point at noise level timestep / 1000."""
        return data + (timestep.to(data.dtype) / NUM_TIMESTEPS).view(-1, 1, 1, 1) * (noise - data)

    def predicted_data(self, x: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        """The data that the network's output stands for, x - level output, in float32 or better."""
        x = widened(x)
        return x - (timestep.to(x.dtype) / NUM_TIMESTEPS).view(-1, 1, 1, 1) * widened(output)

    def target(self, noise: Tensor, data: Tensor, timestep: Tensor) -> Tensor:
        """The output that would be right, noise - data; its mean squared error is the denoising loss."""
        return noise - data


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
    parametrization: ClassVar[Literal["epsilon"]] = "epsilon"

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
        return to_velocity(x, output, *self.alpha_sigma(timestep))

    def data(self, x: Tensor, timestep: Tensor, velocity: Tensor) -> Tensor:
        """Where the velocity leads from the network's input: z + (1 - t) v."""
        return velocity_to_data(x, velocity, *self.alpha_sigma(timestep))

    def one_step(self, noise: Tensor, output: Tensor) -> Tensor:
        """Data after one step from noise, given the output there: the data that it predicts at the last timestep."""
        last = torch.full((len(noise),), NUM_TIMESTEPS - 1, device=noise.device)
        return self.predicted_data(noise, last, output)

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

    def timestep(self, share: Tensor) -> Tensor:
        """A share in [0, 1) of the timesteps as one of them, ⌊1000 share⌋; noise rises with it."""
        return (NUM_TIMESTEPS * share).long().clamp(max=NUM_TIMESTEPS - 1)  # float32 rounds what is nearly 1 up

    def noised(self, noise: Tensor, data: Tensor, timestep: Tensor) -> Tensor:
        """The network's input at a timestep, α data + σ noise (DDPM, Eq. 4)."""
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
        """The output that would be right; its mean squared error is the denoising loss of such a network."""
        if self.prediction_type == "v_prediction":
            alpha, sigma = self.alpha_sigma(timestep)
            return alpha * noise - sigma * data
        return noise if self.prediction_type == "epsilon" else data


@dataclass(frozen=True)
class EdmView:
    """An EDM's network F, preconditioned as Karras et al. 2022 (arXiv 2206.00364, Eq. 7 and Table 1).

    The denoiser is D(x̃; σ) = c_skip x̃ + c_out F(c_in x̃; ln(σ) / 4) of x̃ = data + σ noise. What the network takes is
    x = c_in x̃ and, as its timestep, c_noise = ln(σ) / 4. With the angle φ whose tangent is σ / σ_data,

        x = cos φ data / σ_data + sin φ noise,    D = σ_data (cos φ x + sin φ F),    ε̂ = sin φ x - cos φ F,

    which is the same without differences of large numbers: F predicts -v of the data in units of their deviation.
    Sampled by EDMEulerScheduler, whose steps are Euler steps of the flow: z = x̃ / (1 + σ) at t = 1 / (1 + σ). Its grid
    begins at σ = 80, where the data change the network's input by less than a hundredth of its deviation.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    parametrization: ClassVar[Literal["edm"]] = "edm"

    def sigma(self, timestep: Tensor) -> Tensor:
        """σ = exp(4 c_noise), float64, shaped to broadcast over images."""
        return (4 * timestep.double()).exp().view(-1, 1, 1, 1)

    def cos_sin(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """cos φ = σ_data c_in and sin φ = σ c_in, in the precision of x, float32 at least."""
        sigma = self.sigma(timestep).to(x.device)
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (self.sigma_data * c_in).to(dtype), (sigma * c_in).to(dtype)

    def levels(self, ramp: Tensor) -> Tensor:
        """σ from σ_max at 0 to σ_min at 1, evenly spaced in σ^(1/ρ) (Eq. 5)."""
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (high + ramp * (low - high)) ** self.rho

    def time(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) as flow times from σ_max to σ_min."""
        first, last = 1 / (1 + self.sigma_max), 1 / (1 + self.sigma_min)
        return first + (last - first) * uniform

    def point(self, noise: Tensor, data: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input and timestep at time t of a coupling."""
        sigma = ((1 - t.double()) / t.double()).clamp(self.sigma_min, self.sigma_max)
        timestep = (sigma.log() / 4).to(t.dtype)
        return self.noised(noise, data, timestep), timestep

    def velocity(self, x: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        """The velocity data - noise that the network's output stands for, in float32 or better."""
        cos, sin = self.cos_sin(x, timestep)
        return self.predicted_data(x, timestep, output) - (sin * widened(x) - cos * widened(output))

    def data(self, x: Tensor, timestep: Tensor, velocity: Tensor) -> Tensor:
        """Where the velocity leads from the network's input: z + (1 - t) v."""
        sigma = self.sigma(timestep).to(x.device)
        return self.state(x, timestep) + (sigma / (1 + sigma)).to(velocity.dtype) * velocity

    def one_step(self, noise: Tensor, output: Tensor) -> Tensor:
        """Data after one step from noise, given the output there: D at σ_max."""
        first = torch.full((len(noise),), math.log(self.sigma_max) / 4, dtype=torch.float64, device=noise.device)
        return self.predicted_data(noise, first, output)

    def state(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The flow's point z that the network's input x is."""
        return x / self.input_scale(x, timestep)

    def model_input(self, z: Tensor, timestep: Tensor) -> Tensor:
        """The network's input at the flow's point z: the inverse of `state`."""
        return self.input_scale(z, timestep) * z

    def input_scale(self, x: Tensor, timestep: Tensor) -> Tensor:
        """c_in (1 + σ), by which the network's input is larger than the flow's state."""
        sigma = self.sigma(timestep).to(x.device)
        return ((1 + sigma) * (sigma**2 + self.sigma_data**2).rsqrt()).to(x.dtype)

    def grid(self, num_steps: int) -> tuple[Tensor, Tensor]:
        """The sampler's timesteps [N], float32, and flow times [N + 1], the last of which is 1."""
        sigmas = self.levels(torch.linspace(0, 1, num_steps, dtype=torch.float64))
        times = 1 / (1 + sigmas)
        return (sigmas.log() / 4).float(), torch.cat([times, times.new_ones(1)])

    def timestep(self, share: Tensor) -> Tensor:
        """A share in [0, 1) of the noise levels as a timestep: that of the ⌊1000 share⌋-th of 1000 from σ_min to σ_max.

        DMD's bins (arXiv 2311.18828, App. B); noise rises with them.
        """
        place = (NUM_TIMESTEPS * share.double()).floor().clamp(max=NUM_TIMESTEPS - 1)
        return (self.levels(1 - place / (NUM_TIMESTEPS - 1)).log() / 4).to(
            torch.promote_types(share.dtype, torch.float32)
        )

    def noised(self, noise: Tensor, data: Tensor, timestep: Tensor) -> Tensor:
        """The network's input at a timestep, c_in (data + σ noise)."""
        cos, sin = self.cos_sin(data, timestep)
        return cos / self.sigma_data * data + sin * noise

    def predicted_data(self, x: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        """The data that the network's output stands for, D of x, in float32 or better."""
        cos, sin = self.cos_sin(x, timestep)
        return self.sigma_data * (cos * widened(x) + sin * widened(output))

    def target(self, noise: Tensor, data: Tensor, timestep: Tensor) -> Tensor:
        """The output that would be right, (data - c_skip (data + σ noise)) / c_out.

        Its mean squared error is EDM's loss, for its weighting λ(σ) c_out² is 1 (Eq. 8).
        """
        cos, sin = self.cos_sin(data, timestep)
        return sin / self.sigma_data * data - cos * noise


View = VelocityView | EpsilonView | EdmView


def widened(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
