"""Whether the mean and the variance of noise are those of N(0, 1)."""

import math
from dataclasses import dataclass

import numpy as np

TAIL = 40.0
"""Sound noise of any size fails one side of one test of its moments with a chance of at most e^-40: among sets of a
million shards, four sides each, one in 10^10."""
ROWS = 64  # noises that are float64 at a time


@dataclass(frozen=True)
class Moments:
    """The sums of some values that should be independent draws from N(0, 1)."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def fault(self) -> str | None:
        """What is wrong with them, in words that follow "holds noise"; None for what N(0, 1) can give.

        With n values, z of the mean is Σx / √n, and of the variance (Σx² - n) / √(2n). The bounds are exact for any n:
        P(|Σx| ≥ √(2nt)) ≤ 2e^-t, and for a χ² of n degrees (Laurent & Massart 2000, Lemma 1)
        P(χ² - n ≥ 2√(nt) + 2t) ≤ e^-t, P(n - χ² ≥ 2√(nt)) ≤ e^-t. That float16 rounds x adds 1e-7 to the variance,
        which is 1e-2 of z at 3 million noises of Stable Diffusion.
        """
        if not self.count:
            return None
        z_mean, z_variance = self.total / self.count**0.5, (self.squares - self.count) / (2 * self.count) ** 0.5
        bound = math.sqrt(2 * TAIL)
        if abs(z_mean) <= bound and -bound <= z_variance <= bound + TAIL * math.sqrt(2 / self.count):
            return None
        mean, variance = self.total / self.count, self.squares / self.count
        z = f"z {z_mean:.1f}, {z_variance:.1f}"
        return f"of mean {mean:.4f} and mean square {variance:.4f}, which is not N(0, 1) ({z})"


def moments_of(noise: np.ndarray) -> Moments:
    """noise: [N, C, H, W]."""
    moments = Moments()
    for start in range(0, len(noise), ROWS):
        values = noise[start : start + ROWS].astype(np.float64)
        moments += Moments(values.size, float(values.sum()), float(np.square(values).sum()))
    return moments
