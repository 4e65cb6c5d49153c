"""A couple stage in words: what made it, how much of it is there, how long it took."""

from pathlib import Path

from instaflow.couplings.manifest import Manifest
from instaflow.couplings.prompts import KeptPrompts
from instaflow.couplings.shards import BadShard, Sidecar, read_sidecar, sidecar_path, store_of
from instaflow.errors import DataError
from instaflow.plurals import counted
from instaflow.rundir import read_stats

RANGES = 8  # rows of shards, at most


def describe(folder: Path, manifest: Manifest) -> list[str]:
    """Lines that tell a couple stage's identity, counts and sizes, by what its files say; no shard is opened."""
    plan, found, damaged = manifest.plan, {}, []
    for shard in range(plan.num_shards):
        try:
            if sidecar_path(folder, shard).exists():
                found[shard] = read_sidecar(folder, shard, plan)
        except BadShard:
            damaged.append(shard)
    couplings = sum(sidecar.count for sidecar in found.values())
    store, machine = store_of(folder), manifest.hardware
    facts = {
        "model": f"{manifest.model} ({short(manifest.model_fingerprint)})",
        "sampler": f"{manifest.sampler.get('class', 'unknown')}, {manifest.num_steps} steps, "
        f"{manifest.timestep_spacing} spacing, guidance {manifest.guidance_scale:g}",
        "computed": f"in {manifest.dtype}{', compiled' if manifest.compiled else ''}, batches of {manifest.batch_size}",
        "hardware": ", ".join(str(value) if key == "name" else f"{key} {value}" for key, value in machine.items()),
        "noise": "found by inversion" if manifest.data else f"seed {manifest.seed}, stage '{manifest.stage}'",
        "data": f"real images, '{manifest.data}' ({short(str(manifest.data_hash))})" if manifest.data else "",
        "prompts": described_prompts(folder, manifest),
        "records": described_records(manifest),
        "shards": f"{len(found):,} of {plan.num_shards:,}, {counted(couplings, 'coupling')}"
        + (f"; {len(damaged)} with a damaged sidecar, which instaflow verify names" if damaged else ""),
        "size": size_of(found, couplings) + (f" in {store}" if store else ""),
        "time": time_of(folder),
    }
    lines = [f"  {name:<9} {fact}" for name, fact in facts.items() if fact]
    return [str(folder), *lines, "", *table(found, plan.num_shards)]


def short(fingerprint: str) -> str:
    """A hash as people compare it; a hub model's commit after its name."""
    _, at, commit = fingerprint.rpartition("@")
    return f"commit {commit[:12]}" if at else fingerprint[:12]


def described_prompts(folder: Path, manifest: Manifest) -> str:
    try:
        prompts = KeptPrompts(folder)
    except DataError as error:
        return f"unreadable: {error.message}"
    changed = "" if prompts.hash == manifest.prompts_hash else ", NOT those of the manifest"
    return f"{len(prompts):,} ({short(prompts.hash)}){changed}"


def described_records(manifest: Manifest) -> str:
    shape = "×".join(map(str, manifest.latent_shape))
    words = [f"noise, latent and prompt; {manifest.stored_dtype} {shape}"]
    keep = manifest.keep
    if keep and keep.images:
        height, width = keep.images.size
        words.append(f"an image of every {keep.images.every:,}, {keep.images.format}, {width}×{height}")
    if keep and keep.embedding:
        words.append("text embeddings")
    if keep and keep.trajectory:
        words.append(f"states of the path at {', '.join(f'{time:g}' for time in keep.trajectory)}")
    return "; ".join(words)


def size_of(found: dict[int, Sidecar], couplings: int) -> str:
    size = sum(sidecar.bytes for sidecar in found.values())
    return f"{size / 1e6:,.1f} MB, {size / couplings / 1024:,.1f} KiB a coupling" if couplings else ""


def time_of(folder: Path) -> str:
    """Seconds of work and the rate, as the stage logged them; what a repair made again does not count."""
    stats = [line for line in read_stats(folder / "stats.jsonl") if {"count", "seconds"} <= line.keys()]
    seconds = max((line["seconds"] for line in stats), default=0.0)
    if not seconds:
        return ""
    return f"{seconds:,.0f} s, {sum(line['count'] for line in stats) / seconds:,.1f} couplings/s"


def table(found: dict[int, Sidecar], num_shards: int) -> list[str]:
    """Couplings, left out and bytes by ranges of shards."""
    step = -(-num_shards // RANGES)
    lines = [f"  {'shards':<13} {'made':>7} {'couplings':>12} {'left out':>9} {'MB':>11}"]
    for first in range(0, num_shards, step):
        last = min(first + step, num_shards) - 1
        here = [found[shard] for shard in range(first, last + 1) if shard in found]
        name = f"{first:05d}" if first == last else f"{first:05d}–{last:05d}"
        left_out, size = sum(len(sidecar.left_out) for sidecar in here), sum(sidecar.bytes for sidecar in here) / 1e6
        couplings = sum(sidecar.count for sidecar in here)
        lines.append(f"  {name:<13} {len(here):>7,} {couplings:>12,} {left_out:>9,} {size:>11,.1f}")
    return lines
