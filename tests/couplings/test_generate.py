import numpy as np
import pytest

from instaflow.couplings.generate import Made, stored_noise
from instaflow.couplings.loader import Couplings
from instaflow.couplings.noise import coupled_noise
from instaflow.couplings.prompts import prompt_of
from instaflow.couplings.records import read_extra
from instaflow.couplings.shards import read_shard, read_sidecar
from instaflow.couplings.verify import verify
from instaflow.errors import DataError
from tests.couplings.made import PROMPTS, at_once, contents, make_couplings, make_shard, manifest_of, sample


def test_a_record_is_its_index_noise_prompt_and_latent(tmp_path):
    manifest = manifest_of()
    sidecar = make_shard(tmp_path, 4, manifest, PROMPTS, at_once(sample))
    assert sidecar == read_sidecar(tmp_path, 4, manifest.plan)
    assert (sidecar.count, sidecar.first_index, sidecar.last_index, sidecar.left_out) == (3, 20, 22, ())
    records = read_shard(tmp_path, sidecar)
    noise = coupled_noise(0, "pairs", range(20, 23), (2, 4, 4)).astype(np.float16)
    prompts = [prompt_of(PROMPTS, index) for index in range(20, 23)]
    assert records.indices == [20, 21, 22] and records.prompts == prompts
    assert records.noise.dtype == np.float16 and np.array_equal(records.noise, noise)
    assert np.array_equal(records.latent, sample(noise.astype(np.float32), prompts).astype(np.float16))


def test_noise_is_rounded_before_it_is_integrated(tmp_path):
    seen = []

    def keep(noise, prompts):
        assert noise.dtype == np.float32
        seen.append(noise)
        return noise

    sidecar = make_shard(tmp_path, 0, manifest_of(), PROMPTS, at_once(keep))
    records = read_shard(tmp_path, sidecar)
    assert np.array_equal(np.concatenate(seen), records.noise.astype(np.float32))
    assert not np.array_equal(np.concatenate(seen), coupled_noise(0, "pairs", range(5), (2, 4, 4)))
    exact = make_shard(tmp_path, 0, manifest_of(stored_dtype="float32"), PROMPTS, at_once(keep))
    assert np.array_equal(read_shard(tmp_path, exact).noise, coupled_noise(0, "pairs", range(5), (2, 4, 4)))


def test_batches_are_cut_from_the_shards_first_index(tmp_path):
    sizes, told = [], []

    def count(noise, prompts):
        sizes.append(len(prompts))
        return noise

    make_shard(tmp_path, 1, manifest_of(), PROMPTS, at_once(count), report=told.append)
    assert sizes == told == [2, 2, 1]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_changes_no_byte_of_an_elementwise_sampler(tmp_path, batch_size):
    one = make_couplings(tmp_path / "one", manifest_of())
    other = make_couplings(tmp_path / "other", manifest_of(batch_size=batch_size))
    assert contents(one / "shards") == contents(other / "shards")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 70000.0])  # float16 ends at 65504
def test_latents_that_are_not_finite_are_left_out(tmp_path, value):
    manifest = manifest_of()
    bad = stored_noise(manifest, [5, 8])

    def fail_at_5_and_8(noise, prompts):
        latent = noise.copy()
        for row in range(len(noise)):
            if any(np.array_equal(noise[row], one) for one in bad):
                latent[row, 1, 2, 3] = value
        return latent

    sidecar = make_shard(tmp_path, 1, manifest, PROMPTS, at_once(fail_at_5_and_8))
    assert (sidecar.count, sidecar.first_index, sidecar.last_index, sidecar.left_out) == (3, 5, 9, (5, 8))
    records = read_shard(tmp_path, read_sidecar(tmp_path, 1, manifest.plan))
    assert records.indices == [6, 7, 9] and records.prompts == [PROMPTS[1], PROMPTS[2], PROMPTS[4]]
    assert np.array_equal(records.noise, stored_noise(manifest, [6, 7, 9]))


@pytest.mark.parametrize("helps", [True, False])
def test_unsound_latents_are_sampled_once_more_with_more_care(tmp_path, helps):
    """One that is not finite, a constant one and one that diverged: each alone, with its own noise and prompt."""
    manifest, asked = manifest_of(batch_size=5), []

    def spoil(noise, prompts):
        latent = sample(noise, prompts)
        latent[0], latent[2], latent[3] = np.nan, latent[2, :, :1, :1], 1000 * latent[3]
        return latent

    def care(noise, prompts):
        asked.append((noise, prompts))
        return sample(noise, prompts) if helps else spoil(np.concatenate([noise, noise]), prompts * 2)[[0, 2, 3]]

    sidecar = make_shard(tmp_path, 1, manifest, PROMPTS, at_once(spoil), again=at_once(care))
    bad = [5, 7, 8]
    (noise, prompts), *more = asked
    assert not more and prompts == [PROMPTS[index % 5] for index in bad]
    assert np.array_equal(noise, stored_noise(manifest, bad).astype(np.float32))
    assert sidecar.left_out == (() if helps else (5, 7, 8))
    if helps:
        (tmp_path / "whole").mkdir()
        whole = make_shard(tmp_path / "whole", 1, manifest, PROMPTS, at_once(sample))
        assert sidecar == whole


