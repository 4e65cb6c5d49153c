"""What a couple stage holds: its description in words, and a contact sheet of its pairs."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from instaflow.couplings.contact_sheet import Pair, colours, contact_sheet
from instaflow.couplings.manifest import Manifest, place_of_model, read_manifest
from instaflow.couplings.records import Shard, read_extra
from instaflow.couplings.shards import BadShard, read_shard, read_sidecar, shards_to_make
from instaflow.errors import ConfigError, DataError
from instaflow.files import write_file
from instaflow.models.device import device, set_up_cpu
from instaflow.models.vae import decoded, load_vae
from instaflow.places import cached_model, is_hub_name, model_fingerprint
from instaflow.progress import Progress
from instaflow.using.metadata import encoded


def draw_sheet(folder: Path, output: Path, *, count: int, model: str | None = None) -> str:
    """Write a contact sheet of `count` pairs, spread evenly over the stage; returns a line that says what was done.

    Images come from the VAE of the model that made the couplings, which may be at another `model` now, else from those
    that the shards keep; where there are neither, none is drawn and the line says what is missing.
    """
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"The folder of '{output}' does not exist", "Make it first")
    encoded(Image.new("RGB", (1, 1)), output)
    manifest = read_manifest(folder)
    missing = missing_model(folder, manifest, model)
    kept = manifest.keep.images if manifest.keep else None
    if missing and not kept:
        return f"No contact sheet: {missing}, and the shards keep no images"
    every = kept.every if missing and kept else 1
    records = spread_evenly(folder, manifest, count, every)
    if not records:
        return "No contact sheet: nothing is there to be seen yet"
    if missing and kept:
        images = [kept_image(record, f"image.{kept.format}") for record in records]
        told = f"images as the shards keep them: {missing}"
    else:
        place = model or place_of_model(folder, manifest)
        images = decoded_images(place, np.concatenate([record.latent for record in records]))
        told = "images by the model's own VAE"
    pairs = [
        Pair(record.indices[0], record.prompts[0], colours(record.noise[0]), image)
        for record, image in zip(records, images, strict=True)
    ]
    sheet = contact_sheet(str(folder), summary(manifest), pairs)
    write_file(output, encoded(sheet, output))
    return f"{output}: {len(pairs)} pair{'s' if len(pairs) > 1 else ''}, {told}"


def summary(manifest: Manifest) -> str:
    sampler = manifest.sampler.get("class", "sampler").removesuffix("Scheduler")
    image, drawn = ("real image", "") if manifest.data else ("image", f", seed {manifest.seed}")
    return (
        f"Noise and {image} of the same index.  {sampler}, {manifest.num_steps} steps, guidance "
        f"{manifest.guidance_scale:g}{drawn}"
    )


def missing_model(folder: Path, manifest: Manifest, model: str | None) -> str | None:
    """Why the model that made the couplings can't be used here, None if it can; nothing is fetched for it."""
    place = model or place_of_model(folder, manifest)
    if not Path(place).exists() and not (is_hub_name(place) and cached_model(place)):
        return f"the model is not at '{place}' (--model says where it is)"
    try:
        same = model_fingerprint(place) == manifest.model_fingerprint
    except DataError as error:
        return f"the model cannot be read: {error.message}"
    return None if same else f"'{place}' is not the model that made the couplings"


def spread_evenly(folder: Path, manifest: Manifest, count: int, every: int) -> list[Shard]:
    """Up to `count` records whose index is a multiple of `every`, each by itself, spread over the shards there are.

    Damaged shards show nothing.
    """
    plan = manifest.plan
    to_make = set(shards_to_make(folder, plan))
    sidecars = {}
    for shard in sorted({*range(plan.num_shards)} - to_make):
        with suppress(BadShard):
            sidecars[shard] = read_sidecar(folder, shard, plan)
    indices = np.concatenate([np.empty(0, np.int64), *(np.array(sidecar.indices) for sidecar in sidecars.values())])
    indices = indices[indices % every == 0]
    chosen = indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)]
    records = []
    for shard in np.unique(chosen // plan.records_per_shard).tolist():
        try:
            opened = read_shard(folder, sidecars[shard])
        except BadShard:
            continue
        rows = [opened.indices.index(index) for index in chosen[chosen // plan.records_per_shard == shard]]
        records += [one_record(opened, row) for row in rows]
    return records


def one_record(records: Shard, row: int) -> Shard:
    """A record by itself; it does not hold the others in memory."""
    part, index = slice(row, row + 1), records.indices[row]
    extras = {name: {index: files[index]} for name, files in records.extras.items() if index in files}
    return Shard(records.noise[part].copy(), records.latent[part].copy(), [records.prompts[row]], [index], extras)


def kept_image(record: Shard, name: str) -> np.ndarray:
    """The image [H, W, 3] uint8 that a record keeps. Raises DataError."""
    try:
        return read_extra(name, record.extras[name][record.indices[0]])
    except (KeyError, ValueError) as error:
        raise DataError(f"Record {record.indices[0]} holds no sound {name}", "instaflow verify tells more") from error


def decoded_images(place: str, latents: np.ndarray) -> list[np.ndarray]:
    """Images [H, W, 3] uint8 of scaled latents [N, C, h, w], decoded one by one by a model's VAE."""
    set_up_cpu()
    vae = load_vae(place, device=device())
    images = []
    with Progress("decode", total=len(latents), unit="images") as progress:
        for latent in latents:
            image = decoded(vae, torch.from_numpy(latent[None].astype(np.float32)))[0]  # [3, H, W]
            images.append(((image.permute(1, 2, 0).cpu().numpy() + 1) * 127.5).round().astype(np.uint8))
            progress.update(len(images))
    return images
