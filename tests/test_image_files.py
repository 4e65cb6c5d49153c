"""Images with captions in img2dataset's layouts: found in order, read one by one, made to fit."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instaflow.errors import ConfigError, DataError
from instaflow.image_files import ImageFiles, ImageReader, images_exist, images_hash, pixels_of


def picture(colour, size=(6, 4), kind="png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


FILES = {
    "000000000.jpg": picture("red", kind="jpeg"),
    "000000000.json": json.dumps({"caption": "not asked for", "width": 6}).encode(),
    "000000000.txt": b"a red square",
    "000000001.json": json.dumps({"caption": "a picture that was never fetched"}).encode(),
    "000000002.json": json.dumps({"caption": "a green square"}).encode(),
    "000000002.png": picture("green"),
    "000000003.txt": b" \n",
    "000000003.webp": picture("blue", kind="webp"),
    "000000004.json": json.dumps({"caption": None}).encode(),
    "000000004.png": picture("white"),
    "000000005.jpeg": picture("black", kind="jpeg"),
    "000000005.txt": "ein schwarzes Quadrat, 七".encode(),
}
CAPTIONS = ["a red square", "a green square", "ein schwarzes Quadrat, 七"]


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(params=["tar", "folder of tars", "files", "url"])
def place(request, tmp_path) -> str:
    if request.param in ("files", "url"):
        below = {f"00000/{name}": content for name, content in FILES.items()}
        folder = write_folder(tmp_path / "images", below)
        return f"file://{folder}" if request.param == "url" else str(folder)
    (tmp_path / "shards").mkdir()
    shard = write_tar(tmp_path / "shards" / "00000.tar", FILES)
    return str(shard if request.param == "tar" else shard.parent)


def test_images_come_with_their_captions_in_order(place):
    files = ImageFiles(place)
    assert [image.caption for image in files] == CAPTIONS
    reader = ImageReader(place, 3)
    names = ("000000000.jpg", "000000002.png", "000000005.jpeg")
    assert [reader.read(index) for index in range(3)] == [FILES[name] for name in names]
    assert images_exist(place)


def test_what_is_left_out_is_counted(place):
    files = ImageFiles(place)
    list(files)
    unseen = 0 if "images" in place else 1  # a folder's files without an image are no samples
    assert files.total == 5 + unseen and sum(files.dropped.values()) == 2 + unseen
    assert f"3 of {5 + unseen} images taken" in str(files) and "1 without words" in str(files)


def test_the_hash_is_of_captions_and_sizes_and_not_of_the_place(place, tmp_path):
    other = write_tar(tmp_path / "other.tar", {f"{int(name[:9]) + 7:09d}{name[9:]}": FILES[name] for name in FILES})
    assert images_hash(place) == images_hash(str(other))
    for change in {"000000000.txt": b"a blue square"}, {"000000002.png": picture("green", size=(60, 40))}:
        assert images_hash(str(write_tar(tmp_path / "changed.tar", FILES | change))) != images_hash(place)


def test_an_image_without_any_caption_is_an_error_that_names_it(tmp_path):
    for place in (
        write_tar(tmp_path / "a.tar", {"7.jpg": picture("red")}),
        write_folder(tmp_path / "b", {"7.jpg": picture("red")}),
    ):
        with pytest.raises(ConfigError, match=r"sample 7 has no '7\.txt' and no '7\.json'"):
            list(ImageFiles(str(place)))


def test_what_holds_no_images_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("caption\na seven\n")
    with pytest.raises(ConfigError, match=r"a\.csv', given as data, holds no images with captions"):
        list(ImageFiles(str(tmp_path / "a.csv")))
    with pytest.raises(ConfigError, match=r"gone', given as data, does not exist") as caught:
        list(ImageFiles(str(tmp_path / "gone")))
    assert caught.value.hint.startswith('Name "digits", .tar files in img2dataset')
    assert not images_exist(str(tmp_path / "gone")) and not images_exist(str(tmp_path / "gone.tar"))


def test_an_image_that_is_gone_stops_the_work(tmp_path):
    folder = write_folder(tmp_path / "images", FILES)
    reader = ImageReader(str(folder), 3)
    (folder / "000000002.png").unlink()
    with pytest.raises(DataError, match=r"000000002\.png\" could not be read"):
        reader.read(1)


@pytest.mark.parametrize(("size", "kept"), [((30, 10), slice(10, 20)), ((10, 30), slice(10, 20)), ((10, 10), None)])
def test_the_middle_of_an_image_is_taken_as_large_as_fits(size, kept):
    """Red outside of the middle square, which is green and alone is seen."""
    image = np.zeros((size[1], size[0], 3), np.uint8)
    image[..., 0] = 255
    rows, columns = (slice(None), kept) if size[0] > 10 else (kept, slice(None))
    image[rows if kept else slice(None), columns if kept else slice(None)] = (0, 255, 0)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    for side in 4, 10, 16:
        pixels = pixels_of(buffer.getvalue(), (side, side))
        assert pixels.shape == (side, side, 3) and (pixels[side // 2, side // 2] == (0, 255, 0)).all()
        assert (pixels[..., 1] > 200).all()  # at the edges the filter sees a little of what lies beyond


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_kind_of_image_becomes_red_green_and_blue(mode):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "white").convert(mode).save(buffer, "jpeg" if mode == "CMYK" else "png")
    assert (pixels_of(buffer.getvalue(), (4, 4)) >= 250).all()


@pytest.mark.parametrize("content", [b"", b"no image", picture("red")[:40], picture("red", kind="gif")])
def test_what_is_no_image_is_told(content):
    with pytest.raises(ValueError, match="cannot be read"):
        pixels_of(content, (4, 4))


def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    found = pixels_of(encoded(Image.fromarray(ramp)), (8, 8))
    assert np.abs(found[..., 0].astype(int) - np.round(ramp / 257).astype(int)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(mode):
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    image.paste((200, 200, 200, 255), (0, 0, 4, 8))
    found = pixels_of(encoded(image.convert(mode)), (8, 8))
    assert (found[:, :4] == 200).all() and (found[:, 4:] == 255).all()


def test_a_damaged_note_on_how_it_was_held_spoils_no_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.new("RGB", (8, 8), (90, 90, 90)), "JPEG", exif=exif.tobytes())
    start = content.index(b"II*\x00") if b"II*\x00" in content else content.index(b"MM\x00*")
    for value in (b"\xff" * 14, bytes(14)):
        broken = content[: start + 8] + value + content[start + 22 :]
        assert np.abs(pixels_of(broken, (8, 8)).astype(int) - 90).max() <= 2


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
