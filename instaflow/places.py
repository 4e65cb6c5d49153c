"""Where a model lies: a pipeline's folder, a single-file checkpoint with its configuration beside it, or a hub name."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from instaflow.damage import damage_of
from instaflow.errors import DataError, reason_of
from instaflow.files import fingerprint_of, sha256_of
from instaflow.sections import BACKBONES, Perceptual
from instaflow.weights import find

PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
CONFIGURATION = (
    ("unet/config.json",),
    ("vae/config.json",),
    ("text_encoder/config.json",),
    ("tokenizer/tokenizer.json", "tokenizer/vocab.json"),
    ("tokenizer/tokenizer_config.json",),
    ("scheduler/scheduler_config.json",),
)
"""What describes a Stable Diffusion; any one of the files on a line will do. Without them, transformers makes up a
tokenizer or a text encoder and says nothing."""
SECOND_ENCODER = (
    ("text_encoder_2/config.json",),
    ("tokenizer_2/tokenizer.json", "tokenizer_2/vocab.json"),
    ("tokenizer_2/tokenizer_config.json",),
)
WEIGHTS = (("unet/*.safetensors",), ("vae/*.safetensors",), ("text_encoder/*.safetensors",))
PIXELS = "ConsistencyModelPipeline"
"""The stock pipeline that a model of pixels is: of all, it feeds a UNet2DModel as the scheduler says."""
RELEASED = "RectifiedFlowPipeline"
"""The pipeline that InstaFlow's released models name: a Stable Diffusion's parts, the network of another convention."""
PIPELINES = {
    "StableDiffusionPipeline": (CONFIGURATION, WEIGHTS),
    RELEASED: (CONFIGURATION, WEIGHTS),
    "StableDiffusionXLPipeline": (
        (*CONFIGURATION, *SECOND_ENCODER),
        (*WEIGHTS, ("text_encoder_2/*.safetensors",)),
    ),
    PIXELS: ((CONFIGURATION[0], CONFIGURATION[-1]), WEIGHTS[:1]),
}
"""The pipelines that this toolkit reads: their configuration's files and their weights'."""
TO_IMPORT = ("edm-imagenet-64x64-cond-adm", "edm-cifar10-32x32-cond-adm", "edm-cifar10-32x32-uncond-adm")
"""What folders are called that `instaflow import-edm` is to make. They are known before, and are no hub's."""
FOLDERS = "unet, vae, text_encoder, tokenizer, scheduler, and for Stable Diffusion XL text_encoder_2 and tokenizer_2"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
FETCHED = ["model_index.json", *(f"{part}/*.{kind}" for part in PARTS for kind in ("json", "txt", "safetensors"))]


def find_model(place: str) -> Path:
    """The folder or file of a model on this machine; a hub model that is not here is fetched. Raises DataError."""
    path = Path(place)
    if path.is_dir():
        check_folder(path)
        return path
    if path.is_file():
        check_file(path)
        return path
    if is_to_import(place):
        hint = f"Make it of a state dict of EDM's code: instaflow import-edm STATE.safetensors {place}"
        raise DataError(f"There is no model '{place}'", hint)
    if not is_hub_name(place):
        raise DataError(
            f"There is no model '{place}'", "A model is a pipeline's folder, a .safetensors file or a hub name"
        )
    return cached_model(place) or fetched_model(place)


def is_hub_name(place: str) -> bool:
    """Whether `place` has the form owner/name, and no file or folder that is called so."""
    path = Path(place)
    is_file = path.suffix in {".safetensors", *PICKLES} or path.exists()
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", place)) and not (is_file or is_to_import(place))


def is_to_import(place: str) -> bool:
    """Whether `place` is a folder that isn't there yet and is known by its name: `instaflow import-edm` makes it."""
    path = Path(place)
    return path.name in TO_IMPORT and not path.exists()


def model_fingerprint(place: str) -> str:
    """What a model is: the hash of its files, or of a hub model the commit. Raises DataError if it isn't here."""
    path = find_model(place)
    if is_hub_name(place):
        return f"{place}@{path.name}"  # a snapshot's folder is called after its commit
    if path.is_dir():
        return fingerprint_of(path)
    return hashlib.sha256(f"{sha256_of(path)}\n{fingerprint_of(configuration_of(path))}\n".encode()).hexdigest()


# --- folders and files ------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Raises DataError unless `folder` holds a pipeline that this toolkit reads, with all its files."""
    missing = missing_files(folder, *PIPELINES[pipeline_class(folder)])
    if not missing:
        return
    pickled = any(folder.glob("unet/*.bin"))
    raise DataError(
        f"'{folder}' lacks {', '.join(missing)}",
        f"Its .bin files are pickles, which can run code. Their tensors alone: instaflow import-pickle {folder} OUTPUT"
        if pickled
        else "Restore what is missing, or make the model's stage again",
    )


