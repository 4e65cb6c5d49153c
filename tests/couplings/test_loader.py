import shutil
from concurrent.futures import wait
from itertools import pairwise

import numpy as np
import pytest

from instaflow.couplings import loader
from instaflow.couplings.generate import stored_noise
from instaflow.couplings.loader import WINDOW, Couplings
from instaflow.couplings.manifest import write_manifest
from instaflow.couplings.prompts import prompt_of
from instaflow.couplings.records import Shard
from instaflow.couplings.shards import sidecar_path, tar_path, write_shard
from instaflow.errors import DataError
from instaflow.stores import StoreError
from tests.couplings.made import PROMPTS, make_couplings, manifest_of, sample

# 53 records planned in 11 shards of 5, three windows; LEFT_OUT are not there: 49 records, shards of 3 to 5
MANIFEST = manifest_of(count=53)
LEFT_OUT = [0, 11, 12, 52]


def _sample_but_left_out(noise, prompts):
    latent = sample(noise, prompts)
    for bad in stored_noise(MANIFEST, LEFT_OUT):
        latent[(noise == bad).all(axis=(1, 2, 3))] = np.nan
    return latent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_couplings(tmp_path_factory.mktemp("run") / "pairs", MANIFEST, _sample_but_left_out)


@pytest.fixture(scope="module")
def stream(folder):
    """The indices at positions 0 to 199: four epochs and a bit."""
    return [int(Couplings(folder, seed=0).batch(position, 1).indices[0]) for position in range(200)]


def reads_of(place, monkeypatch):
    """The shards that are read from now on in a folder."""
    read, read_shard = [], loader.read_shard

    def watch(folder, sidecar):
        if folder == place:  # others' reading ahead may not have ended
            read.append(sidecar.shard)
        return read_shard(folder, sidecar)

    monkeypatch.setattr(loader, "read_shard", watch)
    return read


def test_each_epoch_holds_each_record_once(folder, stream):
    present = sorted(set(range(53)) - set(LEFT_OUT))
    assert len(Couplings(folder, seed=0)) == 49
    for epoch in range(4):
        assert sorted(stream[epoch * 49 : (epoch + 1) * 49]) == present


@pytest.mark.parametrize("size", [2, 7, 16, 48, 49, 50, 120])
def test_any_batch_size_gives_the_same_stream(folder, stream, size):
    couplings = Couplings(folder, seed=0)
    read = np.concatenate([couplings.batch(position, size).indices for position in range(0, 200 - size, size)])
    assert read.tolist() == stream[: len(read)] and len(read) >= 120


