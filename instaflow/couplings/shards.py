"""Shards on disk: the plan of indices, a tar of records, and the sidecar that marks it done.

`shards/00012.tar` holds records. `shards/00012.json`, its sidecar, is written after it: a shard without one is not
done. Readers trust sidecars, never a listing, and decode nothing whose hash did not match.

Where the stage's folder has an `output.json`, the tars lie in the store whose URL it gives, under the same names and
with copies of the sidecars. A sidecar in the folder means even so: the tar is there, with this hash.
"""

import hashlib
import json
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from instaflow.couplings.records import Shard, decode, encode
from instaflow.errors import DataError
from instaflow.files import json_text, remove_leftovers, sync_folder, write_file
from instaflow.stores import Store

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
    count: int = Field(ge=0)
    first_index: int = Field(ge=0)
    last_index: int = Field(ge=0, lt=1 << 53)
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

    def __init__(self, folder: Path, path: Path | str, fault: str) -> None:
        self.path, self.fault = path, fault
        hint = f"Run `instaflow repair {shlex.quote(str(folder))}`: it makes such shards again."
        super().__init__(f'"{path}" {fault}', hint)


class NotWritten(DataError):
    """A file of a couple stage that the disk refused: it is full, read-only, or gone."""

    def __init__(self, path: Path, error: OSError) -> None:
        hint = "Make room or mend the folder, then run the same command again: finished shards are kept."
        super().__init__(f'"{path}" could not be written: {error.strerror}', hint)


def tar_name(shard: int) -> str:
    return f"shards/{shard:05d}.tar"


def sidecar_name(shard: int) -> str:
    return f"shards/{shard:05d}.json"


def tar_path(folder: Path, shard: int) -> Path:
    return folder / tar_name(shard)


def sidecar_path(folder: Path, shard: int) -> Path:
    return folder / sidecar_name(shard)


def store_of(folder: Path) -> Store | None:
    """The store that holds a stage's tars, None where its folder does. Raises DataError."""
    path = folder / "output.json"
    try:
        return Store(json.loads(path.read_bytes())["url"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f'"{path}" cannot be read: {error}', 'It should say {"url": "s3://bucket/folder"}') from error


def place_of_tar(folder: Path, shard: int) -> Path | str:
    """The path of a shard's tar, or its URL."""
    store = store_of(folder)
    return store.place(tar_name(shard)) if store else tar_path(folder, shard)


def shards_to_make(folder: Path, plan: ShardPlan) -> list[int]:
    """The shards without a sidecar."""
    return [shard for shard in range(plan.num_shards) if not sidecar_path(folder, shard).exists()]


def write_shard(folder: Path, shard: int, records: Shard, *, left_out: list[int]) -> Sidecar:
    """Put a shard and then its sidecar into `folder`/shards, each complete or absent. Raises DataError (no space...).

    The same records give the same bytes on every machine. A crash leaves the shard without a sidecar, and at most a
    temporary file, which the next call for this shard on the same host removes. Two writers of the same records at
    once do no harm. A folder that is gone, as under a mount that vanished, is not made again. A store that holds the
    shard already keeps it: another worker put it there, and its sidecar is taken over.
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
    store = store_of(folder)
    held = held_by(store, entry) if store else None
    text = json_text((held or entry).model_dump(mode="json"))
    try:
        tar.parent.mkdir(exist_ok=True)
        remove_leftovers(tar)
        remove_leftovers(sidecar)
        with suppress(FileNotFoundError):
            if sidecar.read_bytes() != text.encode():  # it must not vouch for the new tar
                sidecar.unlink()
                sync_folder(sidecar.parent)
        if store is None:
            write_file(tar, data)
        elif held is None:
            store.remove(sidecar_name(shard))
            store.put(tar_name(shard), data)
            store.put(sidecar_name(shard), text.encode())
        write_file(sidecar, text)
    except OSError as error:
        raise NotWritten(tar, error) from error
    return held or entry


def held_by(store: Store, entry: Sidecar) -> Sidecar | None:
    """The sidecar of the shard with `entry`'s indices that a store holds whole, if it does."""
    try:
        held = Sidecar.model_validate_json(store.read(sidecar_name(entry.shard)))
    except (FileNotFoundError, ValidationError):
        return None
    is_same = (held.shard, held.first_index, held.last_index) == (entry.shard, entry.first_index, entry.last_index)
    return held if is_same and store.size(tar_name(entry.shard)) == held.bytes else None


def unmark_shard(folder: Path, shard: int) -> None:
    """Remove a shard's sidecar, also in the store that holds its tar: it is to be made again."""
    store = store_of(folder)
    if store:
        store.remove(sidecar_name(shard))  # first: whoever comes next would take it over
    sidecar_path(folder, shard).unlink(missing_ok=True)


def read_sidecar(folder: Path, shard: int, plan: ShardPlan) -> Sidecar:
    """The sidecar of a shard, checked against itself and the plan. Raises BadShard."""
    path = sidecar_path(folder, shard)
    try:
        return sidecar_of(path.read_bytes(), shard, plan)
    except FileNotFoundError as error:
        raise BadShard(folder, path, "is missing: its shard is not done") from error
    except OSError as error:
        raise BadShard(folder, path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadShard(folder, path, str(error)) from error


def sidecar_of(content: bytes, shard: int, plan: ShardPlan) -> Sidecar:
    """The sidecar of a shard from its JSON. Raises ValueError, which says what is wrong with the file."""
    try:
        sidecar = Sidecar.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(f"is damaged: {error.errors(include_url=False)[0]['msg']}") from error
    indices = plan.indices(shard)
    if (sidecar.shard, sidecar.first_index, sidecar.last_index) != (shard, indices[0], indices[-1]):
        covers = f"shard {sidecar.shard} and indices {sidecar.first_index} to {sidecar.last_index}"
        raise ValueError(f"is of {covers}; the manifest puts {indices[0]} to {indices[-1]} here")
    return sidecar


def shards_fingerprint(folder: Path, plan: ShardPlan) -> str:
    """The hash of all shards' hashes."""
    hashes = [read_sidecar(folder, shard, plan).sha256 for shard in range(plan.num_shards)]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def read_shard(folder: Path, sidecar: Sidecar) -> Shard:
    """The records of the shard that `sidecar` stands for; decodes only what its hash vouches for.

    Raises BadShard; from a store that can't be reached StoreError.
    """
    store, name = store_of(folder), tar_name(sidecar.shard)
    path = store.place(name) if store else folder / name
    try:
        data = store.read(name) if store else (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise BadShard(folder, path, "is missing, though it has a sidecar") from error
    except OSError as error:
        raise BadShard(folder, path, f"cannot be read: {error.strerror}") from error
    if len(data) != sidecar.bytes:
        raise BadShard(folder, path, f"has {len(data)} bytes where its sidecar says {sidecar.bytes}")
    if hashlib.sha256(data).hexdigest() != sidecar.sha256:
        raise BadShard(folder, path, "does not have the hash that its sidecar says")
    try:
        return decode(data, sidecar.indices)
    except Exception as error:  # a hostile file finds more ways to fail than can be named
        raise BadShard(folder, path, f"cannot be decoded: {str(error) or type(error).__name__}") from error
