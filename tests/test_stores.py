import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from instaflow import stores
from instaflow.errors import ConfigError
from instaflow.files import temporary_name
from instaflow.processes import this_process
from instaflow.stores import PAUSES, Store, StoreError, reach
from tests.stores import WeakStore, ftp_server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with ftp_server(tmp_path_factory.mktemp("served")) as url:
        yield url


@pytest.fixture(params=["memory", "file", "weak", "ftp"])
def store(request, tmp_path, served):
    name = uuid.uuid4().hex
    WeakStore.clear_instance_cache()
    urls = {"memory": f"memory://{name}", "ftp": f"{served}/{name}"}
    store = Store(urls.get(request.param, f"{request.param}://{tmp_path}/store/"))
    store.make_folder("shards")
    store.make_folder("shards")
    return store


@pytest.fixture
def weak(tmp_path, monkeypatch):
    """A weak store that fails as `fail(operation, errors)` says, and the pauses that were made."""
    pauses = []
    monkeypatch.setattr(stores.time, "sleep", pauses.append)
    store = Store(f"weak://{tmp_path}/store")
    store.make_folder("shards")

    def fail(operation, errors):
        left = iter(errors)

        def fault(called):
            if called == operation and (error := next(left, None)):
                raise error

        monkeypatch.setattr(WeakStore, "fault", staticmethod(fault))

    pauses.clear()
    return store, fail, pauses


def test_files_are_put_listed_read_and_removed(store, tmp_path):
    assert store.sizes("shards") == store.sizes("nowhere") == {}
    assert store.size("shards/a.tar") is None
    with pytest.raises(FileNotFoundError):
        store.read("shards/a.tar")
    (tmp_path / "local").write_bytes(b"x" * 300_000)
    store.put("shards/a.tar", b"first")
    store.put("shards/a.tar", b"second and longer")
    store.put("shards/b.tar", tmp_path / "local")
    store.put("c", b"")
    assert store.read("shards/a.tar") == b"second and longer" and store.read("shards/b.tar") == b"x" * 300_000
    assert store.sizes("shards") == {"a.tar": 17, "b.tar": 300_000} and store.sizes("") == {"c": 0}
    assert store.read_all("shards", ["a.tar", "gone"]) == {"a.tar": b"second and longer"}
    store.remove("shards/a.tar")
    store.remove("shards/a.tar")
    assert store.sizes("shards") == {"b.tar": 300_000} and store.size("shards/b.tar") == 300_000


def test_what_fails_in_passing_is_tried_again(weak, caplog):
    store, fail, pauses = weak
    for operation in "write", "tear", "info", "move":
        fail(operation, [ConnectionError("reset"), TimeoutError()])
        store.put("shards/a.tar", b"some bytes")
        assert store.read("shards/a.tar") == b"some bytes"
        assert [pause for pause in pauses if pause] == list(PAUSES[:2])
        pauses.clear()
        store.remove("shards/a.tar")
    assert 'a.tar" could not be written: reset; trying again in 1 s' in caplog.text
    assert "TimeoutError; trying again in 4 s" in caplog.text
    assert list(store.sizes("shards")) == []


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("operation", ["write", "tear"])
def test_a_torn_upload_is_never_seen_under_the_name(weak, operation, old):
    store, fail, _pauses = weak
    if old:
        store.put("shards/a.tar", old)
    fail(operation, [ConnectionError("reset by peer\nat length")] * (len(PAUSES) + 1))
    with pytest.raises(StoreError) as caught:
        store.put("shards/a.tar", b"new bytes")
    assert str(caught.value).endswith('shards/a.tar" could not be written: reset by peer')
    assert "same command goes on" in caught.value.hint
    assert store.sizes("shards").get("a.tar") == (len(old) if old else None)
    store.put("shards/a.tar", b"new bytes")
    assert store.sizes("shards") == {"a.tar": 9}


def test_a_store_that_tears_and_says_nothing_is_found_out(weak, monkeypatch):
    store, _fail, _pauses = weak
    monkeypatch.setattr(WeakStore, "pipe_file", lambda self, path, value: Path(path).write_bytes(value[:4]))
    with pytest.raises(StoreError, match="4 of 9 bytes arrived"):
        store.put("shards/a.tar", b"new bytes")
    assert "a.tar" not in store.sizes("shards")


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (PermissionError("Access Denied"), "credentials"),
        (NotImplementedError(), "only read"),
        (FileNotFoundError("no such bucket"), "bucket"),
    ],
)
def test_what_no_further_try_mends_is_told_at_once(weak, error, hint):
    store, fail, pauses = weak
    fail("write", [error])
    with pytest.raises(StoreError) as caught:
        store.put("shards/a.tar", b"bytes")
    assert hint in caught.value.hint and not any(pauses)


def test_a_broken_connection_is_not_taken_for_a_missing_file(weak):
    store, fail, _pauses = weak
    store.put("shards/a.tar", b"bytes")
    fail("read", [FileNotFoundError("550")])
    assert store.read("shards/a.tar") == b"bytes"
    fail("read", [FileNotFoundError("550")] * 9)
    with pytest.raises(StoreError, match="could not be read"):
        store.read("shards/a.tar")


def test_only_the_leftovers_of_dead_writers_are_removed(store):
    me = this_process()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = f".a.tar.tmp-{me.host}-{me.namespace}-{ended.pid}"
    for name in dead, ".b.tar.tmp-elsewhere-1-1", temporary_name("c.tar"), "00000.tar":
        store.put(f"shards/{name}", b"half")
    store.remove_leftovers("shards")
    assert sorted(store.sizes("shards")) == sorted([".b.tar.tmp-elsewhere-1-1", temporary_name("c.tar"), "00000.tar"])


@pytest.mark.parametrize(
    ("url", "module", "hint"),
    [
        ("s3://bucket/pairs", "s3fs", "pip install s3fs"),
        ("gs://bucket/pairs", "gcsfs", "pip install gcsfs"),
        ("sftp://host/pairs", "paramiko", 'pip install "fsspec[sftp]"'),
        ("https://host/pairs", "aiohttp", 'pip install "fsspec[http]"'),
    ],
)
def test_a_missing_package_is_named(monkeypatch, url, module, hint):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    for name in "sftp", "http":
        monkeypatch.delitem(sys.modules, f"fsspec.implementations.{name}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.partition(":")[0], raising=False)
    with pytest.raises(ConfigError, match=f"'{url}.*' cannot be reached") as caught:
        Store(url).sizes("")
    assert caught.value.hint == hint


def test_an_unknown_kind_of_url_is_refused():
    with pytest.raises(ConfigError, match="'nosuch://x' cannot be reached: Protocol not known: nosuch"):
        reach("nosuch://x")


def test_a_server_that_is_gone_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "PAUSES", (0.01, 0.01))
    with ftp_server(tmp_path) as url:
        Store(url).put("a", b"bytes")
    for act in (lambda: Store(url).put("a", b"new"), lambda: Store(url).read("a"), lambda: Store(url).sizes("")):
        with pytest.raises(StoreError, match="Connection refused") as caught:
            act()
        assert "network" in caught.value.hint
    assert (tmp_path / "a").read_bytes() == b"bytes" and [file.name for file in tmp_path.iterdir()] == ["a"]
