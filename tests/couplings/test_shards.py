import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest

from instaflow.couplings.shards import (
    FIELDS,
    BadShard,
    Shard,
    ShardPlan,
    _encode,
    read_shard,
    read_sidecar,
    shards_to_make,
    sidecar_path,
    tar_path,
    write_shard,
)
from instaflow.couplings.verify import verify
from instaflow.errors import DataError
from tests.couplings.made import PROMPTS, contents, make_couplings, manifest_of

fork = multiprocessing.get_context("fork")


@pytest.mark.parametrize(("count", "size"), [(23, 5), (25, 5), (1, 5), (5, 1), (4, 9)])
def test_the_plan_puts_each_index_in_one_shard(count, size):
    plan = ShardPlan(count, size)
    shards = [plan.indices(shard) for shard in range(plan.num_shards)]
    assert [index for indices in shards for index in indices] == list(range(count))
    assert all(index // size == shard for shard, indices in enumerate(shards) for index in indices)
    for batch_size in (1, 2, 7):
        batches = plan.batches(0, batch_size)
        assert [index for batch in batches for index in batch] == list(shards[0])
        assert all(len(batch) == batch_size for batch in batches[:-1]) and len(batches[-1]) in range(1, batch_size + 1)


def test_a_shard_is_a_webdataset_with_fixed_bytes(tmp_path):
    make_couplings(tmp_path, manifest_of())
    with tarfile.open(tar_path(tmp_path, 1)) as tar:
        members = tar.getmembers()
        names = [f"{index:09d}.{field}" for index in range(5, 10) for field in FIELDS]
        assert [member.name for member in members] == names
        stamps = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members}
        assert stamps == {(0, 0, 0, "instaflow", "instaflow", 0o444)}
        assert json.load(tar.extractfile("000000007.json")) == {"prompt": PROMPTS[2], "index": 7}
    sha256 = "4815b0ec5e71e68407ce2261da711f9b6794ac593d0e90a6d096af1c5f212185"
    assert read_sidecar(tmp_path, 1, manifest_of().plan).sha256 == sha256
    assert hashlib.sha256(tar_path(tmp_path, 1).read_bytes()).hexdigest() == sha256


def test_plain_webdataset_reads_it(tmp_path):
    import webdataset

    manifest = manifest_of()
    make_couplings(tmp_path, manifest)
    records = read_shard(tmp_path, read_sidecar(tmp_path, 0, manifest.plan))
    samples = list(webdataset.WebDataset(str(tar_path(tmp_path, 0)), shardshuffle=False).decode())
    assert [sample["json"] for sample in samples] == [
        {"prompt": prompt, "index": index} for prompt, index in zip(records.prompts, records.indices, strict=True)
    ]
    assert np.array_equal([sample["noise.npy"] for sample in samples], records.noise)
    assert np.array_equal([sample["latent.npy"] for sample in samples], records.latent)


def test_readers_import_no_torch():
    code = "import sys, instaflow.couplings.verify, instaflow.couplings.loader; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_pickled_arrays_are_refused(tmp_path):
    latent = np.array([[[[None]]]], dtype=object)
    sidecar = write_shard(tmp_path, 0, Shard(latent, latent, ["a"], [0]), left_out=[])
    with pytest.raises(BadShard, match="allow_pickle"):
        read_shard(tmp_path, sidecar)


