"""Check a couple stage: every shard, all of them together, and what lies beside them."""

from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import numpy as np

from instaflow.couplings.manifest import changes_since_begun, read_manifest
from instaflow.couplings.moments import Moments
from instaflow.couplings.output import check_output
from instaflow.couplings.shards import place_of_tar, shards_to_make
from instaflow.couplings.verify_beside import (
    stray_files,
    verify_copies,
    verify_mark,
    verify_no_prompt,
    verify_prompts,
    verify_store,
)
from instaflow.couplings.verify_shard import Problem, Reading, others, read_one
from instaflow.errors import Interrupted
from instaflow.parallel import spread
from instaflow.plurals import counted


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
        problems += verify_no_prompt(folder, manifest)
        problems += verify_copies(folder, manifest, unsound={Path(problem.path).name for problem in problems})
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
        read_so_far = f"{len(readings)} of {counted(len(shards), 'shard')}"
        message = f"{read_so_far} of '{folder}' were read, and nothing was changed"
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


def verify_whole(folder: Path, readings: list[Reading]) -> list[Problem]:
    """What no shard shows alone: noise that stands twice, and the moments of all noise together."""
    problems = repeated_noise(folder, readings)
    together = sum((reading.moments for reading in readings if reading.is_exact), Moments())
    if fault := together.fault():
        problems.append(Problem(folder, f"holds, over all its shards, noise {fault}"))
    return problems


def repeated_noise(folder: Path, readings: Iterable[Reading]) -> list[Problem]:
    """Each pair of shards that share noise, with the first such pair of records.

    To be made again is the one whose noise is not the manifest's. In inverted couplings a real image that stands twice
    has the same noise twice, and that is no problem.
    """
    by_shard = {reading.shard: reading for reading in readings}
    digests = np.concatenate([np.empty((0, 2), np.uint64), *(reading.digests for reading in by_shard.values())])
    indices = np.concatenate([np.empty(0, np.int64), *(reading.indices for reading in by_shard.values())])
    shards = np.repeat(list(by_shard), [len(reading.indices) for reading in by_shard.values()])
    order = np.lexsort(digests.T)  # stable: equal ones stay in order of their index
    same = np.flatnonzero((digests[order[1:]] == digests[order[:-1]]).all(axis=1))
    found = [reading.images for reading in by_shard.values() if reading.images is not None]
    if found:
        images = np.concatenate(found)
        same = same[(images[order[same + 1]] != images[order[same]]).any(axis=1)]
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
