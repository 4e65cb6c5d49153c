"""The records of one shard and the tar that holds them: a webdataset that any tar reader opens.

Record 12034 is three members, in this order: `000012034.json` {prompt, index}, `000012034.latent.npy`,
`000012034.noise.npy`.
"""

import io
import json
import tarfile
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

FIELDS = ("json", "latent.npy", "noise.npy")  # in the order that webdataset's TarWriter gives them
PICKLES = ("pth", "pt", "pkl", "pickle", "pyd")


@dataclass(frozen=True)
class Shard:
    """The records of one shard in order of their index; N = 0 for none."""

    noise: np.ndarray  # [N, C, H, W] in the stored dtype, unit variance
    latent: np.ndarray  # [N, C, H, W] in the stored dtype, scaled
    prompts: list[str]
    indices: list[int]


def encode(records: Shard) -> bytes:
    """The tar, byte for byte as webdataset's TarWriter makes it; that one would import torch."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, index in enumerate(records.indices):
            text = json.dumps({"prompt": records.prompts[row], "index": index}).encode()
            contents = (text, _npy(records.latent[row]), _npy(records.noise[row]))
            for field, content in zip(FIELDS, contents, strict=True):
                member = tarfile.TarInfo(f"{_key(index)}.{field}")
                member.size, member.mode, member.mtime = len(content), 0o444, 0
                member.uname = member.gname = "instaflow"
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def decode(data: bytes, indices: list[int]) -> Shard:
    """The records of a tar that holds exactly these indices.

    Raises ValueError, or TarError, KeyError, TypeError or EOFError where the damage shows itself in another way.
    """
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        members = tar.getmembers()
    names = [f"{_key(index)}.{field}" for index in indices for field in FIELDS]
    for member, name in zip_longest(members, names):
        if member is None:
            raise ValueError(f"it lacks '{name}', which its sidecar lists")
        if member.name != name or not member.isreg():
            due = f"where '{name}' is due" if name else "beyond what its sidecar lists"
            raise ValueError(f"it holds {_said(member)}, {due}")
    contents = [data[member.offset_data : member.offset_data + member.size] for member in members]
    texts = [json.loads(content) for content in contents[0::3]]
    if [text["index"] for text in texts] != indices:
        raise ValueError("its records' indices are not those of its sidecar")
    latent = np.stack([_array(content) for content in contents[1::3]])
    noise = np.stack([_array(content) for content in contents[2::3]])
    return Shard(noise, latent, [text["prompt"] for text in texts], indices)


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


def _array(content: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)


def _key(index: int) -> str:
    return f"{index:09d}"  # no dot: webdataset takes all that follows the first one for the extension
