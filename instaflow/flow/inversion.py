"""The flow backwards: which noise its path leads to given data from."""

from collections.abc import Callable

import torch
from torch import Tensor

from instaflow.flow.views import EpsilonView, VelocityView, View


def invert(view: View, predict: Callable[[Tensor, Tensor], Tensor], data: Tensor, num_steps: int) -> Tensor:
    """The noise [B, C, H, W] from which the flow of `view` comes to `data` [B, C, H, W], float32.

    Heun's method, second order, backwards over the grid of the view's sampler; it calls the network 2 num_steps times,
    for a diffusion once more and for an EDM once less. `predict(x, timestep [B])` is the network, guided as it will be
    used. What it is fed at the grid's first timestep is the noise, as in sampling (RECIPES E4).
    """
    timesteps, times = view.grid(num_steps)

    def velocity(z: Tensor, timestep: Tensor) -> Tensor:
        batch = timestep.expand(len(z))
        x = view.model_input(z, batch)
        return view.velocity(x, batch, predict(x, batch))

    z, zero = data.float(), timesteps.new_zeros(1)
    # At the data a diffusion's network can't be asked: E[ε | x] = -σ ∇ log p(x) is 0 there.
    v = velocity(z, zero.to(z.device)) if isinstance(view, VelocityView) else z
    if isinstance(view, EpsilonView):  # whose timestep 0 lies before the data
        timesteps, times = torch.cat([timesteps, zero]), torch.cat([times[:-1], view.times()[:1].double(), times[-1:]])
    timesteps = timesteps.to(z.device)
    for i in reversed(range(len(timesteps))):
        step = float(times[i] - times[i + 1])
        z = z + step / 2 * (v + velocity(z + step * v, timesteps[i]))
        if i > 0:
            v = velocity(z, timesteps[i])
    return view.model_input(z, timesteps[:1].expand(len(z)))
