"""The files of weights that metrics and losses measure by: which, from where, and where on this machine they lie.

Nothing here asks a network but `fetch`, which is only ever called for.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from textwrap import wrap
from typing import Any

from instaflow import __version__
from instaflow.damage import damage_of
from instaflow.errors import ConfigError, DataError
from instaflow.files import remove_leftovers, sha256_of, write_file, write_json
from instaflow.sections import BACKBONES

VARIABLE = "INSTAFLOW_WEIGHTS"
HUB = "https://huggingface.co"
TORCHVISION = "https://download.pytorch.org/models"
PART = 2**20  # bytes that are read at a time
TEXT = 69  # signs of a line, beside the word that it begins with
NOTHING_KEPT = "Nothing was kept. Fetch it again; if it stays so, a proxy or the source has changed it"


@dataclass(frozen=True)
class Weights:
    """One file, as it is given out."""

    name: str
    file: str
    """Its name in the folder of weights."""
    url: str
    megabytes: int
    """About, in 10^6 bytes: of the network's parameters in float32, or as torchvision tells it."""
    use: str
    sha256: str = ""
    """Its beginning, where the source publishes it (in the file's name, by torch.hub's rule); else empty."""
    hub: tuple[str, ...] = ()
    """The model on the Hugging Face hub, and there the files that will do."""
    aliases: tuple[str, ...] = ()
    """Other names of the same file in torch.hub's cache."""


WEIGHTS = {
    weights.name: weights
    for weights in (
        Weights(
            "inception",
            "weights-inception-2015-12-05-6726825d.pth",
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
            96,
            "InceptionV3 of FID, KID, precision and recall, whichever resize (clean-fid's network is the same)",
            sha256="6726825d",
            aliases=("pt_inception-2015-12-05-6726825d.pth",),  # pytorch-fid's
        ),
        Weights(
            "clip-vit-g-14",
            "CLIP-ViT-g-14-laion2B-s12B-b42K.bin",
            f"{HUB}/laion/CLIP-ViT-g-14-laion2B-s12B-b42K/resolve/main/open_clip_pytorch_model.bin",
            5467,
            "CLIP score of the papers (OpenCLIP ViT-g-14, laion2b_s12b_b42k)",
            hub=("laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
        ),
        Weights(
            "clip-vit-l-14",
            "CLIP-ViT-L-14-openai.safetensors",
            f"{HUB}/timm/vit_large_patch14_clip_224.openai/resolve/main/open_clip_model.safetensors",
            1710,
            "CLIP score by OpenAI's ViT-L-14",
            hub=("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors"),
        ),
        Weights(
            "lpips-alex",
            BACKBONES["alex"],
            f"{TORCHVISION}/{BACKBONES['alex']}",
            244,
            "LPIPS on AlexNet (perceptual.network alex); its heads come with the package lpips",
            sha256="7be5be79",
        ),
        Weights(
            "lpips-vgg",
            BACKBONES["vgg"],
            f"{TORCHVISION}/{BACKBONES['vgg']}",
            553,
            "LPIPS on VGG16 (perceptual.network vgg); its heads come with the package lpips",
            sha256="397923af",
        ),
    )
}


@dataclass(frozen=True)
class Found:
    """How a file of weights stands on this machine."""

    weights: Weights
    path: Path | None
    sha256: str = ""
    """Of the whole file; empty where there is none."""
    fault: str = ""
    """Why it is not the one that is meant, in words that follow "it"."""

    @property
    def state(self) -> str:
        """ "present", "missing" or "wrong"."""
        if self.path is None:
            return "missing"
        return "wrong" if self.fault else "present"


# --- where files lie --------------------------------------------------------------------------------------------------


def folder() -> Path:
    """The folder of weights: $INSTAFLOW_WEIGHTS, or `instaflow/weights` in the user's cache."""
    return Path(os.environ.get(VARIABLE) or cache() / "instaflow" / "weights").expanduser()


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def torch_checkpoints() -> Path:
    """Where torch.hub keeps what it downloads; without importing torch."""
    return Path(os.environ.get("TORCH_HOME") or cache() / "torch").expanduser() / "hub" / "checkpoints"


def places(weights: Weights) -> Iterator[Path]:
    """Where the file may lie, our folder first, then the libraries' own caches; no network is asked."""
    yield folder() / weights.file
    if not weights.hub:
        yield from (torch_checkpoints() / name for name in (weights.file, *weights.aliases))
        return
    from huggingface_hub import try_to_load_from_cache

    model, *files = weights.hub
    for file in files:
        kept = try_to_load_from_cache(model, file)
        if isinstance(kept, str):
            yield Path(kept)


def look_for(weights: Weights) -> Found:
    """How these weights stand here: by their published hash, or without one by what the file tells of its length."""
    path = next((path for path in places(weights) if path.is_file()), None)
    if path is None:
        return Found(weights, None)
    rule, sha256 = published(weights, path), hash_of(path)
    if rule and sha256.startswith(rule):
        return Found(weights, path, sha256)
    other = f"has a SHA-256 that begins with {sha256[:8]}, not {rule[:8]}" if rule else ""
    return Found(weights, path, sha256, damage_of(path) or other)


def find(name: str) -> Path:
    """The file of these weights, checked as `look_for` does. Raises DataError, with the way to it."""
    found = look_for(WEIGHTS[name])
    if found.state == "present" and found.path:
        return found.path
    weights, target = found.weights, folder() / found.weights.file
    way = (
        f"Where there is network: instaflow weights {name} --fetch. Else bring {weights.url} (about "
        f"{weights.megabytes:,} MB) here as '{target}'"
    )
    if found.path is None:
        raise DataError(f"The weights '{weights.file}' are not on this machine: {weights.use}", way)
    raise DataError(f"'{found.path}' is damaged or another file: it {found.fault}", way)


# --- hashes -----------------------------------------------------------------------------------------------------------


def published(weights: Weights, path: Path) -> str:
    """How the file's SHA-256 must begin; empty where its source says nothing.

    The hub's cache calls a large file after the hash that the hub tells of it.
    """
    blob = path.resolve().name
    return weights.sha256 or (blob if re.fullmatch("[0-9a-f]{64}", blob) else "")


def hash_of(path: Path) -> str:
    """Hex SHA-256 of a file, remembered in the folder of weights for as long as its size and time stay the same."""
    memory = folder() / ".hashes.json"
    status = path.stat()
    state = [status.st_size, status.st_mtime_ns]
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    match known.get(key := str(path.absolute())):
        case [size, at, str(digest)] if [size, at] == state:
            return digest
    digest = sha256_of(path)
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, known | {key: [*state, digest]})
    except OSError:  # a folder that only others may write to
        pass
    return digest


