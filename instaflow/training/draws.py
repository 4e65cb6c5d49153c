"""The random numbers of a training step: a function of seed, stage and position alone, so that none are stored."""

import numpy as np

from instaflow.streams import random_stream, stream_key

TIME, DROPOUT, CROP, PROMPT, STEP = 0, 1, slice(2, 4), 4, 5
COLUMNS = 6


def draws(seed: int, name: str, position: int, size: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [size, COLUMNS]: a row for each sample of the global batch at `position`.

    Every process draws the whole batch's and takes its rows, so the number of processes does not change them.
    """
    first = random_stream(stream_key("draws", seed, name), position).random_sample((size, 2))
    crops = random_stream(stream_key("crops", seed, name), position).random_sample((size, 2))
    choices = random_stream(stream_key("choices", seed, name), position).random_sample((size, 2))
    return np.concatenate([first, crops, choices], axis=1)
