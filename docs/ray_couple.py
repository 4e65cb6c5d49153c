"""Couplings on a Ray cluster whose machines see the run's folder: a task a worker, each with fixed shards.

    python ray_couple.py mine.yaml pairs 8

CONFIG, STAGE, how many workers, and how many GPUs each has (1 unless it is said). The package must be installed on
all machines, and the paths be absolute or the same everywhere. A worker that is lost or told to stop is started again,
and goes on where it was.

Tried: two workers without GPUs on one machine, on a Ray 2.60 that the script starts, and on one that `ray start --head`
did, by `ray job submit -- python ray_couple.py mine.yaml pairs 2 0` with absolute paths; the shards are those of one
command without Ray, to the bit. Not tried: several machines, GPUs.
"""

import subprocess
import sys

import ray

FAILED = 3  # times that a worker is tried again


@ray.remote(max_retries=FAILED, retry_exceptions=True)
def couple(config: str, stage: str, index: int, count: int) -> None:
    """One worker's shards."""
    worker = ["--worker-index", str(index), "--worker-count", str(count)]
    subprocess.run([sys.executable, "-m", "cli", "couple", config, "--stage", stage, *worker], check=True)


def main(config: str, stage: str, workers: str, gpus: str = "1") -> None:
    ray.init()
    task = couple.options(num_gpus=float(gpus))
    ray.get([task.remote(config, stage, index, int(workers)) for index in range(int(workers))])


if __name__ == "__main__":
    main(*sys.argv[1:])