def check_file(file: Path) -> None:
    """Raises DataError unless `file` is a .safetensors checkpoint with its configuration beside it."""
    if file.suffix in PICKLES:
        raise DataError(
            f"'{file}' is a pickle, which can run code as it is loaded; this toolkit reads none",
            f"Take its .safetensors file, or its tensors alone: instaflow import-pickle {file} OUTPUT.safetensors",
        )
    if file.suffix != ".safetensors":
        raise DataError(f"'{file}' is no model", "A model is a pipeline's folder, a .safetensors file or a hub name")
    folder = configuration_of(file)
    if not folder.is_dir():
        raise DataError(
            f"'{file}' holds weights alone; what they are stands in no folder '{folder}'",
            f"Put there the small files of the model that it was made from: hf download OWNER/NAME --local-dir {folder}"
            " --include '*.json' '*.txt'",
        )
    missing = missing_files(folder, PIPELINES[pipeline_class(folder)][0])
    if missing:
        raise DataError(f"'{folder}', the configuration of '{file}', lacks {', '.join(missing)}", "Add what is missing")


def configuration_of(file: Path) -> Path:
    """The folder that says what a single-file checkpoint's weights are: the file's name without its ending."""
    return file.with_suffix("")


def pipeline_class(folder: Path) -> str:
    """The pipeline that a folder's model_index.json names. Raises DataError if it is none that this toolkit reads."""
    index = folder / "model_index.json"
    if not index.is_file():
        inside = [file.parent for file in sorted(folder.glob("model/model_index.json"))]
        inside = inside or [file.parent for file in sorted(folder.glob("*/model/model_index.json"))]
        hint = "A diffusers pipeline folder holds that file"
        if inside:
            hint = f"Did you mean {' or '.join(repr(str(one)) for one in inside)}?"
        raise DataError(f"'{folder}' is no pipeline folder: it has no model_index.json", hint)
    try:
        name: Any = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise DataError(f"'{index}' is damaged: {error}", "Restore the file from where the model came from") from error
    if name not in PIPELINES:
        raise DataError(
            f"'{folder}' holds a {name}; a {' or '.join(name for name in PIPELINES if name != PIXELS)} is needed",
            "Inpainting, refiner and other pipelines are not text-to-image models from noise alone",
        )
    return str(name)


def is_of_pixels(found: Path) -> bool:
    """Whether a model that `find_model` found is one of pixels, without latents and text."""
    return found.is_dir() and pipeline_class(found) == PIXELS


def is_released(folder: Path) -> bool:
    """Whether a pipeline's folder is in InstaFlow's own convention (see `instaflow.models.released`)."""
    return (folder / "model_index.json").is_file() and pipeline_class(folder) == RELEASED


def missing_files(folder: Path, *needed: tuple[tuple[str, ...], ...]) -> list[str]:
    """Those of the `needed` files that are not in `folder`."""
    lines = [line for lines in needed for line in lines]
    return [" or ".join(line) for line in lines if not any(any(folder.glob(name)) for name in line)]


# --- what a perceptual loss needs -------------------------------------------------------------------------------------


def check_network(folder: Path) -> None:
    """Raises DataError unless `folder` has a perceptual network's files."""
    missing = missing_files(folder, (("config.json",), ("model.safetensors",)))
    if missing:
        raise DataError(
            f"'{folder}' is no perceptual network: it lacks {' and '.join(missing)}",
            "Name a teacher stage, or its folder 'perceptual'",
        )
    check_whole(folder / "model.safetensors")


def check_whole(file: Path) -> None:
    """Raises DataError for a file of weights that tells of its own damage."""
    if fault := damage_of(file):
        raise DataError(f"'{file}' is damaged: it {fault}", "Bring or make the folder once more")


def check_perceptual(settings: Perceptual) -> None:
    """Raises DataError unless the weights and the decoder that are named lie there, and are what they should be."""
    if settings.network in BACKBONES and settings.weights is None:
        backbone_file(settings)
    if settings.weights is not None:
        file, name = Path(settings.weights), BACKBONES[settings.network]
        if not file.is_file():
            raise DataError(
                f"There is no file '{file}', the weights of the network '{settings.network}' that LPIPS compares by; "
                "it is never fetched by itself",
                f"Bring {name} (https://download.pytorch.org/models/{name}) here, or leave perceptual.weights out and "
                f"type: instaflow weights lpips-{settings.network} --fetch",
            )
        hashed = re.search(r"-([0-9a-f]{8})\.pth$", file.name)  # torchvision's names say how the SHA-256 begins
        if hashed and not sha256_of(file).startswith(hashed[1]):
            raise DataError(
                f"'{file}' is damaged: its SHA-256 begins with {sha256_of(file)[:8]}, not as its name says",
                "Bring the file once more",
            )
    if settings.decoder is not None:
        folder = Path(settings.decoder)
        missing = missing_files(folder, (("config.json",), ("diffusion_pytorch_model.safetensors",)))
        if missing:
            raise DataError(
                f"The decoder '{folder}' lacks {' and '.join(missing)}",
                "It is the folder of an AutoencoderTiny as diffusers writes it, and never fetched by itself",
            )
        if '"AutoencoderTiny"' not in (folder / "config.json").read_text(encoding="utf-8"):
            raise DataError(
                f"The decoder '{folder}' is no AutoencoderTiny", "Name the folder of one, as diffusers writes it"
            )
        check_whole(folder / "diffusion_pytorch_model.safetensors")


