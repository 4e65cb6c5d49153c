"""Check a couple stage's shards against their sidecars, its manifest, its prompts, and the normal distribution."""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from pydantic import ValidationError

from instaflow.couplings.generate import stored_noise
from instaflow.couplings.manifest import Manifest, changes_since_begun, first_fault, read_manifest
from instaflow.couplings.moments import Moments, moments_of
from instaflow.couplings.output import changes_between, check_output
from instaflow.couplings.prompts import KeptPrompts, prompt_of
from instaflow.couplings.records import Kept, Shard, read_extra
from instaflow.couplings.shards import (
    BadShard,
    ShardPlan,
    place_of_tar,
    read_shard,
    read_sidecar,
    shards_to_make,
    sidecar_name,
    sidecar_path,
    store_of,
    tar_name,
    tar_path,
)
from instaflow.couplings.soundness import fault_of, is_sound
from instaflow.errors import DataError, Interrupted
from instaflow.parallel import spread

ROWS = 64  # records whose noise is drawn at a time
NO_PROMPT = "no-prompt.npz"


@dataclass(frozen=True)
class Problem:
    """A file, and what is wrong with it; printed, the two are a sentence.

    `shard` is the one to make again, None where that doesn't help. A `stray` file is nobody's: the data is sound.
    """

    path: Path | str
    fault: str
    shard: int | None = None
    stray: bool = False

    def __str__(self) -> str:
        return f'"{self.path}" {self.fault}'


@dataclass(frozen=True)
class Reading:
    """What was found in one shard; arrays of no length where it could not be read."""

    shard: int
    problems: list[Problem]
    indices: np.ndarray  # [N] int64
    digests: np.ndarray  # [N, 2] uint64, of each record's noise
    moments: Moments  # of the noise
    is_exact: bool = False  # the noise is that of the manifest


def verify(
    folder: Path,
    *,
    workers: int = 1,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda couplings: None,
) -> list[Problem]:
    """All that is wrong with the couplings in `folder`, shard by shard, whatever the number of workers.

    Where the stage is not done, shards that are still to be made are no problem. `progress` hears how many couplings
    are read. Where the manifest is not what the stage was begun with, no shard is held against it. Memory: a shard's
    for each worker, 24 bytes a coupling, and a store's prompts. Raises DataError where there is no manifest, or nothing
    in the store, Interrupted if `stop` said so.
    """
    manifest = read_manifest(folder)
    if changes := changes_since_begun(folder, manifest):
        return [Problem(folder / "manifest.json", f"is not what the stage was begun with: {'; '.join(changes)}")]
    to_make = set(shards_to_make(folder, manifest.plan)) if is_unfinished(folder) else set()
    shards = [shard for shard in range(manifest.plan.num_shards) if shard not in to_make]
    if shards:
        check_output(folder)
    prompts, problems = verify_prompts(folder, manifest)
    if shards:  # before the first one, a worker may have died while it put these there
        no_prompt = verify_no_prompt(folder, manifest)
        problems += no_prompt
        sound = (
            {"manifest.json"}
            | ({"prompts.json"} if prompts is not None else set())
            | (set() if no_prompt else {NO_PROMPT})
        )
        problems += verify_copies(folder, manifest, sound)
    readings: list[Reading] = []
    couplings = 0

    def read(shard: int) -> Reading:
        return read_one(folder, shard, manifest, prompts)

    with closing(spread(read, shards, workers=workers, stop=stop)) as found:
        for reading in found:
            readings.append(reading)
            couplings += len(manifest.plan.indices(reading.shard))
            progress(couplings)
    if len(readings) < len(shards):
        message = f"{len(readings)} of {len(shards)} shards of '{folder}' were read, and nothing was changed"
        raise Interrupted(message, "The same command begins anew")
    readings.sort(key=lambda reading: reading.shard)
    for reading in readings:
        problems += reading.problems
    problems += verify_whole(folder, readings) + verify_store(folder, manifest)
    if not bad_shards(problems):
        problems += verify_mark(folder, manifest.plan)
    return problems + stray_files(folder, manifest)


