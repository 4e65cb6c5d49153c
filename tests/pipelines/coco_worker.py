"""The `instaflow` command, to which COCO's protocol is of small images; with $MEET it meets others at the cache.

$MEET is a folder and how many commands meet there: each writes half of the real images' features into the cache, and
the rest once all of them have come so far.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cli
from instaflow.evaluation import references
from tests.evaluation.stand_ins import small_coco

write = references.write_file


def in_halves(folder: Path, count: int, content: bytes) -> Iterator[bytes]:
    yield content[:1000]
    (folder / str(os.getpid())).touch()
    while len([*folder.iterdir()]) < count:
        time.sleep(0.01)
    yield content[1000:]


if __name__ == "__main__":
    if meet := os.environ.get("MEET"):
        folder, _, count = meet.rpartition(" ")
        references.write_file = lambda file, content: write(file, in_halves(Path(folder), int(count), content))
    with tempfile.TemporaryDirectory() as made, small_coco(Path(made)):
        cli.main()
