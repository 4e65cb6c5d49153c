import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from instaflow.couplings.records import (
    Kept,
    KeptImages,
    Shard,
    _stacked,
    decode,
    encode,
    read_extra,
    write_extra,
)
from instaflow.couplings.shards import read_shard, tar_path, write_shard

KEPT = Kept(
    images=KeptImages(every=3, format="png", size=(4, 6)), embedding=(5, 2), pooled=(3,), trajectory=(0.25, 0.5)
)
INDICES = [6, 7, 9]  # 8 was left out


def latents(count=3):
    return np.arange(count * 8, dtype=np.float16).reshape(count, 2, 2, 2)


def extra_of(name: str, index: int, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(index).standard_normal(shape)
    return (values * 50 + 128).astype(np.uint8) if name.startswith("image.") else values.astype(np.float16)


def records_of(kept=KEPT) -> Shard:
    extras: dict[str, dict[int, bytes]] = {}
    for index in INDICES:
        for name, shape in kept.members(index, (2, 2, 2)).items():
            extras.setdefault(name, {})[index] = write_extra(name, extra_of(name, index, shape))
    return Shard(latents(), latents() / 2, ["七", "a\nb", ""], INDICES, extras)


def test_the_bytes_are_those_of_webdatasets_own_writer():
    import webdataset

    for records in (Shard(latents(), latents() / 2, ["七", "a\nb", ""], INDICES), records_of()):
        buffer = io.BytesIO()
        with webdataset.TarWriter(buffer, user="instaflow", group="instaflow", mode=0o444, mtime=0) as tar:
            for row, index in enumerate(INDICES):
                text = {"prompt": records.prompts[row], "index": index}
                arrays = {"latent.npy": records.latent[row], "noise.npy": records.noise[row]}
                files = {
                    name: files[index] if name.startswith("image") else read_extra(name, files[index])
                    for name, files in records.extras.items()
                    if index in files
                }
                tar.write({"__key__": f"{index:09d}", "json": text, **arrays, **files})
        assert encode(records) == buffer.getvalue()


def test_what_is_kept_comes_back():
    records, back = records_of(), decode(encode(records_of()), INDICES)
    assert back.extras == records.extras and list(back.extras["image.png"]) == [6, 9]
    np.testing.assert_array_equal(back.noise, records.noise)
    np.testing.assert_array_equal(back.latent, records.latent)
    assert (back.prompts, back.indices) == (records.prompts, records.indices)
    for index in INDICES:
        members = KEPT.members(index, (2, 2, 2))
        assert {name for name, files in back.extras.items() if index in files} == set(members)
        for name, shape in members.items():
            value = read_extra(name, back.extras[name][index])
            assert (value.shape, value.dtype) == (shape, np.uint8 if name == "image.png" else np.float16)
            np.testing.assert_array_equal(value, extra_of(name, index, shape))


READ_BACK = """
import sys
sys.modules["instaflow"] = None  # no import of it succeeds
import io, json, tarfile
import numpy as np
from PIL import Image

found = []
if sys.argv[1] == "webdataset":
    import webdataset
    for sample in webdataset.WebDataset(sys.argv[2], shardshuffle=False).decode("pil"):
        found.append({name: np.asarray(value).tolist() for name, value in sample.items() if "." in name})
else:
    with tarfile.open(sys.argv[2]) as tar:
        parts = {member.name: tar.extractfile(member).read() for member in tar}
    for key in sorted({name.partition(".")[0] for name in parts}):
        fields = {name.partition(".")[2]: io.BytesIO(parts[name]) for name in parts if name.startswith(key)}
        fields = {name: np.load(file) if name.endswith("npy") else file for name, file in fields.items()}
        fields |= {name: np.asarray(Image.open(fields[name])) for name in fields if name.startswith("image")}
        found.append({name: fields[name].tolist() for name in fields if name != "json"})
json.dump(found, sys.stdout)
"""


@pytest.mark.parametrize("form", ["png", "webp"])
@pytest.mark.parametrize("reader", ["webdataset", "tarfile and numpy"])
def test_what_is_kept_is_read_without_this_package(tmp_path, reader, form):
    kept = KEPT.model_copy(update={"images": KeptImages(every=3, format=form, size=(4, 6))})
    records = records_of(kept)
    write_shard(tmp_path, 0, records, left_out=[8])
    done = subprocess.run(
        [sys.executable, "-c", READ_BACK, reader, tar_path(tmp_path, 0)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    expected = []
    for row, index in enumerate(INDICES):
        files = {name: files[index] for name, files in records.extras.items() if index in files}
        arrays = {name: read_extra(name, content) for name, content in files.items()}
        arrays |= {"latent.npy": records.latent[row], "noise.npy": records.noise[row]}
        expected.append({name: value.tolist() for name, value in arrays.items()})
    assert json.loads(done.stdout) == expected and f"image.{form}" in expected[0]


@pytest.mark.parametrize(
    "odd",
    [
        np.asfortranarray,
        lambda array: array.astype(np.float32),
        lambda array: array[::-1],
    ],
    ids=["Fortran's order", "another dtype", "reversed"],
)
@pytest.mark.parametrize("place", [0, 1])
def test_arrays_that_others_laid_out_are_read_as_they_are(odd, place):
    arrays = [values.reshape(2, 4) for values in latents()[:2]]
    arrays[place] = odd(arrays[place])
    files = {}
    for row, array in enumerate(arrays):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, version=(2, 0) if row == place else None)
        files[row] = memoryview(buffer.getvalue() + b"and more")
    assert np.array_equal(_stacked(files), np.stack(arrays))


def tar_of(names: list[str]) -> bytes:
    """A tar of three records' members by these names; each member's content is the one that its field has."""
    contents = {member.name: content for member, content in members_of(encode(records_of()))}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            content = contents.get(name, b"")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def members_of(data: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar.getmembers()]


NAMES = [member.name for member, _ in members_of(encode(records_of()))]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda names: names[::-1], "where '000000006.json' is due"),
        (lambda names: [names[1], names[0], *names[2:]], "'000000006.embedding.npy', where '000000006.json' is due"),
        (lambda names: [*names, names[0]], "'000000006.embedding.npy', beyond what its sidecar lists"),
        (lambda names: [names[0], *names], "'000000006.embedding.npy', where '000000006.json' is due"),
        (lambda names: ["000000006.caption.txt", *names], "'000000006.caption.txt', where"),
        (lambda names: ["000000006.image.jpg", *names], "'000000006.image.jpg', where"),
        (lambda names: ["000000006.image.pkl", *names], "'000000006.image.pkl', a pickle, which could run any code"),
        (lambda names: [*names[:7], "000000006.trajectory.pt", *names[7:]], "a pickle"),
        (lambda names: ["../000000006.image.png", *names], "a path out of the shard"),
        (lambda names: [name for name in names if name != "000000007.latent.npy"], "'000000007.latent.npy' is due"),
        (lambda names: [name for name in names if not name.startswith("000000009")], "lacks '000000009.json'"),
        (lambda names: [names[7], *names[:7], *names[8:]], "'000000007.embedding.npy', where '000000006.json' is due"),
    ],
)
def test_a_member_that_is_not_due_is_refused_by_name(change, fault):
    assert decode(tar_of(NAMES), INDICES).extras == records_of().extras
    with pytest.raises(ValueError, match=r"it (holds|lacks)") as caught:
        decode(tar_of(change(NAMES)), INDICES)
    assert fault in str(caught.value)


