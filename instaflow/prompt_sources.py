"""Where prompts come from: a list, or files anywhere, streamed in their order; which of them are taken, and their hash.

What counts is the prompts in their order: a couple stage's identity holds their hash, and no path.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from instaflow.errors import ConfigError
from instaflow.files import is_utf8
from instaflow.prompt_files import is_text, place_in, rows_of
from instaflow.sections import PromptSource
from instaflow.stores import reach

Source = str | Path | list[str] | PromptSource
BLOCK = 4096  # prompts hashed at a time
REPEATS = 1 << 18  # prompts looked up at a time


class Prompts:
    """The prompts of a source in their order; each iteration reads it anew and keeps none in memory.

    In a list every string counts, the empty one too (it is the prompt of unconditional guidance). In a file blank and
    null prompts are skipped, and those that the source's filters drop. After an iteration `total` counts what was read,
    `dropped` what was left out, by its reason. Iterating raises ConfigError where the source can't be read, a row is
    bad, or nothing is left.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.total = 0
        self.dropped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[str]:
        self.total, self.dropped = 0, Counter()
        if isinstance(self.source, list):
            yield from self._of_list(self.source)
        else:
            choice = choice_of(self.source)
            prompts = self._of_files(choice)
            yield from self._first_of_each(prompts) if choice.deduplicate else prompts
        if self.total == self.dropped.total():
            raise ConfigError(*self._nothing_left())

    def __str__(self) -> str:
        """How many were taken, and why the others were not."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        return f"{self.total - self.dropped.total():,} of {self.total:,} prompts taken; left out: {reasons or 'none'}"

    def _of_list(self, prompts: list[str]) -> Iterator[str]:
        for position, prompt in enumerate(prompts):
            check_text(prompt, f"prompt {position}")
            self.total += 1
            yield prompt

    def _of_files(self, choice: PromptSource) -> Iterator[str]:
        shortest, longest, lowest = choice.min_length, choice.max_length or math.inf, choice.min_score
        short, long = f"shorter than {characters(shortest)}", f"longer than {characters(longest)}"
        low, unscored = f"with {choice.score_column} below {lowest}", f"without {choice.score_column}"
        for name, place, prompt, score in rows_of_files(choice):
            self.total += 1
            if prompt is None:
                self.dropped["null"] += 1
                continue
            check_text(prompt, name, place)
            if not prompt or prompt.isspace():
                self.dropped["blank"] += 1
            elif len(prompt) < shortest:
                self.dropped[short] += 1
            elif len(prompt) > longest:
                self.dropped[long] += 1
            elif lowest is not None and is_missing(score):
                self.dropped[unscored] += 1
            elif lowest is not None and number_of(score, name, place, choice.score_column) < lowest:
                self.dropped[low] += 1
            else:
                yield prompt

    def _first_of_each(self, prompts: Iterator[str]) -> Iterator[str]:
        """Each prompt the first time that it comes.

        Told apart by 64 bits, 8 bytes a prompt in memory: of ten million distinct ones, one is lost with a
        probability of 3e-6.
        """
        seen = np.empty(0, np.uint64)  # in order
        while block := list(islice(prompts, REPEATS)):
            digests = (hashlib.blake2b(prompt.encode(), digest_size=8).digest() for prompt in block)
            keys, rows = np.unique(np.frombuffer(b"".join(digests), np.uint64), return_index=True)
            places = np.searchsorted(seen, keys)
            new = np.ones(len(keys), bool)
            inside = places < len(seen)
            new[inside] = seen[places[inside]] != keys[inside]
            seen = np.insert(seen, places[new], keys[new])
            self.dropped["repeated"] += len(block) - int(new.sum())
            yield from (block[row] for row in np.sort(rows[new]))
        if not self.dropped["repeated"]:
            del self.dropped["repeated"]

    def _nothing_left(self) -> tuple[str, str]:
        if isinstance(self.source, list):
            return "the list of prompts is empty", "Give at least one prompt, or the path of a text file"
        path = choice_of(self.source).path
        if not self.total:
            return f"'{path}' holds no prompt", "Write one prompt a line"
        return f"'{path}' holds no prompt that is taken: {self}", "Loosen the filters, or check the column"


def choice_of(source: str | Path | PromptSource) -> PromptSource:
    """The source with all its settings, where it may be a path alone."""
    return source if isinstance(source, PromptSource) else PromptSource(path=str(source))


def prompts_hash(prompts: Iterable[str]) -> str:
    """Hex SHA-256 of the prompts in their order, as a JSON array of ASCII."""
    digest, stream, between = hashlib.sha256(b"["), iter(prompts), ""
    while block := list(islice(stream, BLOCK)):
        digest.update((between + json.dumps(block)[1:-1]).encode())
        between = ", "
    digest.update(b"]")
    return digest.hexdigest()


def content_of(source: Source) -> str:
    """What tells this source from another: the hash of its prompts; of one unfiltered text file, that of its bytes.

    Raises ConfigError if the source can't be read.
    """
    if not isinstance(source, list):
        choice = choice_of(source)
        files = files_of(choice.path)
        if len(files) == 1 and is_text(files[0][1]) and choice == PromptSource(path=choice.path):
            with opened(*files[0]) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return prompts_hash(Prompts(source))


def exists(source: Source) -> bool:
    """Whether there is something to read."""
    if isinstance(source, list):
        return True
    try:
        return any(system.exists(path) for system, path in files_of(choice_of(source).path))
    except (ConfigError, OSError):
        return False


# --- files ------------------------------------------------------------------------------------------------------------


def rows_of_files(choice: PromptSource) -> Iterator[tuple[str, int | str, Any, Any]]:
    """Each row of the source's files, with its file's name before what `rows_of` gives."""
    for system, path in files_of(choice.path):
        with opened(system, path) as file:
            name = name_of(system, path)
            for place, prompt, score in rows_of(file, name, choice.column, choice.score_column):
                yield name, place, prompt, score


def files_of(path: str) -> list[tuple[Any, str]]:
    """The files that a path or URL stands for, each with its fsspec file system, in the order of reading.

    `{00000..00099}` counts in the order written, a glob's files and a folder's .tar files go by name. Raises
    ConfigError where the URL's kind is unknown, or a glob or a folder holds nothing.
    """
    from braceexpand import braceexpand
    from fsspec.core import has_magic
    from fsspec.implementations.local import LocalFileSystem

    if Path(path).is_file():  # whatever signs its name holds
        return [(LocalFileSystem(), path)]
    try:
        names = list(braceexpand(path))
    except ValueError as error:
        raise ConfigError(f"'{path}': a brace does not close", "Write, say, {00000..00099}.tar") from error
    found = []
    for name in names:
        try:
            system, place = reach(name) if "://" in name else (LocalFileSystem(), name)
            is_folder = not has_magic(place) and system.isdir(place)
            pattern = f"{place.rstrip('/')}/*.tar" if is_folder else place
            inside = sorted(system.glob(pattern)) if has_magic(pattern) else []
        except (ValueError, OSError) as error:
            raise ConfigError(f"'{name}' cannot be reached: {error}", "Check the network, and what is there") from error
        if is_folder and not inside:
            raise ConfigError(f"prompt file '{name}' is a folder without .tar files", f"Name files: {name}/*.parquet")
        if has_magic(place) and not inside:
            raise ConfigError(f"'{name}' matches no file", "In an experiment a relative path starts at its file")
        found += [(system, file) for file in inside or [place]]
    return found


def opened(system: Any, path: str) -> Any:
    """The file, open for reading bytes. Raises ConfigError."""
    name = name_of(system, path)
    try:
        return system.open(path, "rb")
    except FileNotFoundError as error:
        message = f"The file '{name}' does not exist"
        raise ConfigError(message, "In an experiment a relative path starts at its file") from error
    except OSError as error:
        raise ConfigError(f"'{name}' cannot be read: {error.strerror or error}", "Check its permissions") from error


def name_of(system: Any, path: str) -> str:
    """The file as the user would name it."""
    return path if "file" in system.protocol else str(system.unstrip_protocol(path))


# --- values -----------------------------------------------------------------------------------------------------------


def check_text(prompt: Any, name: str, place: int | str | None = None) -> None:
    """Raises ConfigError if a prompt is no text, or is no text that can be written."""
    if isinstance(prompt, str) and prompt.isascii():
        return
    where = name if place is None else place_in(name, place)
    if not isinstance(prompt, str):
        raise ConfigError(f"{where} must be a text, not {prompt!r}", "Name the column that holds the texts")
    if not is_utf8(prompt):
        message = f"{where} has half a character (a lone surrogate): {prompt!r}"
        raise ConfigError(message, "Write the character itself instead of its escapes")


def is_missing(score: Any) -> bool:
    """Whether a row has no score: null, NaN (what tables have for null), or nothing between two commas."""
    return score is None or score == "" or score != score


def number_of(score: Any, name: str, place: int | str, column: str | None) -> float:
    """A row's score. Raises ConfigError if it is no number."""
    try:
        number = math.nan if isinstance(score, bool) else float(score)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise ConfigError(f"{place_in(name, place)}: '{column}' must be a number, not {score!r}", "Leave such rows out")
    return number


def characters(count: float) -> str:
    return f"{count} character{'' if count == 1 else 's'}"