def is_unfinished(folder: Path) -> bool:
    """Whether a stage is being made, or was interrupted, so that shards may be missing."""
    return (folder / "state.json").exists() and not (folder / "done.json").exists()


def bad_shards(problems: list[Problem]) -> list[int]:
    """The shards to make again."""
    return sorted({problem.shard for problem in problems if problem.shard is not None})


def verify_prompts(folder: Path, manifest: Manifest) -> tuple[KeptPrompts | None, list[Problem]]:
    """The stage's prompts, or None where they can't be trusted, and why not."""
    path = folder / "prompts.json"
    try:
        prompts = KeptPrompts(folder)
    except DataError as error:
        return None, [Problem(path, error.message.removeprefix(f'"{path}" '))]
    if prompts.hash != manifest.prompts_hash:
        return None, [Problem(path, "does not have the hash that the manifest says")]
    return prompts, []


def verify_no_prompt(folder: Path, manifest: Manifest) -> list[Problem]:
    """What is wrong with the embeddings of no prompt, where the manifest announces embeddings."""
    path = folder / NO_PROMPT
    if not manifest.keep or not manifest.keep.embedding:
        return []
    try:
        fault = fault_of_no_prompt(path.read_bytes(), manifest.keep)
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    return [Problem(path, fault)] if fault else []


def fault_of_no_prompt(content: bytes, keep: Kept) -> str | None:
    """What is wrong with a `no-prompt.npz`, in words that follow its name."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            for name, shape in ("embedding", keep.embedding), ("pooled", keep.pooled):
                if shape and f"{name}.npy" not in file.namelist():
                    return f"lacks {name}, which the manifest announces"
                if shape and (fault := fault_of_extra(f"{name}.npy", file.read(f"{name}.npy"), shape)):
                    return f"holds {name}, which {fault}"
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        return f"is damaged: {error}"
    return None


def verify_mark(folder: Path, plan: ShardPlan) -> list[Problem]:
    """Whether the shards, each of them sound, are those that the stage was done with."""
    path = folder / "done.json"
    try:
        fingerprint = json.loads(path.read_bytes())["fingerprint"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        return [Problem(path, f"is damaged: {error}")]
    if fingerprint == shards_fingerprint(folder, plan):
        return []
    return [Problem(path, "has another fingerprint than the shards: some were exchanged since the stage was done")]


def shards_fingerprint(folder: Path, plan: ShardPlan) -> str:
    """The hash of all shards' hashes."""
    hashes = [read_sidecar(folder, shard, plan).sha256 for shard in range(plan.num_shards)]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


# --- one shard --------------------------------------------------------------------------------------------------------


def read_one(folder: Path, shard: int, manifest: Manifest, prompts: Sequence[str] | None) -> Reading:
    """What one shard holds, and what is wrong with it. Its prompts are not compared where `prompts` is None."""
    tar = place_of_tar(folder, shard)
    nothing = (np.empty(0, np.int64), np.empty((0, 2), np.uint64), Moments())
    if isinstance(tar, Path) and not tar.exists() and not sidecar_path(folder, shard).exists():
        return Reading(shard, [Problem(tar, "is missing, and so is its sidecar", shard)], *nothing)
    try:
        records = read_shard(folder, read_sidecar(folder, shard, manifest.plan))
    except BadShard as error:
        return Reading(shard, [Problem(error.path, error.fault, shard)], *nothing)
    if not records.indices:  # all were left out
        return Reading(shard, [], *nothing, is_exact=True)
    faults = faults_of_shape(records, manifest)
    is_exact, moments = False, Moments()
    if not faults:
        finite = bool(np.isfinite(records.noise).all())
        moments = moments_of(records.noise) if finite else Moments()
        is_exact = finite and is_noise_of(records, manifest)
        if not finite:
            faults.append("holds noise that is not finite")
        elif not is_exact:
            faults.append("holds noise that is not that of the manifest's seed and stage")
        faults += [f"holds noise {fault}" for fault in (moments.fault(),) if fault]
        faults += faults_of_latents(records)
    faults += faults_of_extras(records, manifest)
    if prompts is not None and records.prompts != [prompt_of(prompts, index) for index in records.indices]:
        faults.append("holds prompts that are not the stage's")
    problems = [Problem(tar, fault, shard) for fault in faults]
    return Reading(shard, problems, np.array(records.indices), digests_of(records.noise), moments, is_exact)