# --- for those who ask ------------------------------------------------------------------------------------------------


def named(names: Iterable[str]) -> list[Weights]:
    """The files of these names, all without one. Raises ConfigError."""
    for name in names:
        if name not in WEIGHTS:
            close = difflib.get_close_matches(name, WEIGHTS, n=1)
            hint = f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(WEIGHTS)}"
            raise ConfigError(f"There are no weights called '{name}'", hint)
    return [WEIGHTS[name] for name in names] or [*WEIGHTS.values()]


def told(found: Found) -> str:
    """What a person wants to know of one file, in lines of 80 signs, but for places and addresses, which stay whole."""
    weights, path = found.weights, found.path
    rule = published(weights, path) if path else weights.sha256
    parts = {"for": wrap(weights.use, TEXT), "file" if path else "goes to": [str(path or folder() / weights.file)]}
    if not path:
        parts["to do"] = [f"instaflow weights {weights.name} --fetch, or bring it there"]
    elif found.fault:
        parts["fault"] = wrap(f"it {found.fault}", TEXT)
        parts["to do"] = [f"instaflow weights {weights.name} --fetch, or bring it here again"]
    elif not rule and not 0.8 <= (size := path.stat().st_size) / 1e6 / weights.megabytes <= 1.25:
        parts["but"] = wrap(f"it has {size:,} bytes, not about {weights.megabytes:,} MB: is it another file?", TEXT)
    parts["from"] = [weights.url]
    known = f"SHA-256 begins with {rule[:8]}" if rule else "no hash published"
    parts["size"] = [f"about {weights.megabytes:,} MB; {known}"]
    lines = [f"{weights.name}: {found.state}"]
    for label, own in parts.items():
        lines += [f"  {label:<9}{own[0]}", *(f"{'':11}{line}" for line in own[1:])]
    return "\n".join(lines)


def entry(found: Found) -> dict[str, Any]:
    """The same for scripts."""
    weights = found.weights
    return {
        "name": weights.name,
        "state": found.state,
        "path": str(found.path) if found.path else None,
        "target": str(folder() / weights.file),
        "use": weights.use,
        "url": weights.url,
        "megabytes": weights.megabytes,
        "sha256_published": published(weights, found.path) if found.path else weights.sha256,
        "sha256": found.sha256 or None,
    }


def fetch(weights: Weights, update: Callable[[int], None] = lambda received: None) -> Path:
    """Download the file into the folder of weights, whole and as `look_for` wants it, or not at all. Raises DataError.

    update: is told how many megabytes are here.
    """
    target = folder() / weights.file
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    write_file(target, received(weights, update))
    if not weights.sha256 and (fault := damage_of(target)):
        target.unlink()
        raise DataError(f"What '{weights.url}' gives is not these weights: it {fault}", NOTHING_KEPT)
    return target


def received(weights: Weights, update: Callable[[int], None]) -> Iterator[bytes]:
    """The file's bytes as they come; raises DataError where they end early or are not the published ones."""
    from urllib.request import Request, urlopen

    digest, count, total = hashlib.sha256(), 0, None
    try:
        with urlopen(Request(weights.url, headers={"User-Agent": f"instaflow/{__version__}"}), timeout=60) as response:
            total = response.headers.get("Content-Length")
            while part := response.read(PART):
                digest.update(part)
                count += len(part)
                yield part
                update(count // 10**6)
    except (OSError, HTTPException) as error:
        raise DataError(
            f"'{weights.url}' cannot be fetched: {error}",
            f"Bring it from a machine with network, as '{folder() / weights.file}'",
        ) from error
    if total is not None and count != int(total):
        raise DataError(f"'{weights.url}' ended after {count:,} of {int(total):,} bytes", "Fetch it again")
    if not digest.hexdigest().startswith(weights.sha256):
        raise DataError(
            f"What '{weights.url}' gives has a SHA-256 that begins with {digest.hexdigest()[:8]}, not {weights.sha256}",
            NOTHING_KEPT,
        )
