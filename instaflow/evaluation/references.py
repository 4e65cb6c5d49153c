"""Features of real images, computed once for a folder of them and an extractor, and kept with a hash of both."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import Tensor

from instaflow.errors import ConfigError, DataError
from instaflow.evaluation.features import Extractor
from instaflow.evaluation.observations import Observations
from instaflow.evaluation.presets import images_in
from instaflow.files import opened, remove_leftovers, sealed, write_file
from instaflow.image_files import pixels_of
from instaflow.progress import Progress
from instaflow.prompt_files import IMAGES
from instaflow.weights import cache
from instaflow.world import as_the_leader_sees, barrier, gather, world

logger = logging.getLogger(__name__)

CENTRE = "the middle square, by Pillow's Lanczos filter"


@dataclass(frozen=True)
class RealImages:
    """The images of a folder, in the order of their paths: its subfolders' too."""

    folder: Path
    files: tuple[Path, ...]
    content: str
    """SHA-256 of every file's name and bytes, in that order."""
    seen: tuple[tuple[int, int], ...]
    """Every file's size and time before it was hashed."""
    stamp: str
    """A hash of these as the leading process saw them."""

    @classmethod
    def of(cls, folder: Path, told: Callable[[int], None] = lambda done: None) -> "RealImages":
        """All processes of a launch ask together: one hashes for all. told: how many were hashed so far.

        Raises ConfigError where there is no image, or where not all processes see the same files.
        """
        files = images_in(folder)
        seen = stats_of(files)
        listed = "".join(
            f"{file.relative_to(folder).as_posix()}\0{size}\n" for file, (size, _) in zip(files, seen, strict=True)
        )
        if len({*gather(hashlib.sha256(listed.encode(errors="surrogateescape")).digest())}) > 1:
            raise ConfigError(
                f"'{folder}', given as real images, holds other files for one process than for another",
                "Name a folder that all machines share, or one that is the same on each",
            )
        if not folder.is_dir():
            raise ConfigError(f"'{folder}', given as real images, is no folder", "Name a folder of images")
        if not files:
            endings = ", ".join(IMAGES)
            raise ConfigError(f"'{folder}', given as real images, holds none", f"Images end in {endings}")
        digest = hashlib.sha256()
        for done, file in enumerate(files if world().leads else (), start=1):
            digest.update(f"{file.relative_to(folder).as_posix()}\0".encode(errors="surrogateescape"))
            digest.update(hashlib.sha256(file.read_bytes()).digest())
            told(done)
        stamp = hashlib.sha256(repr(seen).encode()).hexdigest()[:8]
        content, stamp = gather((digest.hexdigest(), stamp))[0]
        return cls(folder, tuple(files), content, seen, stamp)

    def __len__(self) -> int:
        return len(self.files)

    def check_unchanged(self) -> None:
        """Raises DataError where a file was written since it was hashed: what was read may be another image."""
        if images_in(self.folder) != [*self.files] or stats_of(self.files) != self.seen:
            said = f"The images in '{self.folder}' changed while their features were extracted"
            raise DataError(said, "Run the command again once nobody writes there")

    def __str__(self) -> str:
        return f"{len(self):,} images, SHA-256 {self.content[:16]}"

    def image(self, index: int, side: int) -> Tensor:
        """[3, side, side], uint8: the middle square, by Lanczos' filter. Raises DataError where it can't be read."""
        file = self.files[index]
        try:
            return torch.tensor(pixels_of(file.read_bytes(), (side, side))).permute(2, 0, 1)
        except (OSError, ValueError) as error:
            raise DataError(f"'{file}' is no image that can be read: {error}", "Restore it, or take it away") from error

    def batch(self, places: slice, side: int) -> Tensor:
        """[B, 3, side, side], uint8."""
        return torch.stack([self.image(index, side) for index in range(places.start, places.stop)])


def stats_of(files: Iterable[Path]) -> tuple[tuple[int, int], ...]:
    """Size and time of each."""
    stats = [file.stat() for file in files]
    return tuple((one.st_size, one.st_mtime_ns) for one in stats)


def reference_features(
    real: RealImages,
    extractor: Extractor,
    side: int,
    batch_size: int,
    folder: Path,
    leave: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Features [N, D] of the images, each brought to side × side: in the leading process, and none in the others.

    All processes of a launch ask together. The features lie in `instaflow/references` of the user's cache folder, in a
    file that is called after what they come from: the images, the extractor with its weights and resize, and the size.
    Where there is none, each process extracts its share into `folder`, which all of them see, by the batch: a stopped
    one goes on there. Where the cache cannot be written to they stay there, and that is told.

    leave: raises before a batch where the work shall end. Raises DataError for an image that can't be read, and where
    the images changed since they were hashed.
    """
    what = f"{real.content} {extractor} {side} {CENTRE}"
    name = hashlib.sha256(what.encode()).hexdigest()[:24]
    file = cache() / "instaflow" / "references" / f"{name}.features"
    leads, none = world().leads, np.empty((0, 0), np.float32)
    cached = features_in(file) if leads else None
    if as_the_leader_sees(cached is not None):
        return none if cached is None else cached

    # Not those of files that were written since, though they be the same again: what was read between is unknown.
    kept = Observations(folder / f"{name}-{real.stamp}-real", len(real), batch_size)
    if leads:
        kept.begin({"of": what})
    barrier()
    place = world()
    missing = kept.missing(place.rank, place.size)
    left = sum(batch.stop - batch.start for batch in missing)
    with Progress("real images", total=left, unit="images", quiet=not leads) as progress:
        for batch in missing:
            leave()
            kept.write(batch, {"features": extractor(real.batch(batch, side))})
            progress.update(progress.done + batch.stop - batch.start)
    barrier()
    if not leads:
        return none
    try:
        real.check_unchanged()
    except DataError:
        shutil.rmtree(kept.folder, ignore_errors=True)
        raise
    features = kept.joined()["features"]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(file)
        write_file(file, sealed(save({"features": features}, {"of": what})))
    except OSError as error:
        logger.warning(
            "'%s' cannot be written: %s. The features of the real images stay in '%s', for this report alone; with "
            "$XDG_CACHE_HOME set to a folder of yours later ones find them",
            file,
            error.strerror,
            kept.folder,
        )
    else:
        for left in folder.glob(f"{name}-*-real"):
            shutil.rmtree(left, ignore_errors=True)
    return features


def features_in(file: Path) -> np.ndarray | None:
    """What the cache's file holds; None where it is not there, or is damaged."""
    try:
        content = opened(file.read_bytes())
    except OSError:
        return None
    found: np.ndarray | None = load(content)["features"] if content else None
    return found