def faults_of_shape(records: Shard, manifest: Manifest) -> list[str]:
    """Arrays that are not of the manifest's shape and dtype."""
    faults = []
    for name, array in ("noise", records.noise), ("latent", records.latent):
        if array.shape[1:] != manifest.latent_shape or array.dtype != manifest.stored_dtype:
            held = f"{array.dtype}{list(array.shape[1:])}"
            faults.append(f"holds {name} of {held} where the manifest says {said(manifest)}")
    return faults


def said(manifest: Manifest) -> str:
    return f"{manifest.stored_dtype}{list(manifest.latent_shape)}"


def is_noise_of(records: Shard, manifest: Manifest) -> bool:
    """Whether each record's noise is, to the bit, what the manifest's seed and stage make of its index."""
    parts = (slice(start, start + ROWS) for start in range(0, len(records.indices), ROWS))
    return all(np.array_equal(records.noise[part], stored_noise(manifest, records.indices[part])) for part in parts)


def digests_of(noise: np.ndarray) -> np.ndarray:
    """A hash of each noise: uint64 [N, 2]."""
    digests = b"".join(hashlib.blake2b(one.tobytes(), digest_size=16).digest() for one in noise)
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def faults_of_latents(records: Shard) -> list[str]:
    """What the writer would have left out; None of it, or one line."""
    rows = np.flatnonzero(~is_sound(records.latent))
    if not len(rows):
        return []
    first = f"record {records.indices[rows[0]]}'s latent, which {fault_of(records.latent[rows[0]])}"
    return [f"holds {first}{others(len(rows) - 1, 'are not sound')}"]


def faults_of_extras(records: Shard, manifest: Manifest) -> list[str]:
    """Optional fields that are not as the manifest's `keep` announces them: the first fault of each field."""
    faults: dict[str, str] = {}
    for index in records.indices:
        due = manifest.keep.members(index, manifest.latent_shape) if manifest.keep else {}
        for name in sorted({*due, *records.extras}):
            content = records.extras.get(name, {}).get(index)
            if content is None and name in due:
                faults.setdefault(name, f"lacks {name} of record {index}, which the manifest announces")
            elif content is not None and name not in due:
                faults.setdefault(name, f"holds {name} of record {index}, which the manifest does not announce")
            elif content is not None and (fault := fault_of_extra(name, content, due[name])):
                faults.setdefault(name, f"holds {name} of record {index}, which {fault}")
    return list(faults.values())


def fault_of_extra(name: str, content: bytes, shape: tuple[int, ...]) -> str | None:
    """What is wrong with one optional field, in words that follow "which"."""
    try:
        value = read_extra(name, content)
    except ValueError as error:
        return f"cannot be decoded: {error}"
    dtype = "uint8" if name.startswith("image.") else "float16"
    if value.shape != shape or value.dtype != dtype:
        return f"is {value.dtype}{list(value.shape)} where the manifest says {dtype}{list(shape)}"
    return None if np.isfinite(value).all() else "is not finite"


# --- the whole set ----------------------------------------------------------------------------------------------------


def verify_whole(folder: Path, readings: list[Reading]) -> list[Problem]:
    """What no shard shows alone: noise that stands twice, and the moments of all noise together."""
    problems = repeated_noise(folder, readings)
    together = sum((reading.moments for reading in readings if reading.is_exact), Moments())
    if fault := together.fault():
        problems.append(Problem(folder, f"holds, over all its shards, noise {fault}"))
    return problems


