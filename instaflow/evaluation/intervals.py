"""How far chance carries a figure: half the width of its 95 % interval over prompts and noise.

For the weights and the real images as they are: what another training or other real images would change is not in it.
"""

import math

import numpy as np
from scipy.special import stdtrit

WIDE = 1.96
"""Standard errors in half of a share's interval, as of the normal distribution."""


def of_mean(values: np.ndarray) -> float | None:
    """Of the mean of independent values [N], by Student's t; None of fewer than two, which show no spread."""
    count = len(values)
    if count < 2:
        return None
    return float(stdtrit(count - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(count))


def of_share(share: float, count: int) -> float:
    """Of the share of `count` samples, by Wilson's interval (1927): where all are right, chance may still be in it.

    Half its width: it reaches further from the share towards one half than away from it.
    """
    wide = WIDE**2 / count
    return WIDE / (1 + wide) * math.sqrt(share * (1 - share) / count + wide / (4 * count))
