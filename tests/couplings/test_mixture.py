"""Two couple stages as one stream: exact shares, each source's own epochs, any batch at any position."""

import numpy as np
import pytest

from instaflow.couplings.loader import Couplings
from instaflow.couplings.mixture import Mixture
from tests.couplings.made import make_couplings, manifest_of

SHARE = 0.3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    real = manifest_of(stage="inverted", count=7)
    return make_couplings(run / "pairs", manifest_of()), make_couplings(run / "inverted", real)


def mixture(folders, seed=0, stage="2rf", share=SHARE):
    return Mixture(*(Couplings(folder, seed) for folder in folders), share, seed=seed, stage=stage)


@pytest.fixture(scope="module")
def stream(folders):
    """Of each of the first 2,500 positions the noise, which tells source and index."""
    return mixture(folders).batch(0, 2500)


def is_real(folders, batch):
    real = {one.tobytes() for one in Couplings(folders[1], 0).batch(0, 7).noise}
    return np.array([one.tobytes() in real for one in batch.noise])


def test_the_share_is_exact_in_each_thousand_and_spread_over_it(folders, stream):
    real = is_real(folders, stream)
    assert real[:1000].sum() == real[1000:2000].sum() == 300
    assert (real[:1000] != real[1000:2000]).any()
    assert all(20 <= part.sum() <= 40 for part in real[:2000].reshape(-1, 100))


def test_a_share_between_two_thousandths_is_the_nearer_one(folders):
    assert is_real(folders, mixture(folders, share=2 / 3).batch(0, 1000)).sum() == 667


def test_each_source_comes_in_its_own_order_and_each_record_once_an_epoch(folders, stream):
    real = is_real(folders, stream)
    for folder, chosen in zip(folders, (~real, real), strict=True):
        couplings = Couplings(folder, 0)
        expected = couplings.batch(0, int(chosen.sum()))
        np.testing.assert_array_equal(stream.noise[chosen], expected.noise)
        np.testing.assert_array_equal(stream.latent[chosen], expected.latent)
        assert [stream.prompts[row] for row in np.flatnonzero(chosen)] == expected.prompts
        indices = stream.indices[chosen]
        assert sorted(indices[: len(couplings)]) == list(range(len(couplings)))


@pytest.mark.parametrize("size", [1, 7, 64, 700])
def test_any_batch_at_any_position_is_that_part_of_the_stream(folders, stream, size):
    one = mixture(folders)
    for position in (0, 1, 63, 990, 999, 1000, 1777):
        batch = one.batch(position, size)
        np.testing.assert_array_equal(batch.noise, stream.noise[position : position + size])
        np.testing.assert_array_equal(batch.indices, stream.indices[position : position + size])
        assert batch.prompts == stream.prompts[position : position + size]


def test_spans_name_what_a_batch_is_made_of(folders):
    one = mixture(folders)
    spans = one.spans(995, 100)
    assert [span.couplings for span in spans] == [one.couplings, one.real]
    assert sum(span.size for span in spans) == 100 and sum(span.position for span in spans) == 995


def test_the_draw_follows_seed_and_stage(folders, stream):
    real = is_real(folders, stream)[:1000]
    for other in mixture(folders, stage="3rf"), mixture(folders, seed=1):
        assert (is_real(folders, other.batch(0, 1000)) != real).any()
