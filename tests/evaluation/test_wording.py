import math

import pytest

from instaflow.evaluation import wording
from instaflow.plurals import counted


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0312, "0.0312"),
        (0.9996, "1.00"),
        (9.996, "10.0"),
        (6.414, "6.41"),
        (23.44, "23.4"),
        (99.96, "100"),
        (1234.4, "1,234"),
        (3.1e-6, "3.1e-06"),
        (-0.5, "-0.500"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_number(value, text):
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0027, "2.70 ms"),
        (1.7, "1.70 s"),
        (48.2, "48 s"),
        (59.7, "1 min 00 s"),
        (311.6, "5 min 12 s"),
        (3599.8, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (3 * 86400, "3.0 days"),
        (math.inf, "–"),
    ],
)
def test_duration(seconds, text):
    assert wording.duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == text


def test_one_thing_is_told_as_one():
    assert [counted(count, "shard") for count in (0, 1, 2, 4096)] == [
        "0 shards",
        "1 shard",
        "2 shards",
        "4,096 shards",
    ]


@pytest.mark.parametrize(
    ("mean", "half", "scale", "text"),
    [
        (0.30814, 0.00423, 1, "0.3081 ± 0.0042"),
        (0.98623, 0.00154, 100, "98.62 ± 0.15"),
        (2.4712, 0.1196, 1, "2.47 ± 0.12"),
        (2.4712, 0.0996, 1, "2.47 ± 0.10"),
        (4.7, 13.2, 1, "5 ± 13"),
        (0.3, 2e-9, 1, "0.30000 ± 0.00000"),
        (0.3081, 0.0, 1, "0.308 ± 0"),
        (0.3081, None, 1, "0.308"),
        (0.5, math.nan, 100, "50.0"),
        (None, None, 1, "–"),
        (math.inf, 1.0, 1, "–"),
    ],
)
def test_plus_minus_shows_two_digits_of_the_uncertainty(mean, half, scale, text):
    assert wording.plus_minus(mean, half, scale=scale).replace("\N{NO-BREAK SPACE}", " ") == text
