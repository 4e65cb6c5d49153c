"""What seeds are called, and which noise each stands for."""

import numpy as np
import pytest

from instaflow.couplings.noise import coupled_noise
from instaflow.errors import ConfigError
from instaflow.using.seeds import noise_of, parse_seeds, written

SHAPE = (2, 4, 4)


def test_ranges_and_single_seeds_are_read_in_their_order():
    assert parse_seeds("3,5,8-11") == [3, 5, 8, 9, 10, 11]
    assert parse_seeds(" 0-2 , 7") == [0, 1, 2, 7]
    assert parse_seeds("7:3,7:0,4-4") == [(7, 3), 7, 4]
    assert len(parse_seeds("0-99999")) == 100_000


@pytest.mark.parametrize("seed", [0, 7, (7, 3), (0, 2**63)])
def test_a_seed_is_read_as_it_was_written(seed):
    assert parse_seeds(written(seed)) == [seed]


@pytest.mark.parametrize(
    "text", ["", "3,", "-1", "a", "3-", "5-3", "1.5", "3:4:5", "1-2:3", "0-9999999999", "1:" + "9" * 30, "9" * 5000]
)
def test_what_is_no_seed_is_refused(text):
    with pytest.raises(ConfigError) as caught:
        parse_seeds(text)
    assert caught.value.hint


def test_the_noises_are_those_of_the_command_line():
    """Image i of `--seed s` has the noise (s, i); the seed s alone is its first."""
    whole = coupled_noise(7, "sample", range(4), SHAPE)
    assert np.array_equal(noise_of([(7, 3), 7, (7, 1)], SHAPE), whole[[3, 0, 1]])
    assert not np.array_equal(noise_of([8], SHAPE)[0], whole[1])
