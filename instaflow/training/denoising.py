"""What a denoiser minimises that is trained from nothing: EDM's loss (Karras et al. 2022, arXiv 2206.00364)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from instaflow.flow.views import EdmView
from instaflow.training.draws import TIME
from instaflow.training.figures import LossByTime

DEVIATION = 1.2
"""Of ln σ (Table 1)."""


class EdmLoss(nn.Module):
    """E λ(σ) ||D(data + σ noise; σ) - data||² over ln σ ~ N(mean, 1.2²) (Eq. 8).

    With λ = 1 / c_out² it is the squared error of the network's own output.
    """

    def __init__(self, unet: Any, view: EdmView, mean: float) -> None:
        """`mean`: of ln σ; EDM's own, for photographs, is -1.2 (Table 1)."""
        super().__init__()
        self.unet, self.view, self.mean = unet, view, mean
        self.by_time = LossByTime()

    def forward(self, noise: Tensor, data: Tensor, classes: Tensor | None, draws: np.ndarray) -> Tensor:
        """Scalar. noise, unit variance, and data: [B, C, H, W]; classes: [B], for a network that knows some."""
        log_sigma = self.mean + DEVIATION * torch.special.ndtri(torch.as_tensor(draws[:, TIME]))  # -inf at 0
        timestep = (log_sigma.clamp(min=self.mean - 8 * DEVIATION) / 4).to(noise.device, torch.float32)
        text = {} if classes is None else {"class_labels": classes}
        output = self.unet(self.view.noised(noise, data, timestep), timestep, **text, return_dict=False)[0]
        losses = (output - self.view.target(noise, data, timestep)).square()
        self.by_time.add(1 / (1 + (4 * timestep).exp()), losses.detach().mean((1, 2, 3)))
        return losses.mean()
