import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from instaflow.files import (
    NO_LINKS,
    fingerprint_of,
    remove_leftovers,
    replace_folder,
    sha256_of,
    write_file,
    write_json,
    write_new,
)
from instaflow.processes import this_process

TOUCHES = {"open", "write", "flush", "fsync", "close", "link", "replace", "rename", "unlink", "rmdir", "mkdir"}


def killed_at(call: int, work: Callable[[], None]) -> bool:
    """Do the work in a process that is killed just before its `call`-th touch of the disk; False if it got through."""
    child = os.fork()
    if child == 0:
        left = call

        def count(frame: object, event: str, function: object) -> None:
            nonlocal left
            if event == "c_call" and getattr(function, "__name__", "") in TOUCHES:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        work()
        sys.setprofile(None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_everywhere(
    work: Callable[[], None], prepare: Callable[[], object], check: Callable[[], object]
) -> list[object]:
    """What `check` found after a kill at each place in turn, and after no kill."""
    found, call, killed = [], 0, True
    while killed:
        prepare()
        killed = killed_at(call, work)
        found.append(check())
        call += 1
    assert call > 5
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_old_or_new_wherever_a_kill_comes(tmp_path):
    path, new = tmp_path / "state.json", "new " * 100_000
    found = kill_everywhere(
        lambda: write_file(path, new), lambda: path.write_text("old"), lambda: {"old": 0, new: 1}[path.read_text()]
    )
    assert found == sorted(found)  # once new, never old again
    assert set(found) == {0, 1}


def test_a_first_file_is_absent_or_whole_wherever_a_kill_comes(tmp_path):
    path = tmp_path / "state.json"
    found = kill_everywhere(
        lambda: write_file(path, b"new"),
        lambda: path.unlink(missing_ok=True),
        lambda: path.read_bytes() if path.exists() else None,
    )
    assert set(found) == {None, b"new"}


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    path = tmp_path / "state.json"
    (tmp_path / "other.json").write_text("kept")
    (tmp_path / ".other.json.tmp-1").write_text("kept")
    kill_everywhere(lambda: write_file(path, "new"), lambda: None, lambda: None)
    assert len(names(tmp_path)) > 3
    remove_leftovers(path)
    assert names(tmp_path) == [".other.json.tmp-1", "other.json", "state.json"]


def test_a_new_file_is_absent_or_whole_wherever_a_kill_comes(tmp_path):
    path = tmp_path / "done.json"
    found = kill_everywhere(
        lambda: write_new(path, b"new") or None,
        lambda: path.unlink(missing_ok=True),
        lambda: path.read_bytes() if path.exists() else None,
    )
    assert set(found) == {None, b"new"}


@pytest.mark.parametrize("number", [None, *NO_LINKS])
def test_a_new_file_takes_no_other_s_place_on_any_store(tmp_path, monkeypatch, number):
    if number is not None:

        def refuse(old: Path, new: Path) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "done.json"
    assert write_new(path, "first") is True
    assert write_new(path, "second") is False
    assert path.read_text() == "first"
    assert names(tmp_path) == ["done.json"]


def test_a_link_whose_answer_was_lost_counts_as_made(tmp_path, monkeypatch):
    link = os.link

    def lose_the_answer(old: Path, new: Path) -> None:
        link(old, new)
        raise FileExistsError

    monkeypatch.setattr(os, "link", lose_the_answer)
    assert write_new(tmp_path / "done.json", "mine") is True


def test_the_temporary_files_of_other_hosts_and_of_the_living_stay(tmp_path):
    path, me = tmp_path / "state.json", this_process()
    kept = [f"{me.host}-{me.namespace}-{os.getppid()}", f"elsewhere-{me.namespace}-4194305", f"{me.host}-1-4194305"]
    gone = [f"{me.host}-{me.namespace}-4194305", "4194305", "1"]  # numbers beyond the highest; names without a host
    for writer in kept + gone:
        (tmp_path / f".state.json.tmp-{writer}").touch()
    remove_leftovers(path)
    assert names(tmp_path) == sorted(f".state.json.tmp-{writer}" for writer in kept)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_file(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["state.json"]


def test_json_is_readable_text(tmp_path):
    write_json(tmp_path / "a.json", {"prompt": "naïve 七", "list": [1, 2.5, None]})
    assert (tmp_path / "a.json").read_text("utf-8").startswith('{\n  "prompt": "naïve 七"')


def fill(folder: Path, words: str) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "unet").mkdir(parents=True)
    for name in ("config.json", "unet/weights", "unet/config.json"):
        (folder / name).write_text(f"{words} {name}")
    return folder


@pytest.mark.parametrize("older", [True, False], ids=["in place of an older one", "for the first time"])
def test_a_folder_is_whole_or_absent_wherever_a_kill_comes(tmp_path, older):
    final, temporary = tmp_path / "model", tmp_path / ".model.tmp"
    old, new = (fingerprint_of(fill(tmp_path / "any", words)) for words in ("old", "new"))
    shutil.rmtree(tmp_path / "any")

    def prepare() -> None:
        fill(temporary, "new")
        shutil.rmtree(final, ignore_errors=True)
        if older:
            fill(final, "old")

    def work() -> None:
        replace_folder(temporary, final)

    found = kill_everywhere(work, prepare, lambda: fingerprint_of(final) if final.exists() else None)
    assert set(found) == ({old, None, new} if older else {None, new})
    assert found[0] == (old if older else None)
    assert found[-1] == new
    assert names(tmp_path) == ["model"]  # the last one, which no kill stopped, left nothing behind


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600), (0o775, 0o644)])
def test_a_file_is_read_by_whom_its_folder_is_open_to(tmp_path, folder, file):
    temporary = fill(tmp_path / ".model.tmp", "new")
    temporary.chmod(folder)
    weights = next(path for path in temporary.iterdir() if path.is_file())
    weights.chmod(0o600)  # as safetensors writes it
    replace_folder(temporary, tmp_path / "model")
    assert (tmp_path / "model" / weights.name).stat().st_mode & 0o777 == file


