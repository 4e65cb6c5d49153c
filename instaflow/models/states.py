"""Where the states of a sampler's path lie on the flow: z_t = (1 - t) noise + t data, whatever the sampler's own units.

A sampler's x = α data + σ ε is the state z = x / (α + σ) at t = α / (α + σ) (see `instaflow.flow.schedules`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler, HeunDiscreteScheduler
from torch import Tensor

from instaflow.errors import ConfigError
from instaflow.flow.schedules import flow_time
from instaflow.models.edm_heun import EdmHeunScheduler

EXPLODING = HeunDiscreteScheduler, EdmHeunScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler
"""Those whose state is x = data + σ ε."""


@dataclass(frozen=True)
class State:
    """A state of the path; it enters the sampler's step number `step`, counted from 0."""

    step: int
    time: float
    """t, in (0, 1)."""
    scale: float
    """α + σ: the sampler's x is so many times the flow's state."""


def visited_states(scheduler: Any, num_steps: int) -> list[State]:
    """The states on the path of a scheduler in so many steps, from noise to data, but for the last: the data.

    Where the network is called twice at one noise level, by Heun's method and by PNDM's first step, it is first called
    on a trial point off the path, then on the state.
    """
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(num_steps)
    alphas, sigmas = noise_levels(scheduler)
    last = {level: step for step, level in enumerate(zip(alphas.tolist(), sigmas.tolist(), strict=True))}
    times = flow_time(alphas, sigmas).tolist()
    return [State(step, times[step], alpha + sigma) for (alpha, sigma), step in last.items()]


def noise_levels(scheduler: Any) -> tuple[Tensor, Tensor]:
    """α and σ of what enters each step of a scheduler whose timesteps are set: [S] float64."""
    is_ddim = isinstance(scheduler, DDIMScheduler)
    if not hasattr(scheduler, "sigmas"):
        timesteps = scheduler.timesteps
        if is_ddim:  # what a step lands on may lie beside what the next one asks for
            stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
            timesteps = torch.cat([timesteps[:1], timesteps[:-1] - stride])
        alpha_bar = scheduler.alphas_cumprod.double()[timesteps]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    sigmas = scheduler.sigmas[:-1].double()
    if scheduler.config.get("use_flow_sigmas"):
        return 1 - sigmas, sigmas
    if isinstance(scheduler, EXPLODING):
        return torch.ones_like(sigmas), sigmas
    alphas = (1 + sigmas**2).rsqrt()
    return alphas, sigmas * alphas


def nearest_states(scheduler: Any, num_steps: int, times: Sequence[float]) -> list[State]:
    """For each time the visited state that is nearest to it. Raises ConfigError where two have the same one."""
    states = visited_states(scheduler, num_steps)
    nearest = [min(states, key=lambda state: abs(state.time - time)) for time in times]
    for i in range(1, len(times)):
        if nearest[i] == nearest[i - 1]:
            known = ", ".join(f"{state.time:.3f}" for state in states)
            raise ConfigError(
                f"'keep.trajectory': {times[i - 1]} and {times[i]} both come to the state at {nearest[i].time:.3f}",
                f"In {num_steps} steps this sampler visits {known}: choose times near different "
                "ones, or take more num_steps",
            )
    return nearest
