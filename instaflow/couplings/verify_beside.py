"""Check what lies beside a couple stage's shards, in its folder and in its store: prompts, marks, copies, strays."""

import hashlib
import io
import json
import zipfile
import zlib
from pathlib import Path, PurePath

from pydantic import ValidationError

from instaflow.couplings.manifest import Manifest, first_fault
from instaflow.couplings.output import BESIDE, NO_PROMPT, changes_between
from instaflow.couplings.prompts import KeptPrompts
from instaflow.couplings.records import Kept
from instaflow.couplings.shards import (
    ShardPlan,
    shards_fingerprint,
    sidecar_name,
    sidecar_path,
    store_of,
    tar_name,
    tar_path,
)
from instaflow.couplings.verify_shard import Problem, fault_of_extra
from instaflow.errors import DataError


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


def verify_copies(folder: Path, manifest: Manifest, unsound: set[str]) -> list[Problem]:
    """What is wrong with the store's copies of the files beside the shards, but for those `unsound` in the folder."""
    store = store_of(folder)
    if store is None:
        return []
    due = {name for name in BESIDE if name not in unsound and (folder / name).exists()}
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