def repeated_noise(folder: Path, readings: Iterable[Reading]) -> list[Problem]:
    """Each pair of shards that share noise, with the first such pair of records.

    To be made again is the one whose noise is not the manifest's.
    """
    by_shard = {reading.shard: reading for reading in readings}
    digests = np.concatenate([np.empty((0, 2), np.uint64), *(reading.digests for reading in by_shard.values())])
    indices = np.concatenate([np.empty(0, np.int64), *(reading.indices for reading in by_shard.values())])
    shards = np.repeat(list(by_shard), [len(reading.indices) for reading in by_shard.values()])
    order = np.lexsort(digests.T)  # stable: equal ones stay in order of their index
    same = np.flatnonzero((digests[order[1:]] == digests[order[:-1]]).all(axis=1))
    shared: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for earlier, later in sorted(zip(order[same].tolist(), order[same + 1].tolist(), strict=True)):
        guilty, other = later, earlier
        if by_shard[shards[later]].is_exact and not by_shard[shards[earlier]].is_exact:
            guilty, other = earlier, later
        shared.setdefault((int(shards[guilty]), int(shards[other])), []).append((indices[guilty], indices[other]))
    return [
        Problem(
            place_of_tar(folder, guilty),
            f'holds in record {pairs[0][0]} the noise of record {pairs[0][1]} of "{place_of_tar(folder, other)}"'
            f"{others(len(pairs) - 1, 'such pairs')}",
            None if by_shard[guilty].is_exact else guilty,
        )
        for (guilty, other), pairs in sorted(shared.items())
    ]


def others(count: int, words: str) -> str:
    return f" ({count:,} more {words})" if count else ""


def verify_copies(folder: Path, manifest: Manifest, sound: set[str]) -> list[Problem]:
    """What is wrong with the store's copies of those files beside the shards that are `sound` in the folder."""
    store = store_of(folder)
    if store is None:
        return []
    due = {name for name in sound if (folder / name).exists()}
    found = store.read_all("", sorted(due & store.sizes("").keys()))
    faults = {name: fault_of_copy(folder / name, found.get(name), manifest) for name in sorted(due)}
    return [
        Problem(store.place(name), f"{fault}; copy '{folder / name}' there") for name, fault in faults.items() if fault
    ]


def fault_of_copy(path: Path, content: bytes | None, manifest: Manifest) -> str | None:
    """What is wrong with a store's copy of a stage's file, in words that follow its name."""
    if content is None:
        return "is missing"
    if path.name == "manifest.json":
        try:
            changes = changes_between(Manifest.model_validate_json(content), manifest)
        except ValidationError as error:
            return f"is not a manifest: {first_fault(error)}"
        return f"is of other couplings: {'; '.join(changes)}" if changes else None
    if path.name == NO_PROMPT:  # another worker's, whose machine may round in another way
        return fault_of_no_prompt(content, manifest.keep or Kept())
    with open(path, "rb") as file:
        is_same = hashlib.file_digest(file, "sha256").digest() == hashlib.sha256(content).digest()
    return None if is_same else "is no copy of the stage's"


def verify_store(folder: Path, manifest: Manifest) -> list[Problem]:
    """What is wrong, beside the tars, in the store that holds them: lost copies of sidecars, and stray files."""
    store = store_of(folder)
    if store is None:
        return []
    sidecars = {PurePath(sidecar_name(shard)).name: shard for shard in range(manifest.plan.num_shards)}
    tars = {PurePath(tar_name(shard)).name for shard in range(manifest.plan.num_shards)}
    found = store.sizes("shards")
    copies = store.read_all("shards", sorted(sidecars.keys() & found.keys()))
    problems = []
    for name, shard in sidecars.items():
        path = sidecar_path(folder, shard)
        if path.exists() and path.read_bytes() != copies.get(name):
            problems.append(Problem(store.place(f"shards/{name}"), f"is no copy of '{path}'", shard))
    strays = sorted(found.keys() - sidecars.keys() - tars)
    return problems + [Problem(store.place(f"shards/{name}"), what_stray(name), stray=True) for name in strays]


def what_stray(name: str) -> str:
    return "is a temporary file" if ".tmp-" in name else "is no file of this stage"


def stray_files(folder: Path, manifest: Manifest) -> list[Problem]:
    """Files that no shard owns, and temporary files of writers that died or still write."""
    shards = range(manifest.plan.num_shards)
    owned = {path(folder, shard) for shard in shards for path in (tar_path, sidecar_path)}
    found = [path for path in sorted((folder / "shards").glob("*")) if path not in owned]
    found += sorted(folder.glob(".*.tmp-*"))
    return [Problem(path, what_stray(path.name), stray=True) for path in found]
