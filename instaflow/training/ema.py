"""An exponential moving average of weights, in float32."""

import torch
from torch import Tensor, nn


class Ema:
    """The average ω ← ω + (1 - d) (θ - ω) of a module's parameters and buffers.

    d = min(decay, (1 + n) / (10 + n)) after n updates, so that the first weights are soon forgotten. Whole numbers,
    such as a buffer's count of steps, have no average: the present ones are taken.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {
            name: value.detach().to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
            for name, value in module.state_dict().items()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        state = module.state_dict()
        averaged = [name for name, value in self.weights.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.weights[name] for name in averaged], [state[name].float() for name in averaged], 1 - decay
        )
        for name in self.weights.keys() - averaged:
            self.weights[name].copy_(state[name])

    def load(self, weights: dict[str, Tensor], updates: int) -> None:
        """Take up an average where it was left."""
        for name, value in self.weights.items():
            value.copy_(weights[name])
        self.updates = updates
