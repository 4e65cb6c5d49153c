"""Shards on disk: the plan of indices, a tar of records, and the sidecar that marks it done.

`shards/00012.tar` holds records. `shards/00012.json`, its sidecar, is written after it: a shard without one is not
done. Readers trust sidecars, never a listing, and decode nothing whose hash did not match.
"""

import hashlib
import shlex
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from instaflow.couplings.records import Shard, decode, encode
from instaflow.errors import DataError
from instaflow.files import json_text, remove_leftovers, sync_folder, write_file

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ShardPlan:
    """Which index lies in which shard: shard = index // records_per_shard."""

    count: int
    records_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.records_per_shard)

    def indices(self, shard: int) -> range:
        first = shard * self.records_per_shard
        return range(first, min(first + self.records_per_shard, self.count))

    def batches(self, shard: int, batch_size: int) -> list[range]:
        """The shard's indices in batches, cut from its first index on; the last one may be smaller."""
        indices = self.indices(shard)
        return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


class Sidecar(BaseModel):
    """`shards/00012.json`. The range of indices counts those left out: last - first + 1 = count + len(left_out)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    shard: int = Field(ge=0)
    count: int = Field(ge=1)
    first_index: int = Field(ge=0)
    last_index: int
    left_out: tuple[int, ...]
    sha256: str
    bytes: int
    format_version: int = FORMAT_VERSION

    @property
    def indices(self) -> list[int]:
        """The indices of the shard's records."""
        left_out = set(self.left_out)
        return [index for index in range(self.first_index, self.last_index + 1) if index not in left_out]

    @model_validator(mode="after")
    def _adds_up(self) -> "Sidecar":
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format version {self.format_version}; this version reads {FORMAT_VERSION}")
        span = range(self.first_index, self.last_index + 1)
        in_order = list(self.left_out) == sorted(set(self.left_out)) and all(index in span for index in self.left_out)
        if not in_order or len(span) != self.count + len(self.left_out):
            raise ValueError("count, range of indices and left-out indices do not add up")
        return self


class BadShard(DataError):
    """A shard's file is missing or is not what its sidecar or the manifest says; making the shard again mends it."""

    def __init__(self, path: Path, fault: str) -> None:
        self.path, self.fault = path, fault
        folder = shlex.quote(str(path.parent.parent))
        super().__init__(f'"{path}" {fault}', f"Run `instaflow repair {folder}`: it makes such shards again.")


class NotWritten(DataError):
    """A file of a couple stage that the disk refused: it is full, read-only, or gone."""

    def __init__(self, path: Path, error: OSError) -> None:
        hint = "Make room or mend the folder, then run the same command again: finished shards are kept."
        super().__init__(f'"{path}" could not be written: {error.strerror}', hint)


def tar_path(folder: Path, shard: int) -> Path:
    return folder / "shards" / f"{shard:05d}.tar"


def sidecar_path(folder: Path, shard: int) -> Path:
    return folder / "shards" / f"{shard:05d}.json"


def shards_to_make(folder: Path, plan: ShardPlan) -> list[int]:
    """The shards without a sidecar."""
    return [shard for shard in range(plan.num_shards) if not sidecar_path(folder, shard).exists()]


def write_shard(folder: Path, shard: int, records: Shard, *, left_out: list[int]) -> Sidecar:
    """Put a shard and then its sidecar into `folder`/shards, each complete or absent. Raises DataError (no space...).

    The same records give the same bytes on every machine. A crash leaves the shard without a sidecar, and at most a
    temporary file, which the next call for this shard on the same host removes. Two writers of the same records at
    once do no harm. A folder that is gone, as under a mount that vanished, is not made again.
    """
    tar, sidecar = tar_path(folder, shard), sidecar_path(folder, shard)
    data = encode(records)
    covered = [*records.indices, *left_out]
    entry = Sidecar(
        shard=shard,
        count=len(records.indices),
        first_index=min(covered),
        last_index=max(covered),
        left_out=tuple(left_out),
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
    )
    try:
        tar.parent.mkdir(exist_ok=True)
        remove_leftovers(tar)
        remove_leftovers(sidecar)
        text = json_text(entry.model_dump(mode="json"))
        with suppress(FileNotFoundError):
            if sidecar.read_bytes() != text.encode():  # it must not vouch for the new tar
                sidecar.unlink()
                sync_folder(sidecar.parent)
        write_file(tar, data)
        write_file(sidecar, text)
    except OSError as error:
        raise NotWritten(tar, error) from error
    return entry


def read_sidecar(folder: Path, shard: int, plan: ShardPlan) -> Sidecar:
    """The sidecar of a shard, checked against itself and the plan. Raises BadShard."""
    path = sidecar_path(folder, shard)
    try:
        sidecar = Sidecar.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise BadShard(path, "is missing: its shard is not done") from error
    except OSError as error:
        raise BadShard(path, f"cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise BadShard(path, f"is damaged: {error.errors(include_url=False)[0]['msg']}") from error
    indices = plan.indices(shard)
    if (sidecar.shard, sidecar.first_index, sidecar.last_index) != (shard, indices[0], indices[-1]):
        covers = f"shard {sidecar.shard} and indices {sidecar.first_index} to {sidecar.last_index}"
        raise BadShard(path, f"is of {covers}; the manifest puts {indices[0]} to {indices[-1]} here")
    return sidecar


def read_shard(folder: Path, sidecar: Sidecar) -> Shard:
    """The records of the shard that `sidecar` stands for. Raises BadShard; decodes only what its hash vouches for."""
    path = tar_path(folder, sidecar.shard)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise BadShard(path, "is missing, though it has a sidecar") from error
    except OSError as error:
        raise BadShard(path, f"cannot be read: {error.strerror}") from error
    if len(data) != sidecar.bytes:
        raise BadShard(path, f"has {len(data)} bytes where its sidecar says {sidecar.bytes}")
    if hashlib.sha256(data).hexdigest() != sidecar.sha256:
        raise BadShard(path, "does not have the hash that its sidecar says")
    try:
        return decode(data, sidecar.indices)
    except (tarfile.TarError, ValueError, KeyError, TypeError, EOFError) as error:
        raise BadShard(path, f"cannot be decoded: {error}") from error
