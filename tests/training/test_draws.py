import numpy as np

from instaflow.streams import random_stream, stream_key
from instaflow.training.draws import COLUMNS, draws


def test_draws_are_a_function_of_seed_name_and_position():
    first = draws(0, "2rf/", 64, 32)
    assert first.shape == (32, COLUMNS) and first.dtype == np.float64
    assert np.array_equal(first, draws(0, "2rf/", 64, 32))
    for other in (draws(1, "2rf/", 64, 32), draws(0, "3rf/", 64, 32), draws(0, "2rf/", 96, 32)):
        assert not np.isin(first, other).any()


def test_the_first_two_columns_are_one_stream_s_own():
    """What a training drew before there were crops."""
    alone = random_stream(stream_key("draws", 0, "2rf/"), 64).random_sample((32, 2))
    assert np.array_equal(draws(0, "2rf/", 64, 32)[:, :2], alone)


def test_draws_are_uniform_and_independent():
    numbers = np.concatenate([draws(0, "2rf/", position, 64) for position in range(0, 64 * 400, 64)])  # [25600, 4]
    assert numbers.min() >= 0 and numbers.max() < 1
    count = len(numbers)
    for column in numbers.T:
        spread = np.abs(np.sort(column) - (np.arange(count) + 0.5) / count).max()
        assert spread < 1.63 / np.sqrt(count)  # Kolmogorov's bound at 1 %
    assert np.abs(np.corrcoef(numbers.T) - np.eye(COLUMNS)).max() < 4 / np.sqrt(count)
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 4 / np.sqrt(count)