def backbone_file(settings: Perceptual) -> Path:
    """Where the weights of LPIPS' own network lie: as said, else where `instaflow weights` has them.

    Raises DataError where that has none, with the way to them.
    """
    return Path(settings.weights) if settings.weights else find(f"lpips-{settings.network}")


# --- what an evaluation measures in -----------------------------------------------------------------------------------

NETWORKS = {"classifier": "model.safetensors", "autoencoder": "diffusion_pytorch_model.safetensors"}
"""The networks whose folder an evaluation may take features from, each with its file of weights."""


def kind_of_extractor(folder: Path) -> str:
    """Which of `NETWORKS` a folder holds. Raises DataError for any other."""
    said = f"'{folder}' is neither a classifier nor an autoencoder:"
    hint = "Name a teacher stage's folder 'perceptual', or an autoencoder's, such as a pipeline's 'vae'"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config.get("_class_name", "")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{said} it has no config.json that can be read", hint) from error
    kind = "autoencoder" if name == "AutoencoderKL" else "classifier" if "strides" in config else ""
    if not kind:
        told = f"a {name}" if name else "of another network"
        raise DataError(f"{said} its config.json is {told}", hint)
    if missing := missing_files(folder, ((NETWORKS[kind],),)):
        raise DataError(f"The {kind} '{folder}' lacks {missing[0]}", "Restore its files")
    check_whole(folder / NETWORKS[kind])
    return kind


# --- the hub ----------------------------------------------------------------------------------------------------------


def cached_model(name: str) -> Path | None:
    """The snapshot of a hub model in this machine's cache, if all its files are there.

    While it stays there, no network is asked: the model remains the one that a run began with.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=["model_index.json"], local_files_only=True))
        check_folder(folder)
    except (OSError, DataError):
        return None
    return folder


def configured_model(place: str) -> Path | None:
    """The folder that says what a model is made of, with or without its weights; None where it isn't here.

    No network is asked. Raises DataError for a file that is no model.
    """
    from huggingface_hub import snapshot_download

    path = Path(place)
    if path.is_file():
        check_file(path)
        return configuration_of(path)
    if path.is_dir() or not is_hub_name(place):
        return path if path.is_dir() else None
    try:
        folder = Path(snapshot_download(place, allow_patterns=["*/*.json"], local_files_only=True))
    except OSError:
        return None
    return None if missing_files(folder, (("model_index.json",), *CONFIGURATION)) else folder


def fetched_model(name: str) -> Path:
    """The snapshot of a hub model, downloaded into the cache. Raises DataError."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=FETCHED, ignore_patterns=["*.fp16*", "*.non_ema*"]))
        if not any(folder.glob("unet/*.safetensors")):  # some models come in half precision alone
            folder = Path(snapshot_download(name, allow_patterns=FETCHED, ignore_patterns=["*.non_ema*"]))
    except Exception as error:  # each layer of the client raises its own kinds
        reason, folder = reason_of(error), Path(name.partition("/")[2])
        raise DataError(
            f"The hub model '{name}' is not on this machine, and it cannot be fetched: {reason}",
            "If a folder is meant, there is none of that name. "
            f"Where there is network: hf download {name} --local-dir {folder}. Bring model_index.json and the folders "
            f"{FOLDERS} (json, txt and safetensors files) here, and write {folder} in place of the name",
        ) from error
    try:
        check_folder(folder)
    except DataError as error:
        raise DataError(f"The hub model '{name}' cannot be used: {error.message}", error.hint) from error
    return folder


def short_names(places: Sequence[str]) -> list[str]:
    """What models are called: the stage of runs/digits/student/model, else the last part; no two of them the same."""
    names: list[str] = []
    for place in places:
        path = PurePath(place.rstrip("/"))
        stage = path.parent.name if path.name in ("model", "model-raw") else ""
        first = name = stage + path.name.removeprefix("model") if stage else path.name.removesuffix(".safetensors")
        count = 2
        while name in names:
            name, count = f"{first}-{count}", count + 1
        names.append(name)
    return names
