"""The files of weights: where they are looked for, when they are wrong, and how one is fetched."""

import functools
import hashlib
import http.server
import json
import os
import threading
import zipfile
from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from instaflow import weights
from instaflow.damage import damage_of
from instaflow.errors import ConfigError, DataError
from instaflow.files import temporary_name

CONTENT = b"weights" * 1000
PREFIX = hashlib.sha256(CONTENT).hexdigest()[:8]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches of ours and of the libraries."""
    monkeypatch.setenv("INSTAFLOW_WEIGHTS", str(tmp_path / "ours"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def small(monkeypatch):
    """Two files of weights as small as can be, under the names of real ones."""
    for name in ("inception", "clip-vit-g-14"):
        known = weights.WEIGHTS[name]
        monkeypatch.setitem(weights.WEIGHTS, name, replace(known, sha256=PREFIX if known.sha256 else ""))
    return weights.WEIGHTS


def put(path, content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def in_hub(folder, model, file, content=CONTENT):
    """A file as huggingface_hub keeps it: a link to a blob that is called by its hash."""
    base = folder / "hub" / f"models--{model.replace('/', '--')}"
    blob = put(base / "blobs" / hashlib.sha256(CONTENT).hexdigest(), content)
    put(base / "refs" / "main", b"abc")
    link = base / "snapshots" / "abc" / file
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    return link


def test_the_hashes_are_those_in_the_names_of_the_files():
    for known in weights.WEIGHTS.values():
        assert known.sha256 in known.file and known.sha256 in known.url
        assert known.sha256 or known.hub


def test_torch_s_folder_is_found_without_torch(caches, monkeypatch):
    assert str(weights.torch_checkpoints().parent) == torch.hub.get_dir()
    monkeypatch.delenv("TORCH_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches / "x"))
    assert str(weights.torch_checkpoints().parent) == torch.hub.get_dir()
    monkeypatch.delenv("INSTAFLOW_WEIGHTS")
    assert weights.folder() == caches / "x" / "instaflow" / "weights"


@pytest.mark.parametrize("name", weights.WEIGHTS)
def test_a_missing_file_s_error_names_it_its_source_and_its_place(caches, name):
    with pytest.raises(DataError) as caught:
        weights.find(name)
    known = weights.WEIGHTS[name]
    assert known.file in caught.value.message
    for part in (known.url, str(caches / "ours" / known.file), f"instaflow weights {name} --fetch"):
        assert part in caught.value.hint


def test_ours_goes_before_the_libraries_caches(caches, small):
    theirs = put(caches / "torch" / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth")
    assert weights.find("inception") == theirs
    own = put(caches / "ours" / small["inception"].file)
    assert weights.find("inception") == own


def test_the_hub_s_cache_is_looked_into(caches, small):
    link = in_hub(caches, "laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "open_clip_pytorch_model.bin")
    assert weights.find("clip-vit-g-14") == link
    link.resolve().write_bytes(b"cut")
    with pytest.raises(DataError, match="damaged"):
        weights.find("clip-vit-g-14")


def test_where_no_hash_is_published_a_file_of_another_size_is_told(caches):
    known = weights.WEIGHTS["clip-vit-g-14"]
    own = replace(known, megabytes=1)
    for size, told in ((1_200_000, False), (900_000, False), (700_000, True), (1_400_000, True)):
        torch.save(torch.zeros(size, dtype=torch.uint8), put(caches / "ours" / known.file))
        found = weights.look_for(own)
        assert found.state == "present" and ("\n  but " in weights.told(found)) == told
    assert f"  but      it has {found.path.stat().st_size:,} bytes, not about 1 MB: is it" in weights.told(found)
    assert "about 1 MB; no hash published" in weights.told(found)


def written(name):
    """A whole file of the format that these weights have, though with other tensors; its bytes."""
    file = weights.folder() / weights.WEIGHTS[name].file
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"a": torch.zeros(300), "b": torch.ones(2, 50, dtype=torch.float16)}
    (save_file if file.suffix == ".safetensors" else torch.save)(tensors, file)
    return file, file.read_bytes()


@pytest.mark.parametrize("name", [name for name, known in weights.WEIGHTS.items() if not known.sha256])
def test_without_a_published_hash_a_file_tells_its_own_damage(caches, name):
    file, whole = written(name)
    assert weights.find(name) == file
    page = b"<!DOCTYPE html>\n<html><body>Sign in to go on \xc3\xa9</body></html>"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    cases = [(b"", "it is empty"), (page, "begins with '<!DOCTYPE html>'"), (pointer, "begins with 'version https:")]
    cases += [(whole[:size], "it is cut off") for size in (len(whole) - 1, len(whole) // 2, 100)]
    cases += [(bytes(2000), "no safetensors" if file.suffix == ".safetensors" else "is no file of torch's")]
    for content, told in cases:
        file.write_bytes(content)
        with pytest.raises(DataError) as caught:
            weights.find(name)
        assert f"'{file}' is damaged or another file: it " in caught.value.message and told in caught.value.message
        assert f"instaflow weights {name} --fetch" in caught.value.hint
        assert weights.look_for(weights.WEIGHTS[name]).state == "wrong"


def test_a_file_that_lost_a_piece_or_has_too_much_is_damaged(caches):
    file, whole = written("clip-vit-l-14")
    file.write_bytes(whole + b"more")
    assert damage_of(file) == f"has {len(whole) + 4:,} bytes, and its header tells of {len(whole):,}"
    file, whole = written("clip-vit-g-14")
    file.write_bytes(whole[:500] + whole[600:])
    assert "has lost some" in damage_of(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("words.txt", "none")
    assert damage_of(file) == "is a zip, and none of torch's"
    content = bytearray(file.read_bytes())
    for start in (content.index(b"PK\x03\x04") + 6, content.index(b"PK\x01\x02") + 8):
        content[start] |= 1  # it calls itself encrypted
    file.write_bytes(content)
    assert "has lost some" in damage_of(file)


def test_what_torch_wrote_before_it_wrote_zips_is_taken(caches):
    file, _ = written("clip-vit-g-14")
    torch.save({"a": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    assert weights.find("clip-vit-g-14") == file


def test_a_file_of_another_hash_is_refused_and_tells_its_damage_first(caches, small):
    _, whole = written("inception")
    for content, told in (
        (whole, f"has a SHA-256 that begins with .*, not {PREFIX}"),
        (whole[:-9], "is cut off"),
        (b"", "is empty"),
    ):
        put(caches / "ours" / small["inception"].file, content)
        with pytest.raises(DataError, match=f"is damaged or another file: it {told}"):
            weights.find("inception")


def test_a_hash_is_computed_once_for_each_state_of_a_file(caches, monkeypatch):
    counted = []
    real = weights.sha256_of
    monkeypatch.setattr(weights, "sha256_of", lambda path: counted.append(path) or real(path))
    file = put(caches / "w.pth")
    assert weights.hash_of(file) == weights.hash_of(file) == hashlib.sha256(CONTENT).hexdigest()
    assert len(counted) == 1
    put(file, b"another")
    os.utime(file, ns=(1, 1))
    assert weights.hash_of(file) == hashlib.sha256(b"another").hexdigest()


@pytest.mark.parametrize("content", ["[]", "5", "null", '{{"{place}": 5}}', '{{"{place}": [1, 2]}}', "{{"])
def test_what_is_remembered_otherwise_is_forgotten(caches, content):
    file = caches / "weights.bin"
    file.write_bytes(CONTENT)
    memory = weights.folder() / ".hashes.json"
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(content.format(place=file))
    assert weights.hash_of(file) == hashlib.sha256(CONTENT).hexdigest()
    assert str(file) in json.loads(memory.read_text())


def test_a_folder_that_cannot_be_written_only_costs_time(caches, monkeypatch):
    put(caches / "file")
    monkeypatch.setenv("INSTAFLOW_WEIGHTS", str(caches / "file" / "below"))
    assert weights.hash_of(caches / "file") == hashlib.sha256(CONTENT).hexdigest()


# --- fetching ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(caches):
    """A server of this machine; its address."""
    put(caches / "served" / "w.pth")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/short":
                self.send_response(200)
                self.send_header("Content-Length", str(len(CONTENT) + 5))
                self.end_headers()
                self.wfile.write(CONTENT)
            else:
                super().do_GET()

        def log_message(self, *words):
            pass

    handler = functools.partial(Handler, directory=str(caches / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


@pytest.mark.parametrize("kind", ["http", "file"])
def test_what_is_fetched_is_found(caches, small, monkeypatch, server, kind):
    url = f"{server}/w.pth" if kind == "http" else (caches / "served" / "w.pth").as_uri()
    monkeypatch.setattr(weights, "PART", 1000)
    own = temporary_name(small["inception"].file).rpartition("-")[0]
    put(caches / "ours" / f"{own}-4194304", b"half")  # of a process that is none
    told = []
    path = weights.fetch(replace(small["inception"], url=url), told.append)
    assert path.read_bytes() == CONTENT and weights.find("inception") == path
    assert len(told) == 7
    assert [file.name for file in path.parent.iterdir() if file.name != ".hashes.json"] == [path.name]


@pytest.mark.parametrize(
    ("place", "sha256", "message"),
    [
        ("w.pth", "00000000", f"begins with {PREFIX}, not 00000000"),
        ("short", PREFIX, "ended after 7,000 of 7,005 bytes"),
        ("none.pth", PREFIX, "cannot be fetched: HTTP Error 404"),
    ],
)
def test_a_failed_fetch_leaves_what_was_there(caches, server, place, sha256, message):
    known = replace(weights.WEIGHTS["inception"], url=f"{server}/{place}", sha256=sha256)
    old = put(caches / "ours" / known.file, b"old")
    with pytest.raises(DataError, match=message):
        weights.fetch(known)
    assert old.read_bytes() == b"old" and list(old.parent.iterdir()) == [old]


def test_a_source_that_is_not_reached_is_an_error_with_the_other_way(caches):
    known = replace(weights.WEIGHTS["inception"], url="http://127.0.0.1:9/w.pth")
    with pytest.raises(DataError, match="cannot be fetched") as caught:
        weights.fetch(known)
    assert str(caches / "ours" / known.file) in caught.value.hint


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_lists_every_file_and_fails_only_for_those_named(caches, typed):
    code, out, err = typed("weights")
    assert (code, err) == (0, "")
    for known in weights.WEIGHTS.values():
        assert known.name in out and known.url in out and str(caches / "ours" / known.file) in out
    assert typed("weights", "lpips-vgg")[0] == 1


def test_the_command_tells_a_wrong_file(caches, small, typed):
    put(caches / "ours" / small["inception"].file, b"cut")
    code, out, _ = typed("weights", "--json")
    (told,) = (entry for entry in json.loads(out) if entry["name"] == "inception")
    assert code == 1 and told["state"] == "wrong" and told["sha256"] == hashlib.sha256(b"cut").hexdigest()
    parts = typed("weights")[1].split("\n\n")
    assert [part.partition("\n")[0] for part in parts[:2]] == ["inception: wrong", "clip-vit-g-14: missing"]
    lines = parts[0].split("\n")
    assert lines[3] == f"  file     {caches / 'ours' / small['inception'].file}"
    assert lines[4].startswith("  fault    it is a text, such as") and lines[5] == "           begins with 'cut'"
    assert lines[6] == "  to do    instaflow weights inception --fetch, or bring it here again"
    long = [line for part in parts for line in part.split("\n") if len(line) > 80]
    assert all(len(line.split()) <= 3 for line in long)  # places and addresses, whole


def test_a_page_in_place_of_weights_is_not_kept(caches):
    source = put(caches / "served" / "page", b"<html>Sign in</html>")
    known = replace(weights.WEIGHTS["clip-vit-g-14"], url=source.as_uri())
    with pytest.raises(DataError, match=r"is not these weights: it is a text, .* begins with '<html>Sign in</html>'"):
        weights.fetch(known)
    assert not any((caches / "ours").iterdir())


def test_the_command_fetches_what_is_named_and_not_here(caches, small, monkeypatch, typed):
    source = put(caches / "served" / "w.pth")
    monkeypatch.setitem(small, "inception", replace(small["inception"], url=source.as_uri()))
    code, out, err = typed("weights", "inception", "--fetch")
    assert (code, err) == (0, "") and "present" in out
    source.unlink()
    assert typed("weights", "inception", "--fetch")[0] == 0  # it is here: nothing is asked


def test_wrong_usage_of_the_command(typed):
    assert typed("weights", "--fetch")[0] == 2
    code, _, err = typed("weights", "inceptoin")
    assert code == 1 and "Did you mean 'inception'?" in err


def test_names_are_checked():
    with pytest.raises(ConfigError, match="no weights called 'x'"):
        weights.named(["x"])
