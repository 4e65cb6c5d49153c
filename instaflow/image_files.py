"""Real images with captions, in img2dataset's layout: samples of webdataset shards, or files in a folder.

Images are found by one pass that reads captions alone, and then read one by one, wherever fsspec reaches.
"""

import hashlib
import io
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from instaflow.errors import ConfigError, DataError, reason_of
from instaflow.prompt_files import IMAGES, row_of, samples_of, suffix_of
from instaflow.prompt_sources import check_text, files_of, name_of, opened
from instaflow.sections import DIGITS
from instaflow.stores import reach

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


MAY_BE = (
    'Name "digits", .tar files in img2dataset\'s layout, or a folder of images with .txt or .json beside; a relative '
    "path starts at the experiment file"
)


@dataclass(frozen=True)
class ImageFile:
    """Where one image lies, and its caption."""

    system: Any  # fsspec's
    path: str  # of the image, or of the tar that holds it
    start: int  # its first byte there
    size: int  # bytes
    caption: str


class ImageFiles:
    """The images of a place in their order: shards by name, samples as they stand; in a folder by path.

    Each iteration looks anew. Left out is what has no image (of whose download img2dataset kept the text), or whose
    caption is blank or null. After an iteration `total` counts the samples, `dropped` those left out, by the reason.
    Iterating raises ConfigError where the place can't be read, or a sample has no caption at all.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.total = 0
        self.dropped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[ImageFile]:
        self.total, self.dropped = 0, Counter()
        for system, path, key, texts, image in self._samples():
            self.total += 1
            name = name_of(system, path)
            if image is None:
                self.dropped["without an image"] += 1
                continue
            caption = row_of(key, texts, name, None, None)[1]
            if caption is not None:
                check_text(caption, name, key)
            if caption is None or not caption.strip():
                self.dropped["without words" if caption is not None else "with a null caption"] += 1
                continue
            yield ImageFile(system, path, *image, caption)

    def __str__(self) -> str:
        """How many were taken, and why the others were not."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        return f"{self.total - self.dropped.total():,} of {self.total:,} images taken; left out: {reasons or 'none'}"

    def _samples(self) -> Iterator[tuple[Any, str, str, dict[str, bytes], tuple[int, int] | None]]:
        """File system, file and key of each sample, its .txt and .json, and first byte and size of its image."""
        system, folder = folder_of_images(self.place)
        if system is None:
            for system, path in files_of(self.place):
                name = name_of(system, path)
                if suffix_of(path) != ".tar":
                    what = "holds no images with captions" if system.exists(path) else "does not exist"
                    raise ConfigError(f"'{name}', given as data, {what}", MAY_BE)
                with opened(system, path) as file:
                    for key, texts, image in samples_of(file, name):
                        yield system, path, key, texts, image
            return
        found = system.find(folder, detail=True)
        for path in sorted(found):
            if suffix_of(path) in IMAGES:
                stem = path.removesuffix(path[path.rindex(".") :])
                beside = {ending: f"{stem}.{ending}" for ending in ("txt", "json")}
                texts = {ending: system.cat_file(text) for ending, text in beside.items() if text in found}
                yield system, path, stem.rpartition("/")[2], texts, (0, found[path]["size"])


def folder_of_images(place: str) -> tuple[Any, str]:
    """The fsspec file system and path of a folder that holds no shards; (None, "") where the place is none."""
    from fsspec.implementations.local import LocalFileSystem

    try:
        system, path = reach(place) if "://" in place else (LocalFileSystem(), place)
        is_folder = system.isdir(path) and not system.glob(f"{path.rstrip('/')}/*.tar")
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"'{place}' cannot be reached: {reason_of(error)}", "Check the network, and what is there"
        ) from (error)
    return (system, path) if is_folder else (None, "")


def images_hash(place: str) -> str:
    """What tells these images from others: "digits", or the hash of all captions and sizes in bytes, in their order.

    The images themselves are not read for it. Raises ConfigError if the place can't be read.
    """
    if place == DIGITS:
        return DIGITS
    digest = hashlib.sha256()
    for image in ImageFiles(place):
        digest.update(f"{json.dumps([image.caption, image.size])}\n".encode())
    return digest.hexdigest()


def images_exist(place: str) -> bool:
    """Whether there is something to read."""
    if place == DIGITS:
        return True
    try:
        return folder_of_images(place)[0] is not None or any(system.exists(path) for system, path in files_of(place))
    except (ConfigError, OSError):
        return False


class ImageReader:
    """Reads the first `count` images of a place by their index; memory holds 24 bytes and no caption of each."""

    def __init__(self, place: str, count: int) -> None:
        self._files: list[tuple[Any, str]] = []
        numbers: dict[str, int] = {}
        self._spans = array("q")
        for image in islice(ImageFiles(place), count):
            if image.path not in numbers:
                numbers[image.path] = len(self._files)
                self._files.append((image.system, image.path))
            self._spans.extend([numbers[image.path], image.start, image.size])

    def read(self, index: int) -> bytes:
        """The file that an image is. Raises DataError where its place can't be read any more."""
        number, start, size = self._spans[3 * index : 3 * index + 3]
        system, path = self._files[number]
        try:
            content: bytes = system.cat_file(path, start=start, end=start + size)
        except Exception as error:  # each client raises its own kinds
            hint = "Check the network, and that it is still there; the same command goes on: what is finished is kept"
            raise DataError(f'"{name_of(system, path)}" could not be read: {reason_of(error)}', hint) from error
        return content


def colours_of(image: "Image.Image") -> "Image.Image":
    """RGB of any mode: 16 bits a value are scaled to 8, and what is transparent is white."""
    from PIL import Image

    if image.mode.startswith("I"):  # Pillow clips at 255 where it converts them
        image = image.point(lambda value: value / 257).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return image.convert("RGB")


def pixels_of(content: bytes, size: tuple[int, int]) -> "np.ndarray":
    """An image file as uint8 [H, W, 3] of `size`: its middle, as large as fits, scaled by Lanczos' filter.

    Raises ValueError if it can't be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=["JPEG", "PNG", "WEBP"]) as image:
            return fitted_pixels(image, size)
    except UnidentifiedImageError as error:  # it would name the bytes' place in memory
        raise ValueError("it holds an image that cannot be read: it is no JPEG, PNG or WebP") from error
    except (OSError, SyntaxError, ArithmeticError, Image.DecompressionBombError) as error:  # each reader has its own
        raise ValueError(f"it holds an image that cannot be read: {error}") from error


def fitted_pixels(image: "Image.Image", size: tuple[int, int]) -> "np.ndarray":
    """An image, turned as it was held, as uint8 [H, W, 3] of `size`: its middle, as large as fits."""
    import numpy as np
    from PIL import Image, ImageOps

    upright = image
    with suppress(Exception):  # a damaged note on how it was held: the image is as it lies
        upright = ImageOps.exif_transpose(image)
    height, width = size
    return np.asarray(ImageOps.fit(colours_of(upright), (width, height), Image.Resampling.LANCZOS))
