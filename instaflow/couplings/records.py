"""The records of one shard and the tar that holds them: a webdataset that any tar reader opens.

Record 12034 has three members: `000012034.json` {prompt, index}, `000012034.latent.npy`, `000012034.noise.npy`; and
of these what the manifest's `keep` announces: `.embedding.npy`, `.image.png` or `.image.webp`, `.pooled.npy`,
`.trajectory.npy`. They stand together, in alphabetical order.
"""

import io
import json
import math
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

FIELDS = ("json", "latent.npy", "noise.npy")
EXTRAS = ("embedding.npy", "image.png", "image.webp", "pooled.npy", "trajectory.npy")
IN_ORDER = sorted(FIELDS + EXTRAS)  # as webdataset's TarWriter has it
HEADER = re.compile(
    rb"\x93NUMPY(?:\x01\x00(?P<short>..)|[\x02\x03]\x00(?P<long>....))"
    rb"(?P<fields>\{'descr': '(?P<type>[<>|=]?(?:[biu][1248]|f[248]|c8|c16))', 'fortran_order': (?P<order>True|False), "
    rb"'shape': \((?P<shape>|\d+,|\d+(?:, \d+)+)\), \} *\n)",
    re.DOTALL,
)
MOST_HEADER = 1024  # bytes; NumPy's own take 128
PICKLES = ("pth", "pt", "pkl", "pickle", "pyd")


