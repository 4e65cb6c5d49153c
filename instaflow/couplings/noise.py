"""The noise of a coupling: a function of the run's seed, the stage's name and the record's index alone."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np


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


def stream_key(*name: str | int) -> int:
    """A Philox key, 128 bits, for a named family of random streams."""
    return int.from_bytes(hashlib.sha256(json.dumps(name).encode()).digest()[:16], "little")


def random_stream(key: int, counter: int) -> np.random.RandomState:
    """One random stream of the family `key`; `counter` in [0, 2^64) picks it, and no two overlap.

    The counter fills the highest of Philox's four words, so each stream has 2^192 blocks of its own. RandomState,
    because NumPy promises its values for ever (NEP 19) and Generator's only until they can be improved. Its normals
    are float64: where a machine's `log` differs in the last bit, the rounding to float32 hides it.
    """
    return np.random.RandomState(np.random.Philox(key=key, counter=int(counter) << 192))
