"""An exponential moving average of weights, in float32."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Ema:
    """The average ω ← ω + (1 - d) (θ - ω) of tensors, such as a network's weights or one process's part of them.

    d = min(decay, (1 + n) / (10 + n)) after n updates, so that the first weights are soon forgotten. Whole numbers,
    such as a buffer's count of steps, have no average: the present ones are taken.
    """

    def __init__(self, tensors: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.averages = [
            value.detach().to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
            for value in tensors
        ]

    @torch.no_grad()
    def update(self, tensors: Sequence[Tensor]) -> None:
        """Take in the tensors' present values, given in the same order as at the start."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averaged = [place for place, average in enumerate(self.averages) if average.is_floating_point()]
        torch._foreach_lerp_(
            [self.averages[place] for place in averaged], [tensors[place].float() for place in averaged], 1 - decay
        )
        for average, value in zip(self.averages, tensors, strict=True):
            if not average.is_floating_point():
                average.copy_(value)
