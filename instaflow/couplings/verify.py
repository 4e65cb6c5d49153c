"""Check a couple stage's shards against their sidecars, its manifest and its prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from instaflow.couplings.generate import stored_noise
from instaflow.couplings.manifest import Manifest, read_manifest
from instaflow.couplings.prompts import KeptPrompts, prompt_of
from instaflow.couplings.shards import (
    BadShard,
    place_of_tar,
    read_shard,
    read_sidecar,
    sidecar_name,
    sidecar_path,
    store_of,
    tar_name,
    tar_path,
)
from instaflow.errors import DataError


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


def verify(folder: Path) -> list[Problem]:
    """All that is wrong with the couplings in `folder`, shard by shard. Raises DataError where it has no manifest."""
    manifest = read_manifest(folder)
    prompts, problems = verify_prompts(folder, manifest)
    for shard in range(manifest.plan.num_shards):
        problems += verify_shard(folder, shard, manifest, prompts)
    return problems + verify_store(folder, manifest) + stray_files(folder, manifest)


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


def verify_shard(folder: Path, shard: int, manifest: Manifest, prompts: Sequence[str] | None) -> list[Problem]:
    """What is wrong with one shard. Its prompts are not compared where `prompts` is None."""
    tar = place_of_tar(folder, shard)
    if isinstance(tar, Path) and not tar.exists() and not sidecar_path(folder, shard).exists():
        return [Problem(tar, "is missing, and so is its sidecar", shard)]
    try:
        records = read_shard(folder, read_sidecar(folder, shard, manifest.plan))
    except BadShard as error:
        return [Problem(error.path, error.fault, shard)]
    faults = []
    for name, array in ("noise", records.noise), ("latent", records.latent):
        if array.shape[1:] != manifest.latent_shape or array.dtype != manifest.stored_dtype:
            held, expected = (
                f"{array.dtype}{list(array.shape[1:])}",
                f"{manifest.stored_dtype}{list(manifest.latent_shape)}",
            )
            faults.append(f"holds {name} of {held} where the manifest says {expected}")
        elif not np.isfinite(array).all():
            faults.append(f"holds {name} that is not finite")
    if not faults and not np.array_equal(records.noise, stored_noise(manifest, records.indices)):
        faults.append("holds noise that is not that of the manifest's seed and stage")
    if prompts is not None and records.prompts != [prompt_of(prompts, index) for index in records.indices]:
        faults.append("holds prompts that are not the stage's")
    return [Problem(tar, fault, shard) for fault in faults]


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