class KeptImages(BaseModel):
    """The images of the records whose index is a multiple of `every`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    every: int = Field(ge=1)
    format: Literal["png", "webp"]
    size: tuple[int, int]  # (H, W) in pixels


class Kept(BaseModel):
    """What a couple stage's records hold besides noise, latent and prompt: the `keep` of its manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    images: KeptImages | None = None
    embedding: tuple[int, int] | None = None  # (L, D) of a prompt's text embedding, float16
    pooled: tuple[int] | None = None  # (P,) of Stable Diffusion XL's pooled one, float16
    trajectory: tuple[float, ...] | None = None  # the flow times of T states of the sampler's path, float16

    def members(self, index: int, latent_shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """The extra fields that record `index` must have, and no other, with the shape of each.

        What `read_extra` gives is uint8 (H, W, 3) for an image, and float16 for all else.
        """
        members: dict[str, tuple[int, ...]] = {}
        if self.embedding:
            members["embedding.npy"] = self.embedding
        if self.images and index % self.images.every == 0:
            members[f"image.{self.images.format}"] = (*self.images.size, 3)
        if self.pooled:
            members["pooled.npy"] = self.pooled
        if self.trajectory:
            members["trajectory.npy"] = (len(self.trajectory), *latent_shape)
        return members


@dataclass(frozen=True)
class Shard:
    """The records of one shard in order of their index; N = 0 for none."""

    noise: np.ndarray  # [N, C, H, W] in the stored dtype, unit variance
    latent: np.ndarray  # [N, C, H, W] in the stored dtype, scaled
    prompts: list[str]
    indices: list[int]
    extras: dict[str, dict[int, bytes]] = field(default_factory=dict)
    """By field and index, the file in the tar: `read_extra` opens it."""


def read_extra(name: str, content: bytes) -> np.ndarray:
    """The array in a record's extra field, for an image [H, W, 3] uint8. Raises ValueError where it is damaged."""
    if not name.startswith("image."):
        return _array(content)
    try:
        with Image.open(io.BytesIO(content), formats=[name.removeprefix("image.")]) as image:
            return np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # each of Pillow's readers has its own
        raise ValueError(f"it holds an image that cannot be read: {error}") from error


def write_extra(name: str, value: np.ndarray) -> bytes:
    """The file that a record's extra field is, of what `read_extra` gives back; WebP is lossy."""
    if not name.startswith("image."):
        return _npy(value)
    buffer = io.BytesIO()
    Image.fromarray(value).save(buffer, name.removeprefix("image."), quality=90)
    return buffer.getvalue()


def encode(records: Shard) -> bytes:
    """The tar, byte for byte as webdataset's TarWriter makes it; that one would import torch."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, index in enumerate(records.indices):
            contents = {
                "json": json.dumps({"prompt": records.prompts[row], "index": index}).encode(),
                "latent.npy": _npy(records.latent[row]),
                "noise.npy": _npy(records.noise[row]),
            }
            contents |= {name: files[index] for name, files in records.extras.items() if index in files}
            for name in sorted(contents):
                member = tarfile.TarInfo(f"{_key(index)}.{name}")
                member.size, member.mode, member.mtime = len(contents[name]), 0o444, 0
                member.uname = member.gname = "instaflow"
                tar.addfile(member, io.BytesIO(contents[name]))
    return buffer.getvalue()


def decode(data: bytes, indices: list[int]) -> Shard:
    """The records of a tar that holds exactly these indices.

    Raises ValueError, or another error where the damage shows itself in another way.
    """
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        members = tar.getmembers()
    contents: dict[str, dict[int, memoryview]] = {name: {} for name in IN_ORDER}
    whole = memoryview(data)
    for member, (index, name) in zip(members, _places(members, indices), strict=True):
        contents[name][index] = whole[member.offset_data : member.offset_data + member.size]
    texts = [json.loads(bytes(content)) for content in contents["json"].values()]
    if [text["index"] for text in texts] != indices:
        raise ValueError("its records' indices are not those of its sidecar")
    if not all(isinstance(text["prompt"], str) for text in texts):
        raise ValueError("it holds a prompt that is no text")
    latent = _stacked(contents["latent.npy"])
    noise = _stacked(contents["noise.npy"])
    extras = {name: {i: bytes(file) for i, file in contents[name].items()} for name in EXTRAS if contents[name]}
    return Shard(noise, latent, [text["prompt"] for text in texts], indices, extras)


def _places(members: list[tarfile.TarInfo], indices: list[int]) -> Iterator[tuple[int, str]]:
    """Index and field of each member. Raises ValueError if one is not due where it stands, or lacks."""
    left = iter(members)
    member = next(left, None)
    for index in indices:
        for name in IN_ORDER:
            due = f"{_key(index)}.{name}"
            if member is not None and member.name == due and member.isreg():
                yield index, name
                member = next(left, None)
            elif name in FIELDS and member is None:
                raise ValueError(f"it lacks '{due}', which its sidecar lists")
            elif name in FIELDS and member is not None:
                raise ValueError(f"it holds {_said(member)}, where '{due}' is due")
    if member is not None:
        raise ValueError(f"it holds {_said(member)}, beyond what its sidecar lists")


def _said(member: tarfile.TarInfo) -> str:
    """A member that no shard holds, in words that say why it is refused."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"'{member.name}', a path out of the shard"
    if not member.isreg():
        return f"'{member.name}', which is no plain file"
    if member.name.rpartition(".")[2] in PICKLES:
        return f"'{member.name}', a pickle, which could run any code"
    return f"'{member.name}'"


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    return buffer.getvalue()


def _array(content: bytes | memoryview) -> np.ndarray:
    dtype, shape, in_fortran_order, start = _npy_header(content)
    array = np.frombuffer(content, dtype, math.prod(shape), start)
    return array.reshape(shape[::-1]).T if in_fortran_order else array.reshape(shape)


def _npy_header(content: bytes | memoryview) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """Of an .npy file its numbers' type, its shape, whether it is in Fortran's order, and where the numbers begin.

    Not by NumPy, which parses it as Python's literals: in CPython 3.11 that fails now and then in threads. Raises
    ValueError for anything but plain numbers, a pickle above all.
    """
    start = bytes(content[:MOST_HEADER])
    found = HEADER.match(start)
    if found is None:
        raise ValueError("it holds an .npy file whose header is not that of plain numbers")
    length = found["long"] or found["short"]
    end = found.start("fields") + int.from_bytes(length, "little")
    dtype = np.dtype(found["type"].decode())
    shape = tuple(int(size) for size in found["shape"].split(b",") if size.strip())
    if end != found.end() or end + math.prod(shape) * dtype.itemsize > len(content):
        raise ValueError("it holds an .npy file that is not what its header says")
    return dtype, shape, found["order"] == b"True", end


def _stacked(contents: dict[int, memoryview]) -> np.ndarray:
    """The arrays of all records as one, [N, C, H, W]."""
    if not contents:  # all of them were left out
        return np.empty((0, 0, 0, 0), np.float16)
    files = list(contents.values())
    first, header = _array(files[0]), _npy_header(files[0])[-1]
    if first.flags.c_contiguous and all(file[:header] == files[0][:header] for file in files):  # as we write them
        arrays = np.empty((len(files), *first.shape), first.dtype)
        for row, file in enumerate(files):
            arrays[row] = np.frombuffer(file, first.dtype, first.size, header).reshape(first.shape)
    else:
        arrays = np.stack([_array(file) for file in files])
    if arrays.dtype.kind != "f":
        raise ValueError(f"it holds {arrays.dtype} where floating-point numbers are due")
    return arrays


def _key(index: int) -> str:
    return f"{index:09d}"  # no dot: webdataset takes all that follows the first one for the extension
