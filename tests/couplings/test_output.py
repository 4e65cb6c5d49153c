import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from instaflow import stores
from instaflow.couplings.generate import Made
from instaflow.couplings.loader import Couplings
from instaflow.couplings.manifest import read_manifest, write_manifest
from instaflow.couplings.output import close_output, open_output, settle_output, take_over
from instaflow.couplings.prompts import save_prompts
from instaflow.couplings.records import Kept
from instaflow.couplings.shards import (
    read_sidecar,
    shards_to_make,
    sidecar_name,
    sidecar_path,
    tar_name,
    tar_path,
    unmark_shard,
)
from instaflow.couplings.verify import bad_shards, verify
from instaflow.errors import ConfigError, DataError
from instaflow.stores import Store, StoreError
from tests.couplings.made import PROMPTS, at_once, contents, make_couplings, make_shard, manifest_of, sample
from tests.stores import WeakStore, ftp_server

fork = multiprocessing.get_context("fork")
MANIFEST = manifest_of()  # 23 records in 5 shards
SAMPLER = at_once(sample)


def couple(folder: Path, url: str | None, manifest=MANIFEST, shards: range | None = None, sampler=SAMPLER) -> Path:
    """A couple stage with an output, as a worker that makes `shards` runs it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "manifest.json").exists():
        write_manifest(folder, manifest)
    save_prompts(folder, PROMPTS)
    settle_output(folder, url)
    open_output(folder)
    for shard in shards_to_make(folder, manifest.plan):
        if shards is None or shard in shards:
            make_shard(folder, shard, manifest, PROMPTS, sampler)
    take_over(folder, manifest.plan)
    if not shards_to_make(folder, manifest.plan):
        close_output(folder)
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """The same couplings without an output."""
    return make_couplings(tmp_path_factory.mktemp("local") / "pairs", MANIFEST)


@pytest.fixture(params=["memory", "file", "weak", "ftp"])
def url(request, tmp_path):
    WeakStore.clear_instance_cache()
    if request.param == "ftp":
        (tmp_path / "served").mkdir()
        with ftp_server(tmp_path / "served") as served:
            yield f"{served}/sd15/pairs"
    else:
        yield f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"{request.param}://{tmp_path}/store"


@pytest.fixture
def weak(tmp_path, monkeypatch) -> str:
    """The URL of a weak store; nobody waits for it."""
    monkeypatch.setattr(stores, "PAUSES", (0.0, 0.0))
    WeakStore.clear_instance_cache()
    return f"weak://{tmp_path}/store"


def failing(operation: str, times: int = 99):
    """A fault: this operation fails, so many times."""
    left = iter(range(times))

    def fault(called: str) -> None:
        if called == operation and next(left, None) is not None:
            raise ConnectionError("reset by peer")

    return staticmethod(fault)


def held(url: str) -> dict[str, bytes]:
    """Every file of a store."""
    store = Store(url)
    names = [*store.sizes(""), *(f"shards/{name}" for name in store.sizes("shards"))]
    return {name: store.read(name) for name in names}


def test_tars_go_to_the_store_which_is_a_stage_of_its_own(tmp_path, local, url):
    folder = couple(tmp_path / "pairs", url)
    expected = contents(local)
    assert held(url) == expected
    kept = {name: data for name, data in expected.items() if not name.endswith(".tar")}
    assert contents(folder) == kept | {"output.json": json.dumps({"url": url}, indent=2).encode() + b"\n"}
    assert verify(folder) == verify(folder, workers=2) == []
    fetched = tmp_path / "fetched"
    for name, data in held(url).items():
        (fetched / name).parent.mkdir(parents=True, exist_ok=True)
        (fetched / name).write_bytes(data)
    assert verify(fetched) == []


def test_training_reads_from_the_store_and_from_a_copy_of_the_folder(tmp_path, local, url):
    folder = couple(tmp_path / "pairs", url)
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "pairs")
    for place in folder, copy:
        found, expected = Couplings(place, seed=0), Couplings(local, seed=0)
        for position in range(0, 60, 7):
            here, there = found.batch(position, 7), expected.batch(position, 7)
            assert here.prompts == there.prompts and np.array_equal(here.indices, there.indices)
            assert np.array_equal(here.noise, there.noise) and np.array_equal(here.latent, there.latent)


def spoil(name: str, change) -> None:
    def act(store: Store) -> None:
        store.put(name, change(store.read(name)))

    return act


@pytest.mark.parametrize(
    ("act", "fault"),
    [
        (lambda store: store.remove(tar_name(2)), "is missing, though it has a sidecar"),
        (spoil(tar_name(2), lambda data: data[:-512]), "bytes where its sidecar says"),
        (spoil(tar_name(2), lambda data: data[:-1] + b"x"), "does not have the hash"),
        (lambda store: store.remove(sidecar_name(2)), "is no copy of"),
        (spoil(sidecar_name(2), lambda data: b"{" + data), "is no copy of"),
    ],
)
def test_verify_finds_what_is_bad_in_the_store_and_it_is_made_again(tmp_path, local, url, act, fault):
    folder = couple(tmp_path / "pairs", url)
    act(Store(url))
    (problem,) = verify(folder)
    assert str(problem).startswith(f'"{url}/shards/00002.') and fault in problem.fault
    assert bad_shards([problem]) == [2]
    unmark_shard(folder, 2)
    make_shard(folder, 2, MANIFEST, PROMPTS, SAMPLER)
    assert verify(folder) == [] and held(url) == contents(local)


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("manifest.json", None, "is missing"),
        ("manifest.json", lambda data: data[1:], "is not a manifest: "),
        ("manifest.json", lambda data: data.replace(b'"seed": 0', b'"seed": 1'), "'seed' is 1 there, 0 here"),
        ("prompts.json", None, "is missing"),
        ("prompts.json", lambda data: data.replace(b"seven", b"eight"), "is no copy of the stage's"),
        ("no-prompt.npz", None, "is missing"),
        ("no-prompt.npz", lambda data: data[1:-30], "is damaged: "),
    ],
)
def test_verify_finds_what_lacks_in_the_store_beside_the_tars(tmp_path, weak, name, change, fault):
    folder, embedding = tmp_path / "pairs", np.ones((2, 3), np.float16)
    manifest = manifest_of(keep=Kept(embedding=(2, 3)))
    folder.mkdir()
    np.savez(folder / "no-prompt.npz", embedding=embedding)

    def sampler(indices, noise, prompts):
        return lambda: Made(sample(noise, prompts), {"embedding.npy": dict.fromkeys(indices, embedding)})

    couple(folder, weak, manifest, sampler=sampler)
    store = Store(weak)
    assert verify(folder) == []
    if change is None:
        store.remove(name)
    else:
        store.put(name, change(store.read(name)))
    (problem,) = verify(folder)
    assert fault in problem.fault and problem.fault.endswith(f"; copy '{folder / name}' there")
    assert problem.path == f"{weak}/{name}" and problem.shard is None and not problem.stray
    store.put(name, folder / name)
    assert verify(folder) == []


def test_verify_takes_an_empty_store_for_one_that_is_lost(tmp_path, weak):
    folder = couple(tmp_path / "pairs", weak, shards=range(2))
    (folder / "state.json").write_text("{}")
    (tmp_path / "store").rename(tmp_path / "unmounted")
    with pytest.raises(DataError, match=f"'{weak}' has lost the shards of '{folder}'") as caught:
        verify(folder)
    assert "mounted" in caught.value.hint and "repair" not in caught.value.hint
    (tmp_path / "unmounted").rename(tmp_path / "store")
    assert verify(folder) == []
    shutil.rmtree(tmp_path / "store")
    for shard in range(2):
        sidecar_path(folder, shard).unlink()
    assert verify(folder) == []  # nothing was made yet


def test_a_bad_shard_is_not_trained_on(tmp_path, weak):
    folder = couple(tmp_path / "pairs", weak)
    store = Store(weak)
    for shard in range(5):
        store.put(tar_name(shard), store.read(tar_name(shard))[:-1] + b"x")
    with pytest.raises(DataError, match=rf'"{weak}/shards/0000\d.tar" does not have the hash') as caught:
        Couplings(folder, seed=0).batch(0, 1)
    assert f"instaflow repair {folder}" in caught.value.hint


def test_strays_in_the_store_are_told(tmp_path, weak):
    folder = couple(tmp_path / "pairs", weak)
    for name in "shards/.00001.tar.tmp-elsewhere-1-1", "shards/notes.txt":
        Store(weak).put(name, b"")
    assert [(str(problem), problem.stray) for problem in verify(folder)] == [
        (f'"{weak}/shards/.00001.tar.tmp-elsewhere-1-1" is a temporary file', True),
        (f'"{weak}/shards/notes.txt" is no file of this stage', True),
    ]


def test_a_store_that_is_out_of_reach_is_no_fault_of_its_shards(tmp_path, weak, monkeypatch):
    folder = couple(tmp_path / "pairs", weak)
    monkeypatch.setattr(WeakStore, "fault", failing("read"))
    for read in (lambda: verify(folder), lambda: Couplings(folder, seed=0).batch(0, 1)):
        with pytest.raises(StoreError, match="could not be read: reset by peer"):
            read()


# --- several workers --------------------------------------------------------------------------------------------------


def test_workers_that_share_no_folder_see_each_others_shards(tmp_path, local, url):
    first, second, third = (tmp_path / name for name in ("a", "b", "c"))
    couple(first, url, shards=range(0, 5, 2))
    assert shards_to_make(first, MANIFEST.plan) == [1, 3]
    couple(second, url, shards=range(1, 5, 2), sampler=SAMPLER)
    assert shards_to_make(second, MANIFEST.plan) == []  # the last one is done
    couple(first, url, shards=range(0))
    couple(third, url, sampler=None)  # has nothing to make
    assert contents(first) == contents(second) == contents(third)
    assert verify(first) == [] and held(url) == contents(local)


def test_a_shard_that_the_store_holds_stays_as_it_is(tmp_path, weak):
    first = couple(tmp_path / "a", weak, shards=range(0))
    second = couple(tmp_path / "b", weak)
    before = held(weak)
    shifted = make_shard(first, 2, MANIFEST, PROMPTS, at_once(lambda noise, prompts: sample(noise, prompts) + 1))
    assert held(weak) == before and shifted == read_sidecar(second, 2, MANIFEST.plan)
    assert sidecar_path(first, 2).read_bytes() == before[sidecar_name(2)]


@pytest.mark.parametrize(
    "act",
    [
        lambda store: store.remove(tar_name(2)),
        spoil(tar_name(2), lambda data: data[:-512]),
        spoil(sidecar_name(2), lambda data: data[1:]),
        lambda store: store.put(sidecar_name(2), store.read(sidecar_name(1))),
    ],
)
def test_a_shard_that_is_not_whole_is_not_taken_over(tmp_path, local, weak, act):
    couple(tmp_path / "a", weak)
    act(Store(weak))
    assert shards_to_make(couple(tmp_path / "b", weak, shards=range(0)), MANIFEST.plan) == [2]
    couple(tmp_path / "b", weak)
    assert held(weak) == contents(local)


def test_a_new_tar_never_stands_beside_the_old_sidecar(tmp_path, weak, monkeypatch):
    couple(tmp_path / "a", weak)
    Store(weak).remove(tar_name(2))
    folder = couple(tmp_path / "b", weak, shards=range(0))
    shifted, writes = at_once(lambda noise, prompts: sample(noise, prompts) + 1), iter(range(99))

    def fault(called: str) -> None:  # the tar arrives, its sidecar does not
        if called == "write" and next(writes) > 0:
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(WeakStore, "fault", staticmethod(fault))
    with pytest.raises(StoreError, match=r"00002\.json"):
        make_shard(folder, 2, MANIFEST, PROMPTS, shifted)
    store = tmp_path / "store"
    assert tar_path(store, 2).exists() and vouched(store, store) == vouched(folder, store) == {0, 1, 3, 4}


def test_a_store_with_other_couplings_is_refused(tmp_path, weak):
    couple(tmp_path / "a", weak)
    before = held(weak)
    with pytest.raises(ConfigError, match=f"'{weak}' holds other couplings: 'seed' is 0 there, 1 here") as caught:
        couple(tmp_path / "b", weak, manifest_of(seed=1))
    assert "an `output` of its own" in caught.value.hint and held(weak) == before
    other = manifest_of(hardware={"device": "another"}, model="../elsewhere", compiled=True)
    folder = couple(tmp_path / "c", weak, other, sampler=None)
    assert read_manifest(folder) == other.model_copy(update={"compiled": False})


# --- places that change -----------------------------------------------------------------------------------------------


def test_an_output_that_changes_under_shards_is_refused(tmp_path, weak):
    folder, old = tmp_path / "pairs", f"{weak}/old"
    couple(folder, f"{weak}/never used", shards=range(0))
    couple(folder, old, shards=range(2))
    for other in f"{weak}/new", None:
        with pytest.raises(ConfigError, match=f"lie in '{old}'; `output` is now {other or 'null'}") as caught:
            couple(folder, other)
        assert f"`output: {old}`" in caught.value.hint
    couple(folder, f"{old}/")
    assert verify(folder) == []
    local = make_couplings(tmp_path / "local", MANIFEST)
    with pytest.raises(ConfigError, match=f"lie in '{local}'; `output` is now {old}"):
        couple(local, old)


def test_shards_that_are_moved_as_the_hint_says_are_found(tmp_path, weak):
    folder = couple(tmp_path / "pairs", f"{weak}/old")
    (tmp_path / "store" / "old").rename(tmp_path / "store" / "new")
    (folder / "output.json").write_text(json.dumps({"url": f"{weak}/new"}))
    couple(folder, f"{weak}/new", sampler=None)
    assert verify(folder) == []


def test_a_store_that_lost_everything_is_not_filled_anew(tmp_path, weak):
    folder = couple(tmp_path / "pairs", weak, shards=range(2))
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(DataError, match=f"'{weak}' has lost the shards of '{folder}'") as caught:
        couple(folder, weak)
    assert "mounted" in caught.value.hint and not (tmp_path / "store").exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"url": 3}'])
def test_a_damaged_output_json_is_refused(tmp_path, weak, text):
    folder = couple(tmp_path / "pairs", weak)
    (folder / "output.json").write_text(text)
    with pytest.raises(DataError, match=r'output\.json" cannot be read') as caught:
        verify(folder)
    assert '{"url": "s3://bucket/folder"}' in caught.value.hint


# --- failures and kills -----------------------------------------------------------------------------------------------


def vouched(folder: Path, tars: Path) -> set[int]:
    """The shards that sidecars in `folder` vouch for, each checked against its tar in `tars`."""
    found = set()
    for path in (folder / "shards").glob("[0-9]*.json"):
        sidecar = read_sidecar(folder, int(path.stem), MANIFEST.plan)
        data = tar_path(tars, sidecar.shard).read_bytes()
        assert hashlib.sha256(data).hexdigest() == sidecar.sha256
        found.add(sidecar.shard)
    return found


@pytest.mark.parametrize("operation", ["write", "tear", "info", "move", "make", "ls"])
def test_an_upload_that_fails_counts_for_nothing(tmp_path, local, weak, monkeypatch, operation):
    folder = couple(tmp_path / "pairs", weak, shards=range(2))
    with monkeypatch.context() as patch:
        patch.setattr(WeakStore, "fault", failing(operation))
        with pytest.raises(StoreError, match=r"reset by peer|the connection is closed"):
            couple(folder, weak)
    assert vouched(folder, tmp_path / "store") == {0, 1}
    with monkeypatch.context() as patch:
        patch.setattr(WeakStore, "fault", failing(operation, times=2))  # as often as is waited for
        couple(folder, weak)
    assert verify(folder) == [] and held(weak) == contents(local)


def run(target, *arguments) -> int:
    """The exit code of a child process; negative: the signal that ended it."""
    process = fork.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def couple_until(writes: int, folder: Path, url: str) -> None:
    """Couple one shard, and die by SIGKILL just before the given write here or in the store."""
    seen = 0

    def die_at_last(event: str, args: tuple) -> None:
        nonlocal seen
        opened = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if opened or event in ("os.rename", "os.remove", "os.mkdir"):
            seen += 1
            if seen == writes:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die_at_last)
    couple(folder, url, manifest_of(count=5))


@pytest.mark.parametrize("kind", ["weak", "file"])
def test_killed_before_any_write_a_sidecar_still_vouches_for_its_tar(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sys.modules[__name__], "MANIFEST", manifest_of(count=5))
    expected = contents(make_couplings(tmp_path / "expected", MANIFEST))
    for writes in range(1, 200):
        folder, store = tmp_path / f"{writes}", tmp_path / f"store{writes}"
        code = run(couple_until, writes, folder, f"{kind}://{store}")
        for place in folder, store:  # what a worker trusts, and what somebody does who has the store alone
            vouched(place, store)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        couple(folder, f"{kind}://{store}", MANIFEST)
        assert contents(store) == expected, f"after {writes - 1} writes"
    assert writes > 20


def test_killed_at_random_over_a_real_network_protocol(tmp_path):
    manifest, moments, kills = manifest_of(count=60), random.Random(0), 0
    expected = contents(make_couplings(tmp_path / "expected", manifest))
    served, folder = tmp_path / "served", tmp_path / "pairs"
    served.mkdir()
    with ftp_server(served) as url:
        while True:
            process = fork.Process(target=couple, args=(folder, f"{url}/pairs", manifest))
            process.start()
            time.sleep(moments.uniform(0.02, 0.15) * (1 + kills / 10))  # a slow machine gets there too
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
    assert kills > 0 and contents(served / "pairs") == expected
