"""Any number of images in a folder, one by one or in shards: what is there already is not drawn again.

The files of image 12 are `000000012.png`, which tells how it was made, and `000000012.txt`, its prompt: img2dataset's
layout, which a couple stage's `data` reads. With shards they are the members of `00000.tar`, in order: a webdataset.
`sample.json` tells what the folder is of.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from instaflow.errors import ConfigError, Interrupted
from instaflow.files import json_text, remove_leftovers, write_file, write_new
from instaflow.interruption import Stop
from instaflow.using.metadata import About, Drawn
from instaflow.world import ALONE, Worker

IDENTITY = "sample.json"
Draw = Callable[[Sequence[int]], list[Image.Image]]
"""The images of these indices."""
Known = Callable[[int], Drawn]
"""Prompt and seed of an index."""


@dataclass(frozen=True)
class ImageFolder:
    """A folder that is to hold `count` images, loose or `per_shard` in a tar."""

    folder: Path
    count: int
    per_shard: int | None
    worker: Worker = ALONE
    """Of several that fill the folder, each has a fixed share of its images or shards."""

    def begin(self, identity: dict[str, Any]) -> None:
        """Note what the folder is of. Raises ConfigError where it was begun as something else."""
        file = self.folder / IDENTITY
        self.folder.mkdir(exist_ok=True)
        identity = {**identity, "count": self.count, "per_shard": self.per_shard}
        hint = f"Give the same options to go on, or another folder; or delete '{self.folder}' to begin anew"
        others = any(not one.name.startswith(".") for one in self.folder.iterdir())
        if not file.exists() and others:
            raise ConfigError(f"'{self.folder}' holds other files", "Give an empty folder, or one that is not there")
        if write_new(file, json_text(identity)):  # another worker may just have
            return
        try:
            begun = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"'{file}' is damaged: {error}", hint) from error
        for key, now in identity.items():
            if not isinstance(begun, dict) or begun.get(key) != now:
                before = begun.get(key) if isinstance(begun, dict) else begun
                raise ConfigError(f"'{self.folder}' was begun with {key} {before!r}, and now it is {now!r}", hint)

    def share(self) -> range:
        """The images or shards that are this worker's, by their number."""
        units = self.count if self.per_shard is None else -(-self.count // self.per_shard)
        return range(self.worker.index, units, self.worker.count)

    def missing(self) -> list[int]:
        """Those of its share that are not there."""
        held = {one.name for one in self.folder.iterdir()}
        return [unit for unit in self.share() if self._name(unit) not in held]

    def images(self, units: Iterable[int]) -> int:
        """How many images these hold."""
        return sum(len(self.indices(unit)) for unit in units)

    def indices(self, shard: int) -> range:
        first = shard * (self.per_shard or 1)
        return range(first, min(first + (self.per_shard or 1), self.count))

    def _name(self, unit: int) -> str:
        return f"{unit:09d}.png" if self.per_shard is None else f"{unit:05d}.tar"

    def fill(
        self, draw: Draw, known: Known, about: About, *, batch_size: int, stop: Stop, report: Callable[[int], None]
    ) -> None:
        """Draw what is missing of its share; each file is whole or absent. `report` hears how many images are done.

        Raises Interrupted where it was told to stop.
        """
        missing = self.missing()
        remove_leftovers(self.folder / "*")
        total = self.images(self.share())
        done = total - self.images(missing)
        with ThreadPoolExecutor() as encoders:

            def files(indices: Sequence[int]) -> Iterator[tuple[int, Drawn, bytes]]:
                """Index, prompt with seed, and PNG of each; a batch is encoded while the next one is drawn."""
                nonlocal done
                waiting: Iterable[tuple[int, Drawn, bytes]] = ()
                for start in range(0, len(indices), batch_size):
                    if stop():
                        raise Interrupted(
                            f"{done:,} of {total:,} images are in '{self.folder}' ({stop.signal})",
                            "The same command goes on",
                        )
                    batch = indices[start : start + batch_size]
                    images = draw(batch)
                    yield from waiting
                    waiting = encoders.map(encode, batch, images)
                yield from waiting

            def encode(index: int, image: Image.Image) -> tuple[int, Drawn, bytes]:
                drawn, content = known(index), io.BytesIO()
                image.save(content, "PNG", pnginfo=about.of(drawn).chunk())
                return index, drawn, content.getvalue()

            if self.per_shard is None:
                for index, drawn, png in files(missing):
                    write_file(self.folder / f"{index:09d}.txt", drawn.prompt)
                    write_file(self.folder / self._name(index), png)
                    done += 1
                    report(done)
            for shard in missing if self.per_shard else ():
                write_file(self.folder / self._name(shard), packed(files(self.indices(shard))))
                done += len(self.indices(shard))
                report(done)


def packed(files: Iterable[tuple[int, Drawn, bytes]]) -> Iterator[bytes]:
    """A tar of these files, piece by piece."""
    for index, drawn, png in files:
        for ending, content in (("png", png), ("txt", drawn.prompt.encode())):
            member = tarfile.TarInfo(f"{index:09d}.{ending}")
            member.size, member.mode, member.uname, member.gname = len(content), 0o444, "instaflow", "instaflow"
            yield member.tobuf(tarfile.USTAR_FORMAT)
            yield content + bytes(-len(content) % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)
