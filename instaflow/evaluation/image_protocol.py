"""The papers' protocols: captions or classes, real images from a folder, Inception's features and CLIP's score."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from instaflow.errors import ConfigError
from instaflow.evaluation.clip import Clip
from instaflow.evaluation.features import Extractor, in_bytes, lanczos
from instaflow.evaluation.references import CENTRE, RealImages, reference_features
from instaflow.prompt_files import is_coco
from instaflow.prompt_sources import Prompts


@dataclass(frozen=True)
class Preset:
    """A published protocol."""

    num_samples: int
    side: int
    """Of the images that are compared, in pixels."""
    classes: int = 0
    """Of a protocol that asks for classes in turn, and not for captions."""
    one_an_image: bool = False
    """Of COCO's captions, the first of each image; else any, drawn by the seed of the captions."""


PRESETS = {
    "coco2017-5k": Preset(5000, 512, one_an_image=True),  # which captions is ours: the papers don't say
    "coco2014-30k": Preset(30000, 256),  # they vary from paper to paper: compare the hash
    "imagenet64-50k": Preset(50000, 64, classes=1000),
}


def captions_of(path: str, preset: Preset, count: int, seed: int) -> list[str]:
    """`count` captions: of COCO's JSON by the preset's rule, of any other file of prompts its first ones.

    Raises ConfigError where there are fewer.
    """
    if is_coco(path):
        found = coco_captions(Path(path), first_of_each=preset.one_an_image)
        found = found if preset.one_an_image else random.Random(seed).sample(found, min(count, len(found)))
    else:
        found = [text for _, text in zip(range(count), Prompts(path), strict=False)]
    if len(found) < count:
        said = f"'{path}' holds {len(found):,} captions, and the protocol wants {count:,}"
        raise ConfigError(said, "Take another file, or fewer samples, which is another protocol")
    return found[:count]


def coco_captions(file: Path, *, first_of_each: bool) -> list[str]:
    """COCO's captions by image and annotation number, without white space at the ends. Raises ConfigError."""
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict) or "annotations" not in content:
            raise ValueError("it has no 'annotations'")
        annotations = content["annotations"]
        rows = [(int(one["image_id"]), int(one["id"]), str(one["caption"])) for one in annotations]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"'{file}' holds no captions of COCO: {error}", "One such is annotations/captions_val2017.json"
        ) from error
    seen: set[int] = set()
    found = []
    for image, _, caption in sorted(rows):
        if not (first_of_each and image in seen):
            found.append(caption.strip())
        seen.add(image)
    return found


class ImageProtocol:
    """Images are compared with a folder of real ones by an extractor, and with their prompts by a CLIP."""

    side = 1
    judged = "prompts"
    kernel_subsets = 100
    reader_accuracy: float | None = None

    def __init__(
        self,
        preset: Preset,
        prompts: Sequence[str],
        real: RealImages,
        extractor: Extractor,
        clip: Clip | None,
        prefix: str = "",
        batch_size: int = 32,
    ) -> None:
        self.preset, self.real, self.extractor, self.clip, self.prefix = preset, real, extractor, clip, prefix
        self.prompts, self.batch_size = list(prompts), batch_size
        self.unseen, self.num_real = np.zeros(len(prompts), bool), len(real)
        self.features_in_words = str(extractor)
        before = f", each caption after {prefix!r}" if prefix else ""
        score = "CLIP score, the mean cosine of image and caption"
        self.reader_in_words = f"{score}: {clip}, {clip.resize}{before}" if clip else ""
        self.reference_in_words = f"{real}; {CENTRE}, to {preset.side}×{preset.side}"
        self.size_in_words = f"to {preset.side}×{preset.side} by Pillow's Lanczos filter"
        self.image_encoding = "8 bits, as PNG keeps them"

    def observe(self, images: Tensor, batch: slice) -> dict[str, np.ndarray]:
        """features [N, 1, D], with a CLIP scores [N], of a batch's images [N, 3, H, W] in [-1, 1]."""
        small = in_bytes(images)
        if small.shape[-1] != self.preset.side:
            small = lanczos(small, self.preset.side)
        found = {"features": self.extractor(small, self.batch_size)[:, None]}
        if self.clip:
            prompts = self.prompts[batch]
            found["scores"] = self.clip.scores(images, prompts, prefix=self.prefix, batch_size=self.batch_size)
        return found

    def figures(self, observed: dict[str, np.ndarray]) -> dict[str, float | None]:
        """A row's figures beside those of its features."""
        return {"clip_score": float(observed["scores"].mean()) if self.clip else None}

    def reference_features(self) -> np.ndarray:
        """Of the real images [N, D]. Raises DataError for one that can't be read."""
        return reference_features(self.real, self.extractor, self.preset.side, self.batch_size)

    def real_image(self, index: int) -> Tensor:
        """[3, H, W], uint8."""
        return self.real.image(index, self.preset.side)

    def told(self, observed: dict[str, np.ndarray], place: int) -> str:
        """What a reader sees in an image: here there is none."""
        return ""

    def round_trip_features(self, model: object) -> np.ndarray | None:
        """Of the real images through a model's autoencoder: not measured here."""
        return None

    def gallery(self, count: int) -> list[int]:
        return list(range(min(count, len(self.prompts))))


def classes_in_turn(preset: Preset, count: int) -> list[str]:
    """The prompts of a class-conditional model: its classes' numbers, in turn."""
    return [str(place % preset.classes) for place in range(count)]
