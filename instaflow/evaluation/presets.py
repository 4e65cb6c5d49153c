"""The papers' protocols as they were published: how many images, of which captions or classes, beside which real ones.

It needs no torch, so that a dry run may look.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from instaflow.errors import ConfigError
from instaflow.prompt_files import IMAGES, is_coco
from instaflow.prompt_sources import Prompts, check_text

UNLIKE = "not to be compared with published figures"
FEWEST = 4
"""Real images: each has its third neighbour among the others."""


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
    real: str = ""
    """What the real images are called; empty where the protocol names none."""
    num_real: int = 0

    def told_of(self, count: int) -> str:
        """What is to be said of so many real images: nothing where they are the protocol's."""
        if not self.num_real or count == self.num_real:
            return ""
        return f"not the {self.num_real:,} of {self.real}: {UNLIKE}"

    def told_of_samples(self, count: int) -> str:
        """What is to be said of so many samples: nothing where they are the protocol's."""
        return "" if count == self.num_samples else f"not the protocol's {self.num_samples:,}: {UNLIKE}"


PRESETS = {
    # Which captions is ours: the papers don't say.
    "coco2017-5k": Preset(5000, 512, one_an_image=True, real="val2017", num_real=5000),
    # They vary from paper to paper: compare the hash.
    "coco2014-30k": Preset(30000, 256, real="val2014", num_real=40504),
    "imagenet64-50k": Preset(50000, 64, classes=1000),
}


# --- captions and classes ---------------------------------------------------------------------------------------------


def captions_of(path: str, preset: Preset, count: int, seed: int) -> tuple[list[str], str]:
    """`count` captions: of COCO's JSON by the preset's rule, of any other file of prompts its first ones.

    Beside them, in words, what of the file was left out; empty where nothing was. Raises ConfigError where there are
    fewer, or one is no text.
    """
    dropped: Counter[str]
    if is_coco(path):
        found, dropped = coco_captions(Path(path), first_of_each=preset.one_an_image)
        found = found if preset.one_an_image else random.Random(seed).sample(found, min(count, len(found)))
    else:
        prompts = Prompts(path)
        found = [text for _, text in zip(range(count), prompts, strict=False)]
        dropped = prompts.dropped
    if len(found) < count:
        said = f"'{path}' holds {len(found):,} captions, and {count:,} are asked for"
        raise ConfigError(said, "Take another file, or fewer samples (num_samples), which is another protocol")
    left_out = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items())
    return found[:count], f"of the captions in '{path}' are left out: {left_out}" if left_out else ""


def coco_captions(file: Path, *, first_of_each: bool) -> tuple[list[str], Counter[str]]:
    """COCO's captions by image and annotation number, without white space at the ends; and how many say nothing.

    Raises ConfigError.
    """
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict) or "annotations" not in content:
            raise ValueError("it has no 'annotations'")
        annotations = content["annotations"]
        rows = [
            (int(one["image_id"]), int(one["id"]), place, one["caption"]) for place, one in enumerate(annotations, 1)
        ]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        told = f"one has no {error}" if isinstance(error, KeyError) else error
        raise ConfigError(
            f"'{file}' holds no captions of COCO: {told}", "One such is annotations/captions_val2017.json"
        ) from error
    seen: set[int] = set()
    found = []
    dropped: Counter[str] = Counter()
    for image, _, place, caption in sorted(rows, key=lambda row: row[:3]):
        if caption is None:
            dropped["null"] += 1
            continue
        check_text(caption, str(file), place)
        if not caption.strip():
            dropped["blank"] += 1
            continue
        if not (first_of_each and image in seen):
            found.append(caption.strip())
        seen.add(image)
    return found, dropped


def classes_in_turn(preset: Preset, count: int) -> list[str]:
    """The prompts of a class-conditional model: its classes' numbers, in turn."""
    return [str(place % preset.classes) for place in range(count)]


# --- real images ------------------------------------------------------------------------------------------------------


def images_in(folder: Path) -> list[Path]:
    """The images of a folder and of its subfolders, by their paths."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES and file.is_file())


def look_at_real(folder: Path, preset: Preset) -> str:
    """What is to be said of a folder of real images before work begins. Raises ConfigError where they won't do."""
    if not folder.is_dir():
        raise ConfigError(f"'{folder}', given as real images, is no folder", "Name a folder of images")
    count = len(images_in(folder))
    if count < FEWEST:
        raise ConfigError(
            f"'{folder}' holds {count} images; precision and recall want at least {FEWEST}",
            f"Name the folder of all real images; they end in {', '.join(IMAGES)}",
        )
    told = preset.told_of(count)
    return told and f"'{folder}' holds {count:,} real images, {told}"
