"""Make one shard of couplings with a sampler that is handed in."""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from instaflow.couplings.manifest import Manifest
from instaflow.couplings.noise import coupled_noise
from instaflow.couplings.prompts import prompt_of
from instaflow.couplings.records import Shard
from instaflow.couplings.shards import Sidecar, write_shard
from instaflow.couplings.soundness import fault_of, is_sound
from instaflow.errors import DataError

Sampler = Callable[[np.ndarray, list[str]], Callable[[], np.ndarray]]
"""Begins to sample noise [B, C, H, W], float32 of unit variance, with B prompts; returns what waits for the result and
gives it: scaled latents [B, C, H, W], float32."""
AHEAD = 1  # batches that a device works on while an earlier one is fetched and rounded


def make_shard(
    folder: Path,
    shard: int,
    manifest: Manifest,
    prompts: Sequence[str],
    sample: Sampler,
    *,
    again: Sampler | None = None,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[int], None] = lambda records: None,
) -> Sidecar | None:
    """Sample a shard's couplings and write them; the sidecar, or None where `stop` said so before the shard was full.

    See `make_records`. Raises DataError also where the shard can't be written.
    """
    records = make_records(folder, shard, manifest, prompts, sample, again=again, stop=stop, report=report)
    return None if records is None else write_records(folder, shard, manifest, records)


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
    stored latent is not sound (not finite, constant, far off in deviation) are sampled once more by `again`, which is
    more precise; where that is None or doesn't help they are left out. `report` hears each batch's size when it is
    done. Raises DataError where no record is left.
    """
    noises, latents = [], []
    indices: list[int] = []
    faults: list[str | None] = []

    def take(batch: range, noise: np.ndarray, fetch: Callable[[], np.ndarray]) -> None:
        latent = stored(manifest, fetch(), noise.shape)
        sound = is_sound(latent)
        rows = np.flatnonzero(~sound)
        if again and len(rows):
            fetch = again(noise[rows].astype(np.float32), [prompt_of(prompts, batch[row]) for row in rows])
            latent[rows] = stored(manifest, fetch(), noise[rows].shape)
            sound = is_sound(latent)
        faults.extend(fault_of(each) for each in latent[~sound][:1])
        noises.append(noise[sound])
        latents.append(latent[sound])
        indices.extend(batch[row] for row in np.flatnonzero(sound))
        report(len(batch))

    begun: deque[tuple[range, np.ndarray, Callable[[], np.ndarray]]] = deque()
    for batch in manifest.plan.batches(shard, manifest.batch_size):
        if stop():
            return None
        noise = stored_noise(manifest, batch)
        begun.append((batch, noise, sample(noise.astype(np.float32), [prompt_of(prompts, index) for index in batch])))
        if len(begun) > AHEAD:
            take(*begun.popleft())
    for each in begun:
        take(*each)
    if not indices:
        hint = "Look at the model's images at these settings (`instaflow sample`), or sample in float32."
        raise DataError(f'shard {shard} of "{folder}": not one latent can be an image\'s; the first {faults[0]}', hint)
    return Shard(
        noise=np.concatenate(noises),
        latent=np.concatenate(latents),
        prompts=[prompt_of(prompts, index) for index in indices],
        indices=indices,
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


def stored_noise(manifest: Manifest, indices: list[int] | range) -> np.ndarray:
    """The noise of these records as a shard holds it: [N, C, H, W] in the stored dtype."""
    noise = coupled_noise(manifest.seed, manifest.stage, indices, manifest.latent_shape)
    return noise.astype(manifest.stored_dtype)