def test_webp_is_near_the_image_and_png_is_the_image():
    ramp = np.linspace(0, 255, 64 * 64 * 3).astype(np.uint8).reshape(64, 64, 3)
    np.testing.assert_array_equal(read_extra("image.png", write_extra("image.png", ramp)), ramp)
    near = read_extra("image.webp", write_extra("image.webp", ramp)).astype(int)
    assert 0 < np.abs(near - ramp).mean() < 4


@pytest.mark.parametrize("name", ["image.png", "image.webp", "embedding.npy"])
@pytest.mark.parametrize("cut", [0, 5, 40])
def test_a_damaged_extra_is_a_value_error(name, cut):
    value = np.full((32, 32, 3), 7, np.uint8 if name.startswith("image") else np.float16)
    content = write_extra(name, value)
    assert read_extra(name, content).shape == value.shape
    with pytest.raises(ValueError):
        read_extra(name, content[:cut])


def test_an_image_of_another_format_and_a_pickled_array_are_refused(tmp_path):
    png = write_extra("image.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="cannot be read"):
        read_extra("image.webp", png)
    with pytest.raises(ValueError, match="not that of plain numbers"):
        read_extra("embedding.npy", write_extra("embedding.npy", np.array([None])))


def test_a_shard_without_extras_has_none(tmp_path):
    records = Shard(latents(), latents(), ["a", "b", "c"], INDICES)
    assert read_shard(tmp_path, write_shard(tmp_path, 0, records, left_out=[8])).extras == {}


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float16).reshape(1, 2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(7, dtype=np.uint8),
        np.empty((0, 4), np.int64),
        np.arange(3, dtype=">f4"),
    ],
)
def test_arrays_are_read_as_numpy_reads_them(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    read = read_extra("trajectory.npy", buffer.getvalue())
    assert read.dtype == array.dtype and read.shape == array.shape and np.array_equal(read, array)


@pytest.mark.parametrize("header", ["{'descr': '<f2', 'fortran_order': False, 'shape': (9, 9), }", "{'descr': '<f2'}"])
def test_arrays_that_are_not_what_their_header_says_are_refused(header):
    text = header.encode().ljust(117) + b"\n"
    file = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(100)
    with pytest.raises(ValueError, match=r"not what its header says|not that of plain numbers"):
        read_extra("trajectory.npy", file)
