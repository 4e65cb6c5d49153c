"""`manifest.json`: what a couple stage's shards hold and what made them."""

import json
import os
import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from instaflow.couplings.records import Kept
from instaflow.couplings.shards import FORMAT_VERSION, ShardPlan
from instaflow.errors import DataError
from instaflow.files import json_text, remove_leftovers, write_new
from instaflow.image_files import images_exist
from instaflow.sections import DIGITS


class Manifest(BaseModel):
    """Identity of a couple stage. What decides bytes: all but `hardware`, which decides the latents' last bits."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    stage: str  # its name, part of the noise's key
    seed: int
    count: int = Field(ge=1)
    records_per_shard: int = Field(ge=1)
    latent_shape: tuple[int, int, int]  # (C, H, W)
    stored_dtype: Literal["float16", "float32"] = "float16"  # of noise and latents in the shards
    prompts_hash: str
    data: str | None = None  # where the real images are that were inverted, as the stage's folder sees it
    data_hash: str | None = None
    model: str  # a stage's relative name, or a hub name
    model_fingerprint: str
    sampler: dict[str, Any]  # {"class": ..., and its config}
    num_steps: int = Field(ge=1)
    guidance_scale: float
    timestep_spacing: str
    dtype: Literal["float32", "bfloat16", "float16"]  # the model computes in it
    batch_size: int = Field(ge=1)
    compiled: bool = False  # the network, which changes the latents' last bits
    keep: Kept | None = None  # what records hold besides noise, latent and prompt
    hardware: dict[str, Any]
    format_version: int = FORMAT_VERSION

    @property
    def plan(self) -> ShardPlan:
        return ShardPlan(self.count, self.records_per_shard)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a stage's manifest into its folder; where it is already, perhaps another worker's, it stays."""
    path = folder / "manifest.json"
    remove_leftovers(path)
    write_new(path, json_text(manifest.model_dump(mode="json")))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a couple stage's folder. Raises DataError."""
    path = folder / "manifest.json"
    is_stage = (folder / "stage.json").exists()
    if is_stage and not path.exists() and (kind := kind_of(folder)) != "couple":
        raise DataError(f'"{folder}" is a stage of kind {kind}; couplings are in those of kind couple')
    hint = make_anew(folder) if is_stage else "Name the folder of a couple stage, such as runs/digits/pairs."
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f'"{path}" cannot be read: {error.strerror}', hint) from error
    except ValidationError as error:
        raise DataError(f'"{path}" is not a manifest: {first_fault(error)}', hint) from error
    if manifest.format_version != FORMAT_VERSION:
        message = f'"{path}" has format version {manifest.format_version}; this version reads {FORMAT_VERSION}'
        raise DataError(message, "Use the version of instaflow that made the couplings.")
    return manifest


def changes_since_begun(folder: Path, manifest: Manifest) -> list[str]:
    """Where a manifest is not what the `stage.json` beside it says that the stage was begun with.

    A setting that is null there, or of which it does not tell, was left to the program; none is told where it can't be
    read, as in a copy of the couplings alone.
    """
    try:
        begun = dict(json.loads((folder / "stage.json").read_bytes())["identity"])
    except (OSError, ValueError, LookupError, TypeError):
        return []
    same = "seed", "count", "records_per_shard", "num_steps", "guidance_scale", "dtype", "batch_size"
    here = {key: getattr(manifest, key) for key in same}
    there = {key: begun.get(key) for key in same}
    here |= {"stage": manifest.stage, "model_fingerprint": manifest.model_fingerprint}
    there |= {"stage": begun.get("name"), "model_fingerprint": begun.get("model (content)")}
    here["data"], there["data"] = manifest.data_hash, begun.get("data")
    if "keep" in begun:
        kept, keep = manifest.keep or Kept(), begun["keep"] or {}
        here["keep.images"] = kept.images.model_dump(include={"every", "format"}) if kept.images else {}
        there["keep.images"] = keep.get("images") or {}
        here["keep.embeddings"] = kept.embedding is not None
        there["keep.embeddings"] = bool(keep.get("embeddings"))
        here["keep.trajectory"] = f"{len(kept.trajectory or ())} states"
        there["keep.trajectory"] = f"{len(keep.get('trajectory') or ())} states"
    return [
        f"'{key}' is {value!r} here, {there[key]!r} in stage.json"
        for key, value in here.items()
        if there[key] is not None and there[key] != value
    ]


def kind_of(folder: Path) -> str:
    """What kind of stage the folder says that it is; "couple" where it can't be read."""
    return setting_of(folder, "kind") or "couple"


def setting_of(folder: Path, key: str) -> str | None:
    """A setting as the stage's experiment file had it; None where it can't be read."""
    try:
        return str(json.loads((folder / "stage.json").read_bytes())["settings"][key])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def place_of_data(folder: Path, manifest: Manifest) -> str:
    """Where the images of a stage's inverted couplings should be: as in the manifest, or else where the stage read."""
    data = str(manifest.data)
    if data == DIGITS or "://" in data:
        return data
    beside = os.path.normpath(folder.absolute() / data)
    typed = setting_of(folder, "data")
    return beside if typed is None or images_exist(beside) else typed


def place_of_model(folder: Path, manifest: Manifest) -> str:
    """Where the model of a stage's couplings should be: a hub name, or the folder or file where the stage found it.

    A model of the same run is found after the run has moved, and one outside of it where the experiment file said.
    """
    beside = Path(os.path.normpath(folder.absolute() / manifest.model))
    typed = setting_of(folder, "model")
    if beside.exists():
        return str(beside)
    if typed and Path(typed).exists():
        return typed
    return str(beside) if manifest.model.startswith("..") else manifest.model


def make_anew(folder: Path) -> str:
    """A hint for a lost file that no other file of the stage can restore: a stage that is done is not made again."""
    place = shlex.quote(str(folder))
    return f"Restore it from a copy, or delete {place} and run the stage's `instaflow couple` command again."


def first_fault(error: ValidationError) -> str:
    """A validation error in one line: the key, and what is wrong with it."""
    fault = error.errors(include_url=False)[0]
    return ": ".join(filter(None, [".".join(map(str, fault["loc"])), fault["msg"]]))