# --- fingerprints ---------------------------------------------------------------------------------------------------


def test_a_hash_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "config.json").write_text("old config.jsoN"),
        lambda folder: (folder / "unet/weights").write_text("old unet/weights "),
        lambda folder: (folder / "unet/weights").rename(folder / "unet/weight"),
        lambda folder: (folder / "unet").rename(folder / "vae"),
        lambda folder: (folder / "empty").touch(),
        lambda folder: (folder / "unet/weights").unlink(),
        lambda folder: (folder / "unet/config.json").rename(folder / "unet.config.json"),
    ],
    ids=["byte", "length", "name", "folder", "one more", "one less", "place"],
)
def test_a_fingerprint_changes_with_any_byte_and_name(tmp_path, change):
    folder = fill(tmp_path / "model", "old")
    before = fingerprint_of(folder)
    change(folder)
    assert fingerprint_of(folder) != before


def test_two_files_that_swap_contents_change_the_fingerprint(tmp_path):
    folder = fill(tmp_path / "model", "old")
    before = fingerprint_of(folder)
    (folder / "config.json").write_text("old unet/config.json")
    (folder / "unet/config.json").write_text("old config.json")
    assert fingerprint_of(folder) != before


def test_a_fingerprint_does_not_see_hidden_files_times_or_places(tmp_path):
    folder = fill(tmp_path / "model", "old")
    before = fingerprint_of(folder)
    os.utime(folder / "config.json", (1, 1))
    (folder / ".lock").touch()
    (folder / ".cache").mkdir()
    (folder / ".cache/file").touch()
    (folder / "nothing in here").mkdir()
    assert fingerprint_of(folder) == before
    assert fingerprint_of(folder.rename(tmp_path / ".elsewhere")) == before
