import hashlib

import numpy as np

from instaflow.couplings.noise import coupled_noise

SHAPE = (4, 8, 8)


def test_noise_is_the_same_for_any_split_and_order():
    whole = coupled_noise(0, "pairs", range(10), SHAPE)
    assert whole.shape == (10, *SHAPE) and whole.dtype == np.float32
    assert np.array_equal(
        np.concatenate([coupled_noise(0, "pairs", part, SHAPE) for part in ([0], [1, 2], range(3, 10))]), whole
    )
    assert np.array_equal(coupled_noise(0, "pairs", [7, 3], SHAPE), whole[[7, 3]])


def test_the_bits_are_frozen():
    # Couplings made with other bits could not be resumed or repaired: never change this value.
    noise = coupled_noise(20230913, "pairs", [0, 1, 12345678], SHAPE)
    assert (
        hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest()
        == "0123d645a547f9bab1a6c0d7265f74cd4b8d73f9c61860a87ff06f205039cec6"
    )


def test_seeds_stages_and_indices_share_no_noise():
    names = [(0, "pairs"), (0, "pairs2"), (1, "pairs"), (0, "evaluate"), (0, "sample"), (1, "2rf"), (12, "rf")]
    noises = [coupled_noise(seed, stage, [*range(50), 2**32, 2**63], SHAPE) for seed, stage in names]
    values = np.concatenate(noises).ravel()
    # float32 normals coincide by chance, so neighbouring pairs of values are compared
    pairs = values.view(np.uint32).astype(np.uint64)
    pairs = (pairs[:-1] << np.uint64(32)) | pairs[1:]
    assert len(np.unique(pairs)) == len(pairs)


def test_noise_is_standard_normal():
    noise = coupled_noise(3, "pairs", range(400), SHAPE).astype(np.float64)  # 102,400 values
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.15
    rows = noise.reshape(400, -1)
    neighbours = (rows[:-1] * rows[1:]).mean()  # uncorrelated from index to index
    assert abs(neighbours) < 0.02
