"""Each way in which a file of weights that is none, or is no longer whole, is told so."""

import zipfile
from pathlib import Path

import pytest
import torch

from instaflow.damage import HEADER, damage_of


def safetensors(folder: Path, header: bytes, length: int | None = None) -> Path:
    file = folder / "weights.safetensors"
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header)
    return file


@pytest.mark.parametrize(
    "header",
    [b"{", b"\xff{}", b"{}", b"[]", b'{"a": {}}', b'{"a": 5}', b'{"a": {"data_offsets": [0]}}', 10**5 * b"["],
    ids=["no JSON", "no text", "no tensor", "no object", "no offsets", "no entry", "half of them", "too deep"],
)
def test_a_header_that_is_none(tmp_path, header):
    told = "is no safetensors file: its header cannot be read, or tells of no tensor"
    assert damage_of(safetensors(tmp_path, header)) == told


def test_a_header_is_not_read_that_is_longer_than_one_may_be(tmp_path):
    assert damage_of(safetensors(tmp_path, b"{}", HEADER + 1)) == "is no safetensors file"
    assert damage_of(safetensors(tmp_path, b"{}", HEADER)) == "is cut off within its header, after 10 bytes"


def of_torch(folder: Path) -> tuple[Path, bytearray, int]:
    """A file of torch's, its bytes, and where its table of contents begins."""
    file = folder / "weights.bin"
    torch.save({"a": torch.zeros(3)}, file)
    content = bytearray(file.read_bytes())
    return file, content, content.index(b"PK\x01\x02")


@pytest.mark.parametrize("fault", ["table lost", "name", "place", "no file", "flag"])
def test_a_zip_whose_table_of_contents_is_not_as_it_was(tmp_path, fault):
    file, content, table = of_torch(tmp_path)
    assert damage_of(file) == ""
    match fault:
        case "table lost":  # zipfile.BadZipFile
            del content[table:]
        case "name":  # ValueError: it calls itself UTF-8 and is not
            content[table + 9] |= 8
            content[table + 46] = 0xFF
        case "place":  # OSError: the first file would begin before the zip
            del content[100:200]
        case "no file":  # IndexError
            with zipfile.ZipFile(file, "w"):
                pass
            content = bytearray(b"PK\x03\x04" + file.read_bytes())
        case "flag":  # RuntimeError: it calls itself encrypted
            content[6] |= 1
            content[table + 8] |= 1
    file.write_bytes(content)
    assert damage_of(file) == f"is cut off after {len(content):,} bytes, or has lost some"