@pytest.mark.parametrize("position", [0, 1, 17, 48, 49, 97, 131])
def test_any_position_is_read_at_once(folder, stream, position):
    assert Couplings(folder, seed=0).batch(position, 31).indices.tolist() == stream[position : position + 31]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_stream(folder, stream, world, workers):
    ranks = [Couplings(folder, seed=0, workers=workers) for _ in range(world)]
    read = [
        int(index)
        for position in range(0, 147, 12)  # three epochs of 49, and a batch over each one's end
        for rank in range(world)
        for index in ranks[rank].batch(position + rank * (12 // world), 12 // world).indices
    ]
    assert read == stream[: len(read)]
    for epoch in range(3):
        assert sorted(read[epoch * 49 : (epoch + 1) * 49]) == sorted(set(range(53)) - set(LEFT_OUT))


def test_without_workers_a_shard_is_read_when_it_is_due(folder, stream, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "pairs")
    read = reads_of(copy, monkeypatch)
    couplings = Couplings(copy, seed=0, workers=0)
    due: list[int] = []
    for position in range(49):
        couplings.batch(position, 1)
        due += [shard for shard in [stream[position] // 5] if shard not in due]
        assert read == due
    assert len(read) == 11


def test_a_batch_holds_the_records_of_its_indices(folder):
    batch = Couplings(folder, seed=0).batch(30, 40)  # over windows and an epoch's end
    prompts = [prompt_of(PROMPTS, index) for index in batch.indices]
    noise = stored_noise(MANIFEST, batch.indices.tolist()).astype(np.float32)
    assert batch.noise.dtype == batch.latent.dtype == np.float32 and batch.indices.dtype == np.int64
    assert batch.prompts == prompts and np.array_equal(batch.noise, noise)
    assert np.array_equal(batch.latent, sample(noise, prompts).astype(np.float16))


def test_epochs_and_seeds_differ_in_order(folder, stream):
    orders = [tuple(stream[epoch * 49 : (epoch + 1) * 49]) for epoch in range(4)]
    orders += [tuple(Couplings(folder, seed=seed).batch(0, 49).indices) for seed in (1, 2)]
    assert len(set(orders)) == len(orders)
    # shards are permuted between windows, records within one: both must show
    windows = [{index // 5 for index in order[: WINDOW * 3]} for order in orders]
    assert len(set(map(frozenset, windows))) > 1
    shards = [index // 5 for index in orders[0][: WINDOW * 3]]
    assert sum(one != other for one, other in pairwise(shards)) > WINDOW


def test_the_order_is_frozen(stream):
    # A run that resumes with another order would repeat and skip records: never change these values.
    assert stream[:12] == [50, 19, 47, 18, 48, 46, 14, 13, 49, 51, 17, 10]
    assert stream[49:61] == [43, 31, 42, 20, 30, 32, 25, 34, 24, 33, 28, 40]


def test_an_epoch_reads_each_shard_once_and_keeps_two_windows(folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "pairs")
    read = reads_of(copy, monkeypatch)
    couplings = Couplings(copy, seed=0)
    assert read == []
    for position in range(0, 49, 7):
        couplings.batch(position, 7)
        assert len(couplings._reading) <= 2 * WINDOW
    wait(couplings._reading.values())
    assert set(read) == set(range(11)) and len(read) <= 11 + WINDOW  # the next epoch's first window, ahead


def test_the_next_window_is_read_ahead_of_its_first_batch(folder, stream, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "pairs")
    couplings = Couplings(copy, seed=0)
    for position in (0, 20, 40, 60):  # one in each window of an epoch, and one in the next epoch
        assert couplings.batch(position, 1).indices[0] == stream[position]
        wait(couplings._reading.values())
        for tar in (copy / "shards").glob("*.tar"):
            tar.rename(tar.with_suffix(".away"))
        assert couplings.batch(position + 20, 1).indices[0] == stream[position + 20]
        for tar in (copy / "shards").glob("*.away"):
            tar.rename(tar.with_suffix(".tar"))


def test_what_could_not_be_read_ahead_is_read_when_it_is_due(folder, stream, monkeypatch):
    read_shard, first = loader.read_shard, Couplings(folder, seed=0)
    first.batch(0, 1)
    ahead = {int(shard) for shard in first._shards_after(0)}

    def fail(folder, sidecar):
        if sidecar.shard in ahead:
            raise StoreError("s3://bucket", ConnectionError("reset"), "read")
        return read_shard(folder, sidecar)

    couplings = Couplings(folder, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(loader, "read_shard", fail)
        couplings.batch(0, 1)
        wait(couplings._reading.values())
        with pytest.raises(StoreError, match="reset"):
            couplings.batch(0, 49)
    assert couplings.batch(0, 49).indices.tolist() == stream[:49]


def test_what_a_batch_does_not_take_stays_in_no_memory(tmp_path):
    images = {"image.png": dict.fromkeys(range(5), b"")}
    shard = Shard(*np.zeros((2, 5, 2, 4, 4), np.float16), ["a"] * 5, list(range(5)), images)
    folder = make_couplings(tmp_path / "pairs", manifest_of(count=5))
    write_shard(folder, 0, shard, left_out=[])
    couplings = Couplings(folder, seed=0)
    assert couplings.batch(0, 3).prompts == ["a"] * 3
    assert couplings._shard(0).extras == {}


def test_few_shards_are_decoded_once_for_all_epochs(tmp_path, monkeypatch):
    read, read_shard = [], loader.read_shard
    monkeypatch.setattr(loader, "read_shard", lambda *args: read.append(args) or read_shard(*args))
    folder = make_couplings(tmp_path / "pairs", manifest_of())
    couplings = Couplings(folder, seed=0)
    for position in range(0, 23 * 4, 4):
        couplings.batch(position, 4)
    assert len([place for place, _ in read if place == folder]) == 5


def test_couplings_that_lack_shards_are_refused_at_open(tmp_path):
    folder = make_couplings(tmp_path / "my run" / "pairs", manifest_of())
    for shard in 1, 4:
        sidecar_path(folder, shard).unlink()
    with pytest.raises(DataError, match="lacks 2 of its 5 shards") as caught:
        Couplings(folder, seed=0)
    assert f"`instaflow repair '{folder}'`" in caught.value.hint  # a couple stage that is done makes nothing again


def test_a_listing_is_not_trusted(tmp_path):
    folder = make_couplings(tmp_path / "pairs", manifest_of())
    tar_path(folder, 7).write_bytes(tar_path(folder, 0).read_bytes())
    assert sorted(Couplings(folder, seed=0).batch(0, 23).indices) == list(range(23))


def test_latents_of_another_shape_are_refused(tmp_path):
    folder = make_couplings(tmp_path / "pairs", manifest_of(latent_shape=(1, 4, 4)))
    (folder / "manifest.json").unlink()
    write_manifest(folder, manifest_of())  # numpy would stretch one channel to two
    with pytest.raises(DataError, match="latent_shape"):
        Couplings(folder, seed=0).batch(0, 1)


@pytest.mark.parametrize(("position", "size"), [(-1, 4), (0, 0)])
def test_no_batch_lies_before_the_stream_or_is_empty(folder, position, size):
    with pytest.raises(ValueError, match="no batch"):
        Couplings(folder, seed=0).batch(position, size)


def test_each_window_is_shuffled_in_its_own_way(tmp_path):
    couplings = Couplings(make_couplings(tmp_path / "pairs", manifest_of(count=40)), seed=0)  # two windows of 4 shards
    order = couplings._order(0)[0].tolist()

    def permutation(window):
        shards, rows = couplings._window(0, 20 * window)[1].T
        return [5 * (order.index(shard) - WINDOW * window) + row for shard, row in zip(shards, rows, strict=True)]

    assert sorted(permutation(0)) == sorted(permutation(1)) == list(range(20)) and permutation(0) != permutation(1)
