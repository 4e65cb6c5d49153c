"""Records a second that the loader reads, and its memory from ten thousand to ten million records.

    python -m benchmarks.loader                         the digits' records, on this machine
    python -m benchmarks.loader --architecture sd15     Stable Diffusion's

A stage's own loader goes through the first shards of an epoch, batch after batch, and does nothing else; each count of
records has a process of its own. Every shard has its sidecar, and those that are read hold random couplings, so that
ten million records fit on a disk. The files lie in the page cache: what is measured is hashing, decoding, shuffling and
batching, not a disk. With `--training-rate`, the samples a second that benchmarks/train.py found on the same machine,
the rate is told in multiples of it.
"""

import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.measuring import manifest_of
from benchmarks.memory import peak_memory
from instaflow.couplings.generate import stored_noise
from instaflow.couplings.loader import WINDOW, Couplings
from instaflow.couplings.manifest import Manifest, write_manifest
from instaflow.couplings.records import Shard
from instaflow.couplings.shards import Sidecar, sidecar_path, write_shard

SHAPES = {"digits": (4, 8, 8), "sd15": (4, 64, 64)}


@click.command()
@click.option("--architecture", type=click.Choice(list(SHAPES)), default="digits", show_default=True)
@click.option("--records", type=click.IntRange(1), multiple=True, default=(10_000, 1_000_000, 10_000_000))
@click.option("--records-per-shard", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--shards", type=click.IntRange(1), default=8, show_default=True, help="So many are read, in windows.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--workers", type=click.IntRange(0), default=WINDOW, show_default=True, help="Threads that read ahead.")
@click.option("--training-rate", type=float, help="Samples a second that training takes.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the result as JSON.")
def main(
    architecture: str,
    records: tuple[int, ...],
    records_per_shard: int,
    shards: int,
    batch_size: int,
    workers: int,
    training_rate: float | None,
    output: Path | None,
) -> None:
    """Measure how fast the loader opens and reads couplings, and how much memory it takes, by their number."""
    from instaflow.models.device import set_up_cpu
    from instaflow.world import hardware

    set_up_cpu()
    rows: list[dict[str, Any]] = []
    for count in records:
        with tempfile.TemporaryDirectory() as place:
            manifest = make_shards(Path(place), SHAPES[architecture], count, records_per_shard, shards)
            steps = min(shards * records_per_shard, manifest.count) // batch_size
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(read, (Path(place), steps, batch_size, workers))
        rows.append({"records": count, **row})
        times = f", {row['records_per_second'] / training_rate:.0f} times the training's" if training_rate else ""
        click.echo(
            f"{count:>12,} records: opened in {row['seconds_to_open']:.2f} s, then "
            f"{row['records_per_second']:,.0f} records/s{times}, {row['peak_memory_mib']:,.0f} MiB at most"
        )
    result = {
        "architecture": architecture,
        "hardware": hardware(),
        "records_per_shard": records_per_shard,
        "batch_size": batch_size,
        "workers": workers,
        "training_rate": training_rate,
        "counts": rows,
    }
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")


def make_shards(folder: Path, shape: tuple[int, int, int], count: int, records_per_shard: int, read: int) -> Manifest:
    """A done stage's folder with a sidecar for every shard, and tars for the first ones that a training reads."""
    manifest = manifest_of(shape, count, records_per_shard)
    write_manifest(folder, manifest)
    plan = manifest.plan
    (folder / "shards").mkdir()
    for shard in range(plan.num_shards):
        indices = plan.indices(shard)
        first, last = indices[0], indices[-1]
        sidecar = Sidecar(
            shard=shard,
            count=len(indices),
            first_index=first,
            last_index=last,
            left_out=(),
            sha256="0" * 64,
            bytes=0,
        )
        sidecar_path(folder, shard).write_text(sidecar.model_dump_json())
    windows = -(-read // WINDOW) + 1  # and the one that is read ahead
    for shard in Couplings(folder, 0)._order(0)[0][: windows * WINDOW]:
        indices = plan.indices(int(shard))
        noise = stored_noise(manifest, indices)
        prompts = [f"a photograph of the number {index}, in colours" for index in indices]
        write_shard(folder, int(shard), Shard(noise, -noise, prompts, list(indices)), left_out=[])
    return manifest


def read(folder: Path, steps: int, batch_size: int, workers: int) -> dict[str, float]:
    """What opening the couplings and reading so many batches takes."""
    began = time.perf_counter()
    couplings = Couplings(folder, 0, workers)
    opened = time.perf_counter()
    for step in range(steps):
        couplings.batch(step * batch_size, batch_size)
    ended = time.perf_counter()
    return {
        "seconds_to_open": opened - began,
        "records_per_second": steps * batch_size / (ended - opened),
        "peak_memory_mib": peak_memory() / 2**20,
    }


if __name__ == "__main__":
    main()
