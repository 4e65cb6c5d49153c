"""How far chance carries a figure: half the width of its 95 % interval over prompts and noise.

For the weights and the real images as they are: what another training or other real images would change is not in it.
"""

import math

import numpy as np

WIDE = 1.96
"""Standard errors in half of an interval, as of the normal distribution."""


def of_mean(values: np.ndarray) -> float | None:
    """Of the mean of independent values [N]; None of fewer than two, which show no spread."""
    return WIDE * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def of_share(share: float, count: int) -> float:
    """Of the share of `count` samples, by Wilson's interval (1927): where all are right, chance may still be in it."""
    wide = WIDE**2 / count
    return WIDE / (1 + wide) * math.sqrt(share * (1 - share) / count + wide / (4 * count))
