"""An exponential moving average of weights, in float32."""

import torch
from torch import Tensor, nn


class Ema:
    """The average ω ← ω + (1 - d) (θ - ω) of a module's parameters and buffers.

    d = min(decay, (1 + n) / (10 + n)) after n updates, so that the first weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {name: value.detach().clone().float() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        state = module.state_dict()
        present = [state[name].float() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), present, 1 - decay)

    def load(self, weights: dict[str, Tensor], updates: int) -> None:
        """Take up an average where it was left."""
        for name, value in self.weights.items():
            value.copy_(weights[name])
        self.updates = updates
