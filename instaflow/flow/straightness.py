"""How straight the simulated paths of a flow are."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from instaflow.flow.views import View


@dataclass(frozen=True)
class Trajectory:
    """Euler's path of a flow: states [N + 1, B, C, H, W], velocities [N, B, C, H, W], times [N + 1]."""

    states: Tensor
    velocities: Tensor
    times: Tensor


def euler(view: View, predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, num_steps: int) -> Trajectory:
    """The flow of `view` from unit-variance noise [B, C, H, W] to data, by Euler's method on its sampler's grid.

    `predict(x, timestep [B])` is the network, guided as it will be used. The first input is the noise itself.
    """
    timesteps, times = view.grid(num_steps)
    timesteps = timesteps.to(noise.device)
    z = view.state(noise, timesteps[:1].expand(len(noise)))
    states, velocities = [z], []
    for i, timestep in enumerate(timesteps):
        batch = timestep.expand(len(noise))
        x = view.model_input(z, batch)
        v = view.velocity(x, batch, predict(x, batch))
        z = z + float(times[i + 1] - times[i]) * v
        states.append(z)
        velocities.append(v)
    return Trajectory(torch.stack(states), torch.stack(velocities), times)


@dataclass(frozen=True)
class Straightness:
    """S(Z), S(Z) relative to the mean squared displacement per unit of time, and its profile over time.

    paths: what each path adds, whose mean is `value` [B]; paths_relative: the same of `relative`, a ratio of two means,
    to first order.
    """

    value: float
    relative: float
    profile: list[tuple[float, float]]
    paths: Tensor
    paths_relative: Tensor


@dataclass(frozen=True)
class Bends:
    """How each simulated path bends: what S(Z) is the mean of, so that paths may be simulated in parts.

    deviations: ||(Z_1 - Z_0) - v(Z_t, t)||² at each step [B, N]; lengths: ||Z_1 - Z_0||² [B]; times: [N + 1].
    A flow that begins at t_0 > 0 takes the mean velocity over [t_0, 1] in place of Z_1 - Z_0.
    """

    deviations: Tensor
    lengths: Tensor
    times: Tensor

    @classmethod
    def of(cls, path: Trajectory) -> "Bends":
        span = float(path.times[-1] - path.times[0])
        mean_velocity = (path.states[-1] - path.states[0]) / span
        deviations = (path.velocities - mean_velocity).square().flatten(2).sum(-1)  # [N, B]
        return cls(deviations.T.cpu(), mean_velocity.square().flatten(1).sum(-1).cpu(), path.times.cpu())


def straightness(path: Trajectory | Bends) -> Straightness:
    """S(Z) = ∫ E ||(Z_1 - Z_0) - v(Z_t, t)||² dt over the simulated path; 0 if and only if it is straight.

    (Rectified Flow, Eq. 6; InstaFlow, Sec. 2.) The norm sums over a latent's values. `relative` divides by
    E ||Z_1 - Z_0||².
    """
    bends = Bends.of(path) if isinstance(path, Trajectory) else path
    steps = bends.times.diff().to(bends.deviations.dtype)
    deviation = bends.deviations.mean(0)  # [N]
    value = float((deviation * steps).sum() / float(bends.times[-1] - bends.times[0]))
    scale = float(bends.lengths.mean())
    middles = (bends.times[1:] + bends.times[:-1]) / 2
    profile = [(round(float(t), 4), float(d)) for t, d in zip(middles, deviation, strict=True)]
    relative = value / scale if scale > 0 else 0.0
    paths = (bends.deviations * steps).sum(1) / float(bends.times[-1] - bends.times[0])
    ratios = relative + (paths - relative * bends.lengths) / scale if scale > 0 else torch.zeros_like(paths)
    return Straightness(value, relative, profile, paths, ratios)
