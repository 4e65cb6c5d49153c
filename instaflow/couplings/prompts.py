"""A couple stage's own copy of its prompts, and which one belongs to an index."""

import json
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from instaflow.couplings.manifest import make_anew
from instaflow.errors import DataError
from instaflow.files import remove_leftovers, write_new
from instaflow.prompt_sources import prompts_hash

BLOCK = 1 << 20  # bytes read at a time
PROMPTS = 1 << 12  # prompts written at a time
STRIDE = 16  # prompts read at a time


class KeptPrompts(Sequence[str]):
    """The prompts of a stage's `prompts.json`, read from it: memory holds only where every `STRIDE`-th begins.

    `hash` is their `prompts_hash`. Raises DataError where the file is missing or is not as `save_prompts` wrote it.
    """

    def __init__(self, folder: Path) -> None:
        path, hint = folder / "prompts.json", make_anew(folder)
        try:
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            lengths: list[np.ndarray] = []
            self.hash = prompts_hash(read_lines(path, lengths))
        except OSError as error:
            raise DataError(f'"{path}" cannot be read: {error.strerror}', hint) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f'"{path}" is not a list of prompts, one a line: {error}', hint) from error
        sizes = np.concatenate(lengths)
        self._count, whole = len(sizes), len(sizes) // STRIDE * STRIDE
        strides = sizes[:whole].reshape(-1, STRIDE).sum(axis=1, dtype=np.int64)
        self._starts = np.cumsum(np.concatenate([[2], strides, [sizes[whole:].sum()]]))  # bytes; "[\n" comes first

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        block, row = divmod(range(len(self))[index], STRIDE)
        start, end = self._starts[block], self._starts[block + 1]
        return json.loads(os.pread(self._file, end - start, start).split(b"\n")[row].rstrip(b","))


def read_lines(path: Path, lengths: list[np.ndarray]) -> Iterator[str]:
    """The prompts of a `prompts.json`; `lengths` hears the bytes of each line. Raises ValueError, OSError."""
    with open(path, "rb") as file:
        if file.readline() != b"[\n":
            raise ValueError("it does not begin with a line '['")
        ended = False
        while lines := file.readlines(BLOCK):
            if lines[-1] == b"]\n":
                ended = True
                lines.pop()
            prompts = json.loads(b"[" + b"".join(lines).rstrip(b",\n") + b"]")
            if len(prompts) != len(lines) or not all(isinstance(prompt, str) for prompt in prompts):
                raise ValueError("a line is not one string")
            lengths.append(np.array([len(line) for line in lines], np.int32))
            yield from prompts
        if not ended or not any(map(len, lengths)):
            raise ValueError("it is empty, or has no end")


def save_prompts(folder: Path, prompts: Iterable[str]) -> None:
    """Keep a stage's prompts in its folder: `prompts.json`, a JSON array with one a line, whole or absent.

    Where it is already, it stays: another worker may have it open.
    """
    path = folder / "prompts.json"
    remove_leftovers(path)
    write_new(path, json_lines(prompts))


def json_lines(prompts: Iterable[str]) -> Iterator[bytes]:
    """A JSON array of the prompts, each on a line of its own."""
    stream, before = iter(prompts), "[\n"
    while block := list(islice(stream, PROMPTS)):
        text = json.dumps(block, ensure_ascii=False, separators=(",\n", ""))
        yield f"{before}{text[1:-1]}".encode()
        before = ",\n"
    yield b"\n]\n"


def prompt_of(prompts: Sequence[str], index: int) -> str:
    """The prompt of record `index`: the prompts in order, again and again."""
    return prompts[index % len(prompts)]
