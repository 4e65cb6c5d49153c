"""Improved precision and recall of a set of features (Kynkäänniemi et al., arXiv 1904.06991), by torch-fidelity."""

from dataclasses import dataclass

import numpy as np
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_part

from instaflow.errors import InstaFlowError

NEIGHBOURS = 3  # the paper's k
ROWS = 1000  # whose distances to all others are held at a time: 200 MB of 50,000, a few times over


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision: the share of made images that look real. Recall: the share of real ones that could be made."""

    precision: float
    recall: float
    neighbours: int


def precision_recall(
    made: np.ndarray, real: np.ndarray, *, neighbours: int = NEIGHBOURS, device: torch.device | str = "cpu"
) -> PrecisionRecall:
    """The share of each set that lies within the other's manifold (Eqs. 1 to 3). made, real: features [N, D].

    A set's manifold is the union of balls about its points, each reaching to the point's k-th nearest neighbour.
    Both grow with the number of samples: compare only sets of equal sizes. Raises InstaFlowError where a set has no
    k-th neighbour.
    """
    if made.ndim != 2 or made.shape[1:] != real.shape[1:]:
        raise InstaFlowError(f"the two sides have the shapes {list(made.shape)} and {list(real.shape)}, not [N, D]")
    if (fewest := min(len(made), len(real))) <= neighbours:
        raise InstaFlowError(
            f"Precision and recall by {neighbours} neighbours need more samples than that on each side, not {fewest}"
        )
    first, second = (torch.from_numpy(np.asarray(side, dtype=np.float32)).to(device) for side in (made, real))
    precision, recall = calculate_precision_recall_part(first, second, neighbours, ROWS)
    return PrecisionRecall(precision, recall, neighbours)
