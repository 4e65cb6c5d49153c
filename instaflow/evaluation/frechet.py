"""Fréchet distance of two sets of features, each read as a Gaussian."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from instaflow.errors import InstaFlowError

BLOCK = 4096
"""Samples whose influence is computed at a time: of 2,048 features in 64-bit numbers 67 MB, a few times over."""


@dataclass(frozen=True)
class Gaussian:
    """mean: [D]; covariance: [D, D]; float64. Of a reference, computed once and compared with many sets."""

    mean: np.ndarray
    covariance: np.ndarray

    @cached_property
    def root(self) -> np.ndarray:
        """R [D, rank] with R Rᵀ = C, the covariance; eigenvalues within rounding of 0 count as 0.

        Of 2,048 features it takes seconds.
        """
        values, vectors = np.linalg.eigh(self.covariance)
        positive = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return vectors[:, positive] * np.sqrt(values[positive])

    @classmethod
    def of(cls, features: np.ndarray) -> "Gaussian":
        """The Gaussian of `features` [N, D], with the unbiased covariance (divided by N - 1)."""
        values = np.asarray(features, dtype=np.float64)
        if values.ndim != 2:
            raise InstaFlowError(f"features must have the shape [N, D], not {list(values.shape)}")
        if len(values) < 2:
            raise InstaFlowError(f"a Fréchet distance needs at least 2 samples on each side, not {len(values)}")
        if not np.isfinite(values).all():
            broken = int((~np.isfinite(values).all(axis=1)).sum())
            raise InstaFlowError(f"{broken} of {len(values)} samples have features that are not finite")
        mean = values.mean(axis=0)
        centred = values - mean
        return cls(mean, centred.T @ centred / (len(values) - 1))


def frechet_distance(a: np.ndarray | Gaussian, b: np.ndarray | Gaussian) -> float:
    """||μ_a - μ_b||² + Tr(C_a + C_b - 2 (C_a C_b)^½), as in Heusel et al. 2017 (arXiv 1706.08500), eq. 6.

    a, b: features [N, D] or their `Gaussian`. The eigenvalues of C_a C_b are the squared singular values of
    R_aᵀ R_b, so that the trace of its root is their sum: no root is taken of a value that rounding made of 0.
    """
    a, b = (side if isinstance(side, Gaussian) else Gaussian.of(side) for side in (a, b))
    if a.mean.shape != b.mean.shape:
        raise InstaFlowError(f"the two sides have {len(a.mean)} and {len(b.mean)} features; they must be the same ones")
    trace_of_root = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_of_root
    return max(float(distance), 0.0)


def influence(features: np.ndarray, own: Gaussian, other: Gaussian) -> np.ndarray:
    """What each sample adds to the Fréchet distance of `own`, the Gaussian of `features` [N, D], and `other`: [N].

    The first variation of the distance, 2 (μ - μ')·c + |c|² - cᵀ A c of a sample c from the mean, where A is the
    optimal map from one covariance to the other; up to a constant. The variance of its mean is that of the distance,
    to first order in 1 / N (Rippl, Munk, Sturm 2016, arXiv 1507.04090): of few samples it comes out too large.
    """
    across = own.root.T @ other.root
    squares, turned = np.linalg.eigh(across @ across.T)
    moved = np.sqrt(np.clip(squares, 0, None))
    axes = own.root / np.sum(own.root**2, axis=0) @ turned

    def of(block: np.ndarray) -> np.ndarray:
        centred = np.asarray(block, dtype=np.float64) - own.mean
        return 2 * centred @ (own.mean - other.mean) + np.sum(centred**2, axis=1) - (centred @ axes) ** 2 @ moved

    return np.concatenate([of(features[start : start + BLOCK]) for start in range(0, len(features), BLOCK)])
