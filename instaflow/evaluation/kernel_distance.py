"""Kernel distance of two sets of features (KID, Bińkowski et al., arXiv 1801.01401), by torch-fidelity."""

from dataclasses import dataclass

import numpy as np
import torch
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from instaflow.errors import InstaFlowError

SEED = 2020  # torch-fidelity's


@dataclass(frozen=True)
class KernelDistance:
    """Mean and deviation over random subsets; the mean of an unbiased estimate may be below zero."""

    mean: float
    std: float
    subsets: int
    subset_size: int
    seed: int

    def __str__(self) -> str:
        return f"{self.subsets} subsets of {self.subset_size:,}, seed {self.seed}"


def kernel_distance(
    features: np.ndarray, others: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = SEED
) -> KernelDistance:
    """The squared maximum mean discrepancy under k(x, y) = (x·y / D + 1)³, unbiased within each set. Both [N, D].

    In float64: the distance of two good sets is of the size of float32's rounding of the kernel's sums.
    Raises InstaFlowError where a set is smaller than a subset.
    """
    fewest = min(len(features), len(others))
    if fewest < subset_size:
        raise InstaFlowError(
            f"A kernel distance over subsets of {subset_size:,} needs as many samples on each side, not {fewest:,}",
            "Take more samples, or smaller subsets",
        )
    found = kid_features_to_metric(
        torch.from_numpy(np.asarray(features, dtype=np.float64)),
        torch.from_numpy(np.asarray(others, dtype=np.float64)),
        kid_subsets=subsets,
        kid_subset_size=subset_size,
        rng_seed=seed,
        verbose=False,
    )
    return KernelDistance(found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD], subsets, subset_size, seed)
