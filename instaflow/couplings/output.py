"""A couple stage whose tars go to a store: where that is, what lies there beside them, and what others put there.

The stage's folder keeps `output.json` {url}, manifest, prompts, sidecars and leases. The store gets the tars and a copy
of the manifest, the prompts and the sidecars, under the same names: downloaded, it is a couple stage's folder itself.
"""

from pathlib import Path

from pydantic import ValidationError

from instaflow.couplings.manifest import Manifest, first_fault, read_manifest
from instaflow.couplings.shards import (
    ShardPlan,
    shards_to_make,
    sidecar_name,
    sidecar_of,
    sidecar_path,
    store_of,
    tar_name,
)
from instaflow.errors import ConfigError, DataError
from instaflow.files import write_file, write_json
from instaflow.stores import Store

NO_PROMPT = "no-prompt.npz"
BESIDE = (NO_PROMPT, "prompts.json", "manifest.json")  # the manifest last: where it is, the others are too
FREE = {"model", "data", "hardware", "compiled"}  # of a manifest: the first two count by content, and machines differ


def settle_output(folder: Path, url: str | None) -> None:
    """Write down in a stage's folder where its tars go. Raises ConfigError if some are made and lie elsewhere."""
    file, store = folder / "output.json", store_of(folder)
    before, now = store and store.url, url and Store(url).url
    if before == now:
        return
    if any((folder / "shards").glob("[0-9]*.json")):
        there = before or str(folder)
        hint = f"Go back to `output: {before or 'null'}`. Or move the shards and "
        hint += f"""write {{"url": "{now}"}} into '{file}'""" if now else f"delete '{file}'"
        raise ConfigError(f"The shards of '{folder}' lie in '{there}'; `output` is now {now or 'null'}", hint)
    if now:
        write_json(file, {"url": now})
    else:
        file.unlink()


def open_output(folder: Path) -> None:
    """Make a stage's store ready for tars, and take over what other workers of the same stage put there.

    Raises ConfigError if the store is another stage's, StoreError if it can't be written, DataError if it is no more
    what it was.
    """
    store = store_of(folder)
    if store is None:
        return
    manifest = read_manifest(folder)
    there = store.sizes("")
    if "manifest.json" in there:
        theirs = checked_manifest(store, manifest)
        if theirs.compiled != manifest.compiled:  # as the first of them decided
            manifest = manifest.model_copy(update={"compiled": theirs.compiled})
            write_json(folder / "manifest.json", manifest.model_dump(mode="json"))
    elif len(shards_to_make(folder, manifest.plan)) < manifest.plan.num_shards:
        raise lost(store, folder)
    store.make_folder("shards")
    for name in BESIDE:
        if name not in there and (folder / name).exists():
            store.put(name, folder / name)
    take_over(folder, manifest.plan)


def check_output(folder: Path) -> None:
    """Raise DataError if the store of a stage that has shards holds nothing of it any more."""
    store = store_of(folder)
    if store is None or "manifest.json" in store.sizes(""):
        return
    if not any(name.endswith(".tar") for name in store.sizes("shards")):
        raise lost(store, folder)


def lost(store: Store, folder: Path) -> DataError:
    hint = f"Bring it back (is it mounted?), or delete '{folder}' to make the stage anew"
    return DataError(f"'{store}' has lost the shards of '{folder}': it holds no manifest.json", hint)


def checked_manifest(store: Store, manifest: Manifest) -> Manifest:
    """The manifest of a store. Raises ConfigError if its couplings are not those of `manifest`."""
    hint = "Give this stage an `output` of its own, or empty that place"
    try:
        found = Manifest.model_validate_json(store.read("manifest.json"))
    except ValidationError as error:
        raise ConfigError(f"'{store.place('manifest.json')}' is not a manifest: {first_fault(error)}", hint) from error
    if changes := changes_between(found, manifest):
        raise ConfigError(f"'{store}' holds other couplings: {'; '.join(changes)}", hint)
    return found


def changes_between(found: Manifest, manifest: Manifest) -> list[str]:
    """Where a store's manifest is not that of its stage's folder, but for what workers may differ in."""
    theirs, ours = (one.model_dump(mode="json", exclude=FREE) for one in (found, manifest))
    return [f"'{key}' is {theirs[key]!r} there, {ours[key]!r} here" for key in ours if theirs[key] != ours[key]]


def take_over(folder: Path, plan: ShardPlan) -> None:
    """Fetch from a stage's store the sidecars that its folder lacks, each where the tar is there whole."""
    store, missing = store_of(folder), shards_to_make(folder, plan)
    if store is None or not missing:
        return
    sizes = store.sizes("shards")
    names = {Path(sidecar_name(shard)).name: shard for shard in missing}
    for name, content in store.read_all("shards", [name for name in names if name in sizes]).items():
        shard = names[name]
        try:
            sidecar = sidecar_of(content, shard, plan)
        except ValueError:
            continue  # damaged: the shard is made again
        if sizes.get(Path(tar_name(shard)).name) == sidecar.bytes:
            path = sidecar_path(folder, shard)
            path.parent.mkdir(exist_ok=True)
            write_file(path, content)


def close_output(folder: Path) -> None:
    """Remove from a stage's store what killed writers left, when all shards are made."""
    store = store_of(folder)
    if store:
        store.remove_leftovers("")
        store.remove_leftovers("shards")
