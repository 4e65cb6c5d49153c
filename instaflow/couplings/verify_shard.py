"""Check one shard of a couple stage against its sidecar, the manifest, the prompts, and the normal distribution."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from instaflow.couplings.generate import stored_noise
from instaflow.couplings.manifest import Manifest
from instaflow.couplings.moments import Moments, moments_of
from instaflow.couplings.prompts import prompt_of
from instaflow.couplings.records import Shard, read_extra
from instaflow.couplings.shards import BadShard, place_of_tar, read_shard, read_sidecar, sidecar_path
from instaflow.couplings.soundness import fault_of, is_noise, is_sound

ROWS = 64  # records whose noise is drawn at a time


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
    images: np.ndarray | None = None  # [N, 2] uint64, of each latent, where the couplings are inverted


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
        is_exact = finite and manifest.data is None and is_noise_of(records, manifest)
        if not finite:
            faults.append("holds noise that is not finite")
        elif manifest.data is not None:
            faults += faults_of_found_noise(records)
        elif not is_exact:
            faults.append("holds noise that is not that of the manifest's seed and stage")
        faults += [f"holds noise {fault}" for fault in (moments.fault(),) if fault and manifest.data is None]
        faults += faults_of_latents(records)
    faults += faults_of_extras(records, manifest)
    if prompts is not None and records.prompts != [prompt_of(prompts, index) for index in records.indices]:
        faults.append("holds prompts that are not the stage's")
    problems = [Problem(tar, fault, shard) for fault in faults]
    images = None if manifest.data is None else digests_of(records.latent)
    return Reading(shard, problems, np.array(records.indices), digests_of(records.noise), moments, is_exact, images)


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


def faults_of_found_noise(records: Shard) -> list[str]:
    """Noise of an inversion that the writer would have left out; none of it, or one line."""
    rows = np.flatnonzero(~is_noise(records.noise))
    if not len(rows):
        return []
    size = float(np.sqrt(np.square(records.noise[rows[0]].astype(np.float64)).mean()))
    first = f"record {records.indices[rows[0]]}'s noise, which has root mean square {size:.3g} and is far from N(0, 1)"
    return [f"holds {first}{others(len(rows) - 1, 'are no noise')}"]


def digests_of(arrays: np.ndarray) -> np.ndarray:
    """A hash of each record's array: uint64 [N, 2]."""
    digests = b"".join(hashlib.blake2b(one.tobytes(), digest_size=16).digest() for one in arrays)
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


def others(count: int, words: str) -> str:
    return f" ({count:,} more {words})" if count else ""
