"""Random numbers by name and position: the same bits on every machine, in any order of asking."""

import hashlib
import json

import numpy as np


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