def _members(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no tar at all",
        _members([f"{0:09d}.{field}" for field in FIELDS]),  # empty members
        _members([f"{1:09d}.{field}" for field in FIELDS]),
        _members([f"{0:09d}.{field}" for field in reversed(FIELDS)]),
        _members([f"{0:09d}.{field}" for field in FIELDS] + ["../../escape.npy"]),
        _encode(Shard(np.zeros((2, 1, 1, 1)), np.zeros((2, 1, 1, 1)), ["a", "b"], [0, 1])),
        _encode(Shard(np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1, 1)), ["a"], [0])).replace(
            b'"index": 0', b'"index": 1'
        ),
    ],
)
def test_a_foreign_tar_is_refused_even_with_its_own_hash(tmp_path, data):
    records = Shard(np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1, 1)), ["a"], [0])
    sidecar = write_shard(tmp_path, 0, records, left_out=[])
    assert read_shard(tmp_path, sidecar).prompts == ["a"]
    tar_path(tmp_path, 0).write_bytes(data)
    forged = sidecar.model_copy(update={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    with pytest.raises(BadShard, match="cannot be decoded"):
        read_shard(tmp_path, forged)


@pytest.mark.parametrize(
    "change",
    [
        {"count": 4},
        {"last_index": 10},
        {"left_out": [6]},
        {"left_out": [12], "count": 4},
        {"left_out": [7, 6], "count": 3},
        {"left_out": [6, 6], "count": 3},
        {"shard": 2},
        {"first_index": 0, "last_index": 4},
        {"last_index": 10**15},
        {"count": "5"},
        {"sha256": None},
        {"comment": ""},
        {"format_version": 2},
    ],
)
def test_a_sidecar_that_does_not_add_up_is_refused(tmp_path, change):
    make_couplings(tmp_path, manifest_of())
    plan = manifest_of().plan
    path = sidecar_path(tmp_path, 1)
    sidecar = json.loads(path.read_text())
    read_sidecar(tmp_path, 1, plan)
    path.write_text(json.dumps(sidecar | change))
    with pytest.raises(BadShard) as caught:
        read_sidecar(tmp_path, 1, plan)
    assert str(path) in caught.value.message and f"instaflow repair {tmp_path}" in caught.value.hint


def test_a_new_tar_never_stands_beside_the_old_sidecar(tmp_path, monkeypatch):
    def records(value: float) -> Shard:
        return Shard(np.full((1, 1, 1, 1), value), np.zeros((1, 1, 1, 1)), ["a"], [0])

    write_shard(tmp_path, 0, records(1.0), left_out=[])
    monkeypatch.setattr("instaflow.couplings.shards.write_json", lambda path, value: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_shard(tmp_path, 0, records(2.0), left_out=[])
    assert shards_to_make(tmp_path, ShardPlan(1, 1)) == [0]


def _run(target, *args) -> int:
    """The exit code of a child process; negative: the signal that ended it."""
    process = fork.Process(target=target, args=args)
    process.start()
    process.join()
    return process.exitcode


def _couple_until(writes: int, folder) -> None:
    """Couple, and die by SIGKILL just before the given write: an open, a sync, a rename, a removal or a folder made."""
    seen = 0

    def die_at_last(event: str, args: tuple) -> None:
        nonlocal seen
        opened = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if opened or event in ("os.rename", "os.remove", "os.mkdir", "os.fsync"):
            seen += 1
            if seen == writes:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync
    os.fsync = lambda handle: die_at_last("os.fsync", ()) or fsync(handle)
    sys.addaudithook(die_at_last)
    make_couplings(folder, manifest_of(count=8))


def test_killed_before_any_write_and_run_again_gives_the_same_bytes(tmp_path):
    expected = contents(make_couplings(tmp_path / "expected", manifest_of(count=8)))
    for writes in range(1, 200):
        folder = tmp_path / str(writes)
        code = _run(_couple_until, writes, folder)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        for name, data in contents(folder).items():  # complete or absent, but for temporary files
            assert ".tmp-" in name or data == expected[name], f"{name} after {writes - 1} writes"
        make_couplings(folder, manifest_of(count=8))
        assert contents(folder) == expected, f"after {writes - 1} writes"
    assert writes > 20  # 2 shards, 2 sidecars, manifest and prompts: each opened, synced, renamed


def test_a_half_written_temporary_file_does_not_survive(tmp_path):
    expected = contents(make_couplings(tmp_path / "expected", manifest_of()))
    folder = shutil.copytree(tmp_path / "expected", tmp_path / "killed")
    for name in "00002.tar", "00002.json":
        path = folder / "shards" / name
        path.rename(path.with_name(f".{name}.tmp-99999"))
    (folder / "shards" / ".00002.tar.tmp-99998").write_bytes(b"half")
    assert [problem.stray for problem in verify(folder)] == [False, True, True, True]
    make_couplings(folder, manifest_of())
    assert contents(folder) == expected


def test_killed_at_random_moments_until_it_is_done(tmp_path):
    manifest = manifest_of(count=200)
    expected = contents(make_couplings(tmp_path / "expected", manifest))
    folder, moments, kills = tmp_path / "killed", random.Random(0), 0
    while True:
        process = fork.Process(target=make_couplings, args=(folder, manifest))
        process.start()
        time.sleep(moments.uniform(0.01, 0.08) * (1 + kills / 20))  # a slow machine gets there too
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills > 0
    assert contents(folder) == expected


def _couple_without_room(folder) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a shard has some 10 kB; a write beyond fails
    with pytest.raises(DataError, match="could not be written") as caught:
        make_couplings(folder, manifest_of())
    assert "same command again" in caught.value.hint


def test_no_room_is_a_clear_error_and_leaves_nothing_half_written(tmp_path):
    assert _run(_couple_without_room, tmp_path) == 0
    assert list(contents(tmp_path)) and not list(contents(tmp_path / "shards"))
    assert contents(make_couplings(tmp_path, manifest_of())) == contents(
        make_couplings(tmp_path / "expected", manifest_of())
    )