def test_a_batch_is_begun_before_the_one_before_it_is_fetched(tmp_path):
    """So a device never waits for the copy of what it made; and no more than two are under way."""
    events = []

    def begin(indices, noise, prompts):
        batch = sum(name == "begin" for name, _ in events)
        events.append(("begin", batch))

        def fetch():
            events.append(("fetch", batch))
            return Made(sample(noise, prompts))

        return fetch

    make_shard(tmp_path, 0, manifest_of(), PROMPTS, begin)
    assert events == [("begin", 0), ("begin", 1), ("fetch", 0), ("begin", 2), ("fetch", 1), ("fetch", 2)]


def test_a_few_records_may_all_be_left_out(tmp_path):
    """A shard of one, say, the last of a stage; the loader and verify take it for what it is."""
    manifest, bad = manifest_of(count=23, records_per_shard=2), stored_noise(manifest_of(), [2, 3, 22])

    def spoil(noise, prompts):
        latent = sample(noise, prompts)
        spoilt = [any(np.array_equal(row, one) for one in bad.astype(np.float32)) for row in noise]
        latent[spoilt] = np.nan
        return latent

    folder = make_couplings(tmp_path / "pairs", manifest, spoil)
    assert [read_sidecar(folder, shard, manifest.plan).left_out for shard in (1, 11)] == [(2, 3), (22,)]
    assert verify(folder) == []
    indices = Couplings(folder, seed=0).batch(0, 20).indices
    assert sorted(indices.tolist()) == [index for index in range(23) if index not in (2, 3, 22)]


def test_couplings_that_were_all_left_out_are_refused(tmp_path):
    nothing = make_couplings(tmp_path / "pairs", manifest_of(), lambda noise, prompts: noise * np.float32(np.nan))
    with pytest.raises(DataError, match="holds not one coupling"):
        Couplings(nothing, seed=0)


def test_a_shard_without_a_finite_latent_is_an_error(tmp_path):
    manifest = manifest_of(records_per_shard=8)
    with pytest.raises(DataError, match="the first is not finite") as caught:
        make_shard(tmp_path, 0, manifest, PROMPTS, at_once(lambda noise, prompts: noise * np.float32(np.nan)))
    assert "float32" in caught.value.hint and contents(tmp_path) == {}


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_stopped_shard_leaves_nothing_behind(tmp_path, batches):
    answers = iter([False] * batches + [True])
    assert make_shard(tmp_path, 0, manifest_of(), PROMPTS, at_once(sample), stop=lambda: next(answers)) is None
    assert contents(tmp_path) == {}


def test_a_sampler_of_the_wrong_shape_is_a_mistake_in_the_code(tmp_path):
    with pytest.raises(ValueError, match="sampler returned"):
        make_shard(tmp_path, 0, manifest_of(), PROMPTS, at_once(lambda noise, prompts: noise[:, :1]))


# --- what records hold besides ----------------------------------------------------------------------------------------


def with_embeddings(spoilt=()):
    """A `Sampler` whose records hold their index as embedding; the spoilt ones infinity."""

    def begin(indices, noise, prompts):
        def value(index):
            return np.full((2, 3), np.inf if index in spoilt else index, np.float16)

        return lambda: Made(sample(noise, prompts), {"embedding.npy": {index: value(index) for index in indices}})

    return begin


def extras_of(folder, sidecar):
    files = read_shard(folder, sidecar).extras.get("embedding.npy", {})
    return {index: float(read_extra("embedding.npy", content)[0, 0]) for index, content in files.items()}


def test_what_records_hold_besides_goes_with_them(tmp_path):
    sidecar = make_shard(tmp_path, 1, manifest_of(), PROMPTS, with_embeddings())
    assert extras_of(tmp_path, sidecar) == {index: index for index in range(5, 10)}


def test_a_record_that_holds_anything_not_finite_is_made_again_or_left_out(tmp_path):
    sidecar = make_shard(tmp_path, 1, manifest_of(), PROMPTS, with_embeddings(spoilt=[6, 9]))
    assert sidecar.left_out == (6, 9)
    assert extras_of(tmp_path, sidecar) == {5: 5, 7: 7, 8: 8}
    again = with_embeddings(spoilt=[9])
    sidecar = make_shard(tmp_path, 1, manifest_of(), PROMPTS, with_embeddings(spoilt=[6, 9]), again=again)
    assert sidecar.left_out == (9,)
    assert extras_of(tmp_path, sidecar) == {5: 5, 6: 6, 7: 7, 8: 8}
