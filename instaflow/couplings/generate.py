"""Make one shard of couplings with a sampler that is handed in."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from instaflow.couplings.manifest import Manifest
from instaflow.couplings.noise import coupled_noise
from instaflow.couplings.prompts import prompt_of
from instaflow.couplings.records import Shard
from instaflow.couplings.shards import Sidecar, write_shard
from instaflow.errors import DataError

# noise [B, C, H, W] float32, unit variance, and B prompts, to scaled latents [B, C, H, W] float32
Sampler = Callable[[np.ndarray, list[str]], np.ndarray]


def make_shard(
    folder: Path,
    shard: int,
    manifest: Manifest,
    prompts: Sequence[str],
    sample: Sampler,
    *,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[int], None] = lambda records: None,
) -> Sidecar | None:
    """Sample a shard's couplings and write them; the sidecar, or None where `stop` said so before the shard was full.

    The noise is rounded to the stored dtype before it is integrated, so that the stored pair is exact. Records whose
    latent is not finite in the stored dtype are left out, and the sidecar lists them. `stop` is asked before each
    batch; nothing of an abandoned shard stays. `report` hears each batch's size when it is done. Raises DataError
    where no record is left, or the shard can't be written.
    """
    noises, latents, indices = [], [], []
    for batch in manifest.plan.batches(shard, manifest.batch_size):
        if stop():
            return None
        noise = stored_noise(manifest, batch)
        latent = sample(noise.astype(np.float32), [prompt_of(prompts, index) for index in batch])
        if latent.shape != noise.shape:
            raise ValueError(f"the sampler returned {latent.shape} for noise of {noise.shape}")
        with np.errstate(over="ignore"):  # an overflow becomes infinite and is left out
            latent = latent.astype(manifest.stored_dtype)
        finite = np.isfinite(latent).all(axis=(1, 2, 3))  # [B]
        noises.append(noise[finite])
        latents.append(latent[finite])
        indices += [batch[row] for row in np.flatnonzero(finite)]
        report(len(batch))
    if not indices:
        hint = f"Sample in float32, or store it (stored_dtype is {manifest.stored_dtype}); check the model's images."
        raise DataError(f'shard {shard} of "{folder}": not one latent is finite', hint)
    records = Shard(
        noise=np.concatenate(noises),
        latent=np.concatenate(latents),
        prompts=[prompt_of(prompts, index) for index in indices],
        indices=indices,
    )
    left_out = sorted(set(manifest.plan.indices(shard)) - set(indices))
    return write_shard(folder, shard, records, left_out=left_out)


def stored_noise(manifest: Manifest, indices: list[int] | range) -> np.ndarray:
    """The noise of these records as a shard holds it: [N, C, H, W] in the stored dtype."""
    noise = coupled_noise(manifest.seed, manifest.stage, indices, manifest.latent_shape)
    return noise.astype(manifest.stored_dtype)
