import errno
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
from pathlib import Path

import numpy as np
import pytest

from instaflow.couplings import shards
from instaflow.couplings.records import FIELDS, PICKLES, Shard, encode
from instaflow.couplings.shards import (
    BadShard,
    ShardPlan,
    Sidecar,
    read_shard,
    read_sidecar,
    shards_to_make,
    sidecar_path,
    tar_path,
    write_shard,
)
from instaflow.couplings.verify import verify
from instaflow.errors import DataError
from tests.couplings.made import PROMPTS, at_once, contents, make_couplings, make_shard, manifest_of, sample

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


READ_BACK = """
import sys
sys.modules["instaflow"] = None  # no import of it succeeds
import io, json, tarfile
import numpy as np

found = []
if sys.argv[1] == "webdataset":
    import webdataset
    for sample in webdataset.WebDataset(sys.argv[2:], shardshuffle=False).decode():
        found.append([sample["json"], sample["noise.npy"].tolist(), sample["latent.npy"].tolist()])
else:
    for path in sys.argv[2:]:
        with tarfile.open(path) as tar:
            parts = {member.name: tar.extractfile(member).read() for member in tar}
        for key in sorted({name.partition(".")[0] for name in parts}):
            arrays = [np.load(io.BytesIO(parts[f"{key}.{name}.npy"])).tolist() for name in ("noise", "latent")]
            found.append([json.loads(parts[f"{key}.json"]), *arrays])
json.dump(found, sys.stdout)
"""


@pytest.mark.parametrize("reader", ["webdataset", "tarfile and numpy"])
def test_shards_are_read_back_without_this_package(tmp_path, reader):
    manifest = manifest_of()
    make_couplings(tmp_path, manifest)
    paths = [str(tar_path(tmp_path, shard)) for shard in range(manifest.plan.num_shards)]
    done = subprocess.run(
        [sys.executable, "-c", READ_BACK, reader, *paths], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    expected = []
    for shard in range(manifest.plan.num_shards):
        records = read_shard(tmp_path, read_sidecar(tmp_path, shard, manifest.plan))
        for row, index in enumerate(records.indices):
            text = {"prompt": records.prompts[row], "index": index}
            expected.append([text, records.noise[row].tolist(), records.latent[row].tolist()])
    assert json.loads(done.stdout) == expected and len(expected) == 23


def test_readers_and_writers_import_no_torch(tmp_path):
    code = (
        "import sys, instaflow.couplings.verify, instaflow.couplings.loader, instaflow.couplings.leases\n"
        "from pathlib import Path; from tests.couplings.made import at_once, make_couplings, manifest_of\n"
        "make_couplings(Path(sys.argv[1]), manifest_of()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], cwd=Path(__file__).parents[2]).returncode == 0


def test_pickled_arrays_are_refused(tmp_path):
    latent = np.array([[[[None]]]], dtype=object)
    sidecar = write_shard(tmp_path, 0, Shard(latent, latent, ["a"], [0]), left_out=[])
    with pytest.raises(BadShard, match="not that of plain numbers"):
        read_shard(tmp_path, sidecar)


def _members(names: list[str], last_type: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.type = last_type if name == names[-1] else tarfile.REGTYPE
            member.linkname = "/etc/passwd" if member.issym() or member.islnk() else ""
            tar.addfile(member)
    return buffer.getvalue()


NAMES = [f"{0:09d}.{field}" for field in FIELDS]


def _vouched_for(folder, data: bytes) -> Sidecar:
    """Put `data` in place of shard 0's tar, with a sidecar that has its hash and its size."""
    records = Shard(np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1, 1)), ["a"], [0])
    sidecar = write_shard(folder, 0, records, left_out=[])
    assert read_shard(folder, sidecar).prompts == ["a"]
    tar_path(folder, 0).write_bytes(data)
    return sidecar.model_copy(update={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})


@pytest.mark.parametrize("extension", PICKLES)
@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_pickle_in_a_shard_is_refused_by_name_though_the_hash_is_right(tmp_path, extension, place):
    names = [*NAMES[:place], f"000000000.{extension}", *NAMES[place:]]
    with pytest.raises(BadShard, match=rf"holds '000000000\.{extension}', a pickle, which could run any code"):
        read_shard(tmp_path, _vouched_for(tmp_path, _members(names)))


@pytest.mark.parametrize("name", ["../../escape.npy", "/tmp/escape.npy", "a/../../escape.npy", ".."])
def test_a_path_out_of_a_shard_is_refused_by_name_though_the_hash_is_right(tmp_path, name):
    with pytest.raises(BadShard, match="a path out of the shard") as caught:
        read_shard(tmp_path, _vouched_for(tmp_path, _members([*NAMES, name])))
    assert f"'{name}'" in caught.value.message


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_member_that_is_no_plain_file_is_refused_though_the_hash_is_right(tmp_path, kind):
    with pytest.raises(BadShard, match=r"holds '000000000\.noise\.npy', which is no plain file"):
        read_shard(tmp_path, _vouched_for(tmp_path, _members(NAMES, kind)))


def test_nothing_of_a_shard_is_opened_before_its_hash_matches(tmp_path, monkeypatch):
    forged = _vouched_for(tmp_path, _members([*NAMES, "000000000.pkl"]))
    monkeypatch.setattr(tarfile, "open", lambda *args, **keys: pytest.fail("opened"))
    with pytest.raises(BadShard, match="does not have the hash"):
        read_shard(tmp_path, forged.model_copy(update={"sha256": "0" * 64}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no tar at all",
        _members(NAMES),  # empty members
        _members([f"{1:09d}.{field}" for field in FIELDS]),
        _members(NAMES[::-1]),
        _members(NAMES[:2]),
        encode(Shard(np.zeros((2, 1, 1, 1)), np.zeros((2, 1, 1, 1)), ["a", "b"], [0, 1])),
        encode(Shard(np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1, 1)), ["a"], [0])).replace(b'"index": 0', b'"index": 1'),
    ],
)
def test_a_foreign_tar_is_refused_even_with_its_own_hash(tmp_path, data):
    with pytest.raises(BadShard, match="cannot be decoded"):
        read_shard(tmp_path, _vouched_for(tmp_path, data))


