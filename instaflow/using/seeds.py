"""Seeds: the names of noises, and how they are written.

The noise of an image has two numbers, a seed and an index. `instaflow sample --seed 7` gives its first image the noise
(7, 0), the second (7, 1), and so on. A seed alone stands for its first noise: (7, 0) is written 7, and (7, 3) 7:3.
"""

import re
from collections.abc import Sequence

import numpy as np

from instaflow.couplings.noise import coupled_noise
from instaflow.errors import ConfigError

Seed = int | tuple[int, int]
Seeds = int | Sequence[Seed]
"""One, or several in a list, a tuple or a range: (3, 4) is two seeds, [(3, 4)] the noise 4 of seed 3."""
MOST = 10_000_000
"""Seeds of one command."""
INDICES = 1 << 64  # of one seed
HINT = "Write, say, 7 or 0-99 or 3,5,8-11; 7:3 is the noise of the fourth image of --seed 7"
DIGITS = r"(\d{1,40})"
PART = re.compile(rf"{DIGITS}(?:-{DIGITS}|:{DIGITS})?")


def parse_seeds(text: str) -> list[Seed]:
    """The seeds that a text names: single ones and ranges, both ends included, between commas. Raises ConfigError."""
    seeds: list[Seed] = []
    for part in text.split(","):
        found = PART.fullmatch(part.strip())
        if found is None:
            raise ConfigError(f"'{part}' in the seeds '{text}' is neither a seed nor a range of them", HINT)
        first, last, index = int(found[1]), int(found[2] or found[1]), int(found[3] or 0)
        if last < first:
            raise ConfigError(f"The range of seeds '{part}' ends before it begins", f"Write {last}-{first}")
        if len(seeds) + last - first >= MOST:
            raise ConfigError(f"'{text}' names more than {MOST:,} seeds", "Draw them by several commands")
        if index >= INDICES:
            raise ConfigError(f"'{part}' asks for a noise that a seed does not have", f"It has {INDICES:,}")
        seeds += range(first, last + 1) if not index else [(first, index)]
    return seeds


def written(seed: Seed) -> str:
    """A seed as `parse_seeds` reads it."""
    first, index = numbered(seed)
    return f"{first}:{index}" if index else f"{first}"


def numbered(seed: Seed) -> tuple[int, int]:
    """The seed and the index of a noise. Raises ConfigError where it is neither a number nor a pair of them."""
    pair = seed if isinstance(seed, tuple) else (seed, 0)
    whole = all(isinstance(number, int | np.integer) and not isinstance(number, bool) for number in pair)
    if len(pair) != 2 or not whole or min(pair) < 0 or pair[1] >= INDICES:
        raise ConfigError(f"{seed!r} is no seed", "A seed is a whole number from 0 on, or a pair of seed and index")
    return int(pair[0]), int(pair[1])


def noise_of(seeds: Sequence[Seed], shape: tuple[int, int, int]) -> np.ndarray:
    """The noises of these seeds, unit variance: float32 [N, C, H, W]; a function of seed, index and shape alone."""
    noise = np.empty((len(seeds), *shape), np.float32)
    for row, seed in enumerate(seeds):
        first, index = numbered(seed)
        noise[row] = coupled_noise(first, "sample", [index], shape)[0]
    return noise
