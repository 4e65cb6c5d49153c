"""The noise of a coupling: a function of the run's seed, the stage's name and the record's index alone."""

from collections.abc import Sequence

import numpy as np

from instaflow.streams import random_stream, stream_key


def coupled_noise(seed: int, stage: str, indices: Sequence[int] | range, shape: tuple[int, ...]) -> np.ndarray:
    """Noise of unit variance for each index: float32 [N, *shape].

    A record's noise does not depend on the other indices, so batches and processes can be cut anywhere. `stage` is
    the stage's name, or "evaluate" or "sample": no two of them share noise.
    """
    key = stream_key("noise", seed, stage)
    noise = np.empty((len(indices), *shape), np.float32)
    for row, index in enumerate(indices):
        noise[row] = random_stream(key, index).standard_normal(shape)
    return noise
