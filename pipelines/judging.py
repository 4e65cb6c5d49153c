"""By what an evaluation judges: the digits' own protocols or one of real images, once every model was looked at."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from instaflow.digits.images import SIZE
from instaflow.digits.networks import PIXELS
from instaflow.digits.protocol import PROTOCOLS, ClassProtocol, DigitsProtocol, UnpromptedProtocol
from instaflow.digits.tokenizer import MAX_LENGTH
from instaflow.errors import InstaFlowError
from instaflow.evaluation.clip import load_clip
from instaflow.evaluation.features import Extractor, autoencoder, classifier, pixels
from instaflow.evaluation.image_protocol import ImageProtocol
from instaflow.evaluation.inception import inception
from instaflow.evaluation.perception import Perception
from instaflow.evaluation.presets import PRESETS, captions_of, classes_in_turn
from instaflow.evaluation.references import RealImages
from instaflow.files import fingerprint_of
from instaflow.models.device import device
from instaflow.models.loading import load_model
from instaflow.models.model import Model
from instaflow.models.pixels import PixelModel
from instaflow.models.text_to_image import TextToImage
from instaflow.models.vae import load_autoencoder
from instaflow.places import backbone_file, kind_of_extractor
from instaflow.progress import Progress
from instaflow.rundir import StageFolder
from instaflow.sections import BACKBONES
from instaflow.training.perceptual import load_lpips, load_network
from instaflow.weights import find, hash_of
from instaflow.world import world

LPIPS = {"alex": "AlexNet", "vgg": "VGG16"}


class Judging(Protocol):
    """What a protocol is to the stage: the digits' own, or that of real images from a folder."""

    side: int
    """Of an image, in the cells that are judged each for itself."""
    judged: str
    prompts: list[str]
    unseen: np.ndarray
    """Which prompts no training stage saw [N], bool."""
    reader_accuracy: float | None
    kernel_subsets: int
    """Of the kernel distance."""
    num_real: int
    """Points that the real images' features are, one for each of their cells."""
    features_in_words: str
    reader_in_words: str
    reference_in_words: str
    size_in_words: str
    image_encoding: str

    def observe(self, images: Tensor, batch: slice) -> dict[str, np.ndarray]:
        """`features` [N, cells, D] and what `figures` needs, of a batch's images [N, 3, H, W] in [-1, 1]."""

    def figures(self, observed: dict[str, np.ndarray]) -> dict[str, Any]:
        """A row's figures beside those of its features."""

    def parts(self, observed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What each image adds to these figures, which are their means [N]."""

    def reference_features(self, folder: Path, leave: Callable[[], None]) -> np.ndarray:
        """Of the real images [N, D], in the leading process; all of a launch ask together, and share the work.

        folder: what is extracted is kept there until all of it is. leave: raises before a batch where the work shall
        end. Raises DataError for an image that can't be read.
        """

    def round_trip_features(self, model: Any) -> np.ndarray | None:
        """Of the real images through a model's autoencoder."""

    def real_image(self, index: int) -> Tensor:
        """[3, H, W]: uint8, or in [-1, 1]."""

    def told(self, observed: dict[str, np.ndarray], place: int) -> str:
        """What is read in an image."""

    def gallery(self, count: int) -> list[int]:
        """The places of prompts to show."""


@dataclass(frozen=True)
class Seen:
    """What a look at a model told."""

    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    guidance_scale: float
    sampler: str
    kind: str
    """"teacher", "flow" or "student", by its folder."""
    weights: str = "ema"
    """"ema" or "raw", by its folder."""


def look_at_models(stage: StageFolder) -> tuple[Judging, list[Seen]]:
    """The protocol, once every model was seen to go with it, and what they are. Raises InstaFlowError."""
    seen: list[Seen] = []
    kinds: list[type[DigitsProtocol]] = []
    for entry in stage.stage.models:
        model = load_model(stage.locate_weights(entry.model, entry.weights), device=torch.device("cpu"))
        if stage.stage.of_images:
            check_images(stage, entry.model, model)
        else:
            kinds.append(of_digits(stage, entry.model, model))
        seen.append(
            Seen(
                latent_shape=model.latent_shape,
                image_size=model.image_size,
                guidance_scale=model.settings.guidance_scale,
                sampler=type(model.scheduler).__name__,
                kind=model.settings.kind,
                weights=model.settings.weights,
            )
        )
        if seen[-1].latent_shape != seen[0].latent_shape:
            raise InstaFlowError(
                f"The models of '{stage.name}' make latents of different shapes: '{stage.stage.models[0].model}' "
                f"{list(seen[0].latent_shape)}, '{entry.model}' {list(seen[-1].latent_shape)}"
            )
    if stage.stage.of_images:
        return of_images(stage), seen
    return kinds[0](stage.stage.count), seen


def of_digits(stage: StageFolder, name: str, model: Model) -> type[DigitsProtocol]:
    """The digits' protocol for a model. Raises InstaFlowError where it can't draw what the protocol judges."""
    protocol, where = stage.stage.protocol, f"'{stage.name}': protocol {stage.stage.protocol} goes with"
    length = MAX_LENGTH[protocol]
    advice = f"Choose the protocol by the teacher's data: {' or '.join(PROTOCOLS)}"
    sides, side = model.latent_shape[1:], SIZE // 4
    pixels = isinstance(model, PixelModel)
    if pixels and protocol != "digits":
        raise InstaFlowError(f"{where} latents, and '{name}' makes pixels", advice)
    wanted = PIXELS if pixels else side
    if sides != (wanted, wanted):
        made = f"{'pixels' if pixels else 'latents'} of {sides[0]}×{sides[1]}"
        allowed = f", or pixels of {PIXELS}×{PIXELS}" if protocol == "digits" else ""
        raise InstaFlowError(f"{where} latents of {side}×{side}{allowed}, and '{name}' makes {made}", advice)
    if isinstance(model, PixelModel):
        return ClassProtocol if model.num_classes else UnpromptedProtocol
    if isinstance(model, TextToImage) and model.tokenizer.model_max_length != length:
        raise InstaFlowError(
            f"{where} prompts of {length} tokens, and '{name}' takes {model.tokenizer.model_max_length}", advice
        )
    return PROTOCOLS[protocol]


def check_images(stage: StageFolder, name: str, model: Model) -> None:
    """Raises InstaFlowError for a model that can't draw what a protocol of real images asks for."""
    preset, where = PRESETS[stage.stage.protocol], f"'{stage.name}': protocol {stage.stage.protocol} goes with"
    classes = model.num_classes if isinstance(model, PixelModel) else 0
    if classes != preset.classes:
        what = f"a model of {preset.classes:,} classes" if preset.classes else "models that take captions"
        told = f"takes {classes:,} classes" if classes else "takes captions"
        raise InstaFlowError(f"{where} {what}, and '{name}' {told}", "Choose the protocol by what the model draws")
    height, width = model.image_size
    if height != width or height < preset.side:
        raise InstaFlowError(
            f"{where} square images of at least {preset.side} pixels, and '{name}' makes {height}×{width}",
            "Enlarging images would be judged as well; choose a protocol of smaller ones",
        )


def of_images(stage: StageFolder) -> ImageProtocol:
    """A protocol of real images, with its weights. Raises ConfigError and DataError for what is missing."""
    settings = stage.stage
    preset = PRESETS[settings.protocol]
    by_class = bool(preset.classes)
    prompts = (
        classes_in_turn(preset, settings.count)
        if by_class
        else captions_of(settings.captions, preset, settings.count, settings.captions_seed)[0]
    )
    clip = None
    if settings.clip and not by_class:
        clip = load_clip(settings.clip, find(settings.clip), device=device())
    extractor = extractor_of(settings.features, settings.features_folder)
    with Progress(f"{stage.name}: real images hashed", total=0, unit="images", quiet=not world().leads) as progress:
        real = RealImages.of(Path(settings.real), progress.update)
    return ImageProtocol(preset, prompts, real, extractor, clip, settings.clip_prefix, settings.batch)


def perception_of(stage: StageFolder) -> Perception | None:
    """By what it is measured how different images look, if the stage asks for it. Raises DataError."""
    settings = stage.stage.perceptual
    if settings is None:
        return None
    if settings.network in BACKBONES:
        weights = backbone_file(settings)
        network, fingerprint = load_lpips(settings.network, weights), hash_of(weights)
        words = f"LPIPS 0.1 on {LPIPS[settings.network]}"
    else:
        folder = stage.locate_network(settings.network)
        network, fingerprint = load_network(folder), fingerprint_of(folder)
        words = "LPIPS' distance over a small classifier's layers, which count alike"
    return Perception(words, fingerprint, network.to(device()), device())


def extractor_of(name: str, folder: str | None) -> Extractor:
    """What distances are measured in: InceptionV3 or pixels by their name, or the network in a folder of one's own.

    Raises DataError for what cannot be loaded.
    """
    if folder is None:
        if name == "pixels":
            return pixels()
        return inception(
            find("inception"), resize="clean-fid" if name == "inception-clean-fid" else "tensorflow", device=device()
        )
    place, fingerprint = Path(folder), fingerprint_of(Path(folder))
    if kind_of_extractor(place) == "autoencoder":
        return autoencoder(load_autoencoder(place, device=device()), fingerprint)
    return classifier(load_network(place), fingerprint, device=device())