def npy(header: str) -> bytes:
    """A .npy file of this header, and little behind it."""
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)


GOOD = Shard(np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1, 1)), ["a"], [0])


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("json", b"[" * 200_000),
        ("json", b'{"prompt": 5, "index": 0}'),
        ("json", b'{"prompt": "a"}'),
        ("noise.npy", npy("{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000000,)}")),
        ("noise.npy", npy("{'descr': '<f2', 'fortran_order': False, 'shape': (" + "9" * 30 + ",)}")),
        ("noise.npy", npy("(" * 9000)),
        ("latent.npy", npy("{'descr': '<c8', 'fortran_order': False, 'shape': (1, 1, 1)}")),
        ("latent.npy", npy("{'descr': '<U1', 'fortran_order': False, 'shape': (1, 1, 1)}")),
        ("latent.npy", npy("{'descr': '|b1', 'fortran_order': False, 'shape': (1, 1, 1)}")),
    ],
)
def test_hostile_content_is_a_bad_shard_though_the_hash_is_right(tmp_path, member, content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(encode(GOOD))) as good, tarfile.open(fileobj=buffer, mode="w") as tar:
        for entry in good.getmembers():
            data = content if entry.name.endswith(f".{member}") else good.extractfile(entry).read()
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    with pytest.raises(BadShard, match="cannot be decoded"):
        read_shard(tmp_path, _vouched_for(tmp_path, buffer.getvalue()))


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
        {"last_index": 10**30},
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
    write = shards.write_file
    monkeypatch.setattr(shards, "write_file", lambda path, data: write(path, data) if path.suffix == ".tar" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_shard(tmp_path, 0, records(2.0), left_out=[])
    assert shards_to_make(tmp_path, ShardPlan(1, 1)) == [0]


def test_a_shard_that_is_made_twice_is_done_all_the_while(tmp_path, monkeypatch):
    make_couplings(tmp_path, manifest_of(count=5))
    before, seen = contents(tmp_path), []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: seen.append(contents(tmp_path / "shards")) or replace(*paths))
    make_shard(tmp_path, 0, manifest_of(count=5), PROMPTS, at_once(sample))
    assert len(seen) == 2 and all(held["00000.json"] == before["shards/00000.json"] for held in seen)
    assert contents(tmp_path) == before


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


def test_a_mount_that_vanished_is_a_clear_error_and_is_not_made_again(tmp_path):
    folder = make_couplings(tmp_path / "mount" / "pairs", manifest_of(count=5))
    shutil.rmtree(tmp_path / "mount")
    with pytest.raises(DataError, match=r'00000\.tar" could not be written: No such file or directory'):
        make_shard(folder, 0, manifest_of(count=5), PROMPTS, at_once(sample))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_disk_that_refuses_is_a_clear_error_and_nothing_is_half_written(tmp_path, monkeypatch, number, call, after):
    expected = contents(make_couplings(tmp_path / "expected", manifest_of(count=5)))
    folder = make_couplings(tmp_path / "pairs", manifest_of(count=5))
    shutil.rmtree(folder / "shards")
    real, calls = getattr(os, call), iter(range(100))

    def refuse(*args):
        if next(calls) >= after:
            raise OSError(number, os.strerror(number))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(DataError, match=f"could not be written: {os.strerror(number)}"):
            make_shard(folder, 0, manifest_of(count=5), PROMPTS, at_once(sample))
    for name, data in contents(folder).items():
        assert data == expected[name]
    make_shard(folder, 0, manifest_of(count=5), PROMPTS, at_once(sample))
    assert contents(folder) == expected
