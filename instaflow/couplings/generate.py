"""Make one shard of couplings with a sampler that is handed in."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from instaflow.couplings.manifest import Manifest
from instaflow.couplings.noise import coupled_noise
from instaflow.couplings.prompts import prompt_of
from instaflow.couplings.records import Shard, write_extra
from instaflow.couplings.shards import Sidecar, write_shard
from instaflow.couplings.soundness import fault_of, is_noise, is_sound
from instaflow.errors import DataError

FEW = 8  # unsound latents in a row, a shard of them, are no accident: the model or its settings are bad
AHEAD = 1  # batches that a device works on while an earlier one is fetched and rounded


@dataclass(frozen=True)
class Made:
    """What a sampler makes of B records."""

    latent: np.ndarray  # [B, C, H, W] float32, scaled
    extras: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    """What else they hold, by field and index, as `write_extra` takes it."""
    noise: np.ndarray | None = None  # [B, C, H, W] float32, if it was found by inversion and not given


Sampler = Callable[[Sequence[int], np.ndarray, list[str]], Callable[[], Made]]
"""Begins to make the records of B indices: noise [B, C, H, W], float32 of unit variance, with B prompts. Returns what
waits for the result and gives it. One that inverts finds another noise, and has no use for the given one."""


def make_records(
    folder: Path,
    shard: int,
    manifest: Manifest,
    prompts: Sequence[str],
    sample: Sampler,
    *,
    again: Sampler | None = None,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[int], None] = lambda records: None,
) -> Shard | None:
    """A shard's records; None where `stop` said so, which is asked before each batch.

    The noise is rounded to the stored dtype before it is integrated, so that the stored pair is exact. Records whose
    stored latent is not sound (not finite, constant, far off in deviation), whose noise was found and is none, or that
    hold anything else that is not finite, are made once more by `again`, which is more precise; where that is None or
    doesn't help they are left out. `report` hears each batch's size when it is done. Raises DataError where none of at
    least `FEW` is left.
    """
    noises, latents = [], []
    indices: list[int] = []
    faults: list[str] = []
    files: dict[str, dict[int, bytes]] = {}

    def begin(sampler: Sampler, batch: Sequence[int], noise: np.ndarray) -> Callable[[], Made]:
        return sampler(batch, noise.astype(np.float32), [prompt_of(prompts, index) for index in batch])

    def take(batch: range, noise: np.ndarray, fetch: Callable[[], Made]) -> None:
        made = fetch()
        latent, extras = stored(manifest, made.latent, noise.shape), made.extras
        inverted = made.noise is not None
        found = stored(manifest, made.noise, noise.shape) if made.noise is not None else noise

        def are_sound() -> np.ndarray:
            sound = is_sound(latent) & are_finite(extras, batch)
            return sound & is_noise(found) if inverted else sound

        sound = are_sound()
        rows = np.flatnonzero(~sound)
        if again and len(rows):
            made = begin(again, [batch[row] for row in rows], noise[rows])()
            latent[rows] = stored(manifest, made.latent, noise[rows].shape)
            if made.noise is not None:
                found[rows] = stored(manifest, made.noise, noise[rows].shape)
            extras = {name: values | made.extras.get(name, {}) for name, values in extras.items()}
            sound = are_sound()
        odd = "leads to no noise" if inverted else "keeps what is not finite"
        faults.extend(fault_of(each) or odd for each in latent[~sound][:1])
        noises.append(found[sound])
        latents.append(latent[sound])
        taken = [batch[row] for row in np.flatnonzero(sound)]
        indices.extend(taken)
        for name, values in extras.items():
            written = {index: write_extra(name, values[index]) for index in taken if index in values}
            files.setdefault(name, {}).update(written)
        report(len(batch))

    begun: deque[tuple[range, np.ndarray, Callable[[], Made]]] = deque()
    for batch in manifest.plan.batches(shard, manifest.batch_size):
        if stop():
            return None
        noise = stored_noise(manifest, batch)
        begun.append((batch, noise, begin(sample, batch, noise)))
        if len(begun) > AHEAD:
            take(*begun.popleft())
    for each in begun:
        take(*each)
    if not indices and len(manifest.plan.indices(shard)) >= FEW:
        hint = "Look at the model's images at these settings (`instaflow sample`), or sample in float32."
        if manifest.data:
            hint = f"Look at the images of '{manifest.data}': are they damaged? Or invert in float32, or in more steps."
        raise DataError(f'shard {shard} of "{folder}": not one latent can be an image\'s; the first {faults[0]}', hint)
    return Shard(
        noise=np.concatenate(noises),
        latent=np.concatenate(latents),
        prompts=[prompt_of(prompts, index) for index in indices],
        indices=indices,
        extras=files,
    )


def write_records(folder: Path, shard: int, manifest: Manifest, records: Shard) -> Sidecar:
    """Write a shard's records; those of its indices that are not among them were left out. Raises DataError."""
    left_out = sorted(set(manifest.plan.indices(shard)) - set(records.indices))
    return write_shard(folder, shard, records, left_out=left_out)


def stored(manifest: Manifest, latent: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Latents as a shard holds them; one that overflows the stored dtype becomes infinite."""
    if latent.shape != shape:
        raise ValueError(f"the sampler returned {latent.shape} for noise of {shape}")
    with np.errstate(over="ignore"):
        return latent.astype(manifest.stored_dtype)


def are_finite(extras: dict[str, dict[int, np.ndarray]], indices: Sequence[int]) -> np.ndarray:
    """Whether all is finite that the record of each index holds besides its pair: bool [N]."""
    found = [[values[index] for values in extras.values() if index in values] for index in indices]
    return np.array([all(np.isfinite(value).all() for value in held) for held in found], bool)


def stored_noise(manifest: Manifest, indices: list[int] | range) -> np.ndarray:
    """The noise of these records as a shard holds it: [N, C, H, W] in the stored dtype."""
    noise = coupled_noise(manifest.seed, manifest.stage, indices, manifest.latent_shape)
    return noise.astype(manifest.stored_dtype)
