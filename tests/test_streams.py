import hashlib
import itertools

import numpy as np
import pytest

from instaflow.streams import random_stream, stream_key


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3)."""
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * counter[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * counter[2], 2**64)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B97F4A7C15) % 2**64, (key[1] + 0xBB67AE8584CAA73B) % 2**64]
    return counter


def test_the_bits_are_those_of_every_machine():
    # SHA-256, and Philox as published: another rule would make every couplings folder out there unverifiable.
    key = int.from_bytes(hashlib.sha256(b'["noise", 0, "pairs"]').digest()[:16], "little")
    assert stream_key("noise", 0, "pairs") == key
    words = [word for block in (1, 2) for word in philox([block, 0, 0, 7], [key % 2**64, key >> 64])]
    assert random_stream(key, 7).randint(0, 2**64, 8, np.uint64).tolist() == words


def test_a_key_is_128_bits_and_its_name_is_all_of_it():
    names = [("a", 1), ("a", "1"), ("a", 10), ("a1",), ("a", 1, ""), ("1", "a"), ("", "a", 1), ("a",), ("é",)]
    keys = [stream_key(*name) for name in names]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**128 for key in keys)
    assert max(keys) >= 2**120


def test_streams_do_not_depend_on_the_order_of_asking():
    key = stream_key("noise")
    forwards = [random_stream(key, counter).standard_normal(5) for counter in range(6)]
    backwards = [random_stream(key, counter).standard_normal(5) for counter in reversed(range(6))]
    assert np.array_equal(forwards, backwards[::-1])


def test_streams_share_no_values():
    blocks = [
        random_stream(stream_key(name), counter).randint(0, 2**63, 1000, np.int64)
        for name, counter in itertools.product(["pairs", "pairs2"], [0, 1, 2, 2**32, 2**64 - 1])
    ]
    assert len(set(np.concatenate(blocks).tolist())) == 1000 * len(blocks)


def test_a_stream_is_no_later_part_of_its_neighbour():
    key = stream_key("noise")
    first = random_stream(key, 0).bytes(2**20)
    assert random_stream(key, 1).bytes(32) not in first


@pytest.mark.parametrize("counter", [-1, 2**64])
def test_a_counter_out_of_range_is_refused(counter):
    with pytest.raises(ValueError, match="counter"):
        random_stream(0, counter)


def test_normals_have_unit_variance_across_streams():
    firsts = np.array([random_stream(stream_key("noise"), counter).standard_normal() for counter in range(4000)])
    assert abs(firsts.mean()) < 5 / 4000**0.5
    assert abs(firsts.var() - 1) < 5 * (2 / 4000) ** 0.5
