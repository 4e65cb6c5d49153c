"""What was seen of many samples, kept batch by batch on disk: processes share the work, and a killed one goes on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from instaflow.errors import DataError
from instaflow.files import opened, remove_leftovers, sealed, write_file, write_json

Observed = Mapping[str, np.ndarray]
"""Arrays by name, an entry a sample."""
MADE = "made"
"""The entry of a batch's metadata: its circumstances, as JSON."""


@dataclass(frozen=True)
class Observations:
    """FOLDER/card.json says of what, FOLDER/000000-000250.observed holds a batch of samples, and so on.

    A batch is a file, whole or absent: its checksum, and after it a safetensors, in whose metadata stands in which
    circumstances it was made. Its samples do not depend on them: they follow from their index.
    """

    folder: Path
    count: int
    batch_size: int

    def begin(self, card: Mapping[str, object]) -> None:
        """Say what this is of, unless that is said already, and clear what killed processes left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.card():
            write_json(self.folder / "card.json", card)
        remove_leftovers(self.folder / "*")

    def card(self) -> dict[str, Any]:
        """The card that it was begun with; empty where there is none that can be read."""
        try:
            found = json.loads((self.folder / "card.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def batches(self) -> list[slice]:
        return [
            slice(start, min(start + self.batch_size, self.count)) for start in range(0, self.count, self.batch_size)
        ]

    def missing(self, rank: int = 0, size: int = 1) -> list[slice]:
        """The batches of one of `size` processes that are not here yet, or are damaged."""
        return [batch for batch in self.batches[rank::size] if not self._is_sound(batch)]

    def write(self, batch: slice, observed: Observed, made: Mapping[str, object] | None = None) -> None:
        """Keep a batch: arrays whose first axis is the batch's samples, or fewer where not all are kept.

        made: in which circumstances.
        """
        arrays = {name: np.ascontiguousarray(values) for name, values in observed.items()}
        write_file(self._file(batch), sealed(save(arrays, {MADE: json.dumps(made)} if made else None)))

    def circumstances(self) -> list[dict[str, Any]]:
        """In which ones the batches were made that are here, each once.

        Earlier versions told those of the first batch alone, on the card: they go for all that tell none.
        """
        found: list[dict[str, Any]] = []
        for batch in self.batches:
            content = opened(self._file(batch).read_bytes()) if self._file(batch).is_file() else None
            if content is None:
                continue
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            told = header.get("__metadata__", {}).get(MADE)
            made = json.loads(told) if told else self.card()
            found += [made] if made not in found else []
        return found

    def remove_others(self) -> None:
        """Remove the batches of another size, which nobody may want any more, nor remove at the same time."""
        own = {self._file(batch) for batch in self.batches}
        for file in {*self.folder.glob("*.observed")} - own:
            file.unlink()

    def read(self, batch: slice) -> dict[str, np.ndarray]:
        """A batch that is here, its checksum looked at. Raises DataError for one that is damaged."""
        file = self._file(batch)
        content = opened(file.read_bytes())
        if content is None:
            raise DataError(f"'{file}' is damaged", "Delete it: the same command makes it anew")
        found: dict[str, np.ndarray] = load(content)
        return found

    def at(self, places: Sequence[int], name: str) -> np.ndarray:
        """The entries of an array at these places [len(places), ...]. Raises DataError for a batch that is damaged."""
        needed = {place // self.batch_size for place in places}
        read = {index: self.read(self.batches[index])[name] for index in needed}
        return np.stack([read[place // self.batch_size][place % self.batch_size] for place in places])

    def joined(self, *, without: str = "") -> dict[str, np.ndarray]:
        """All batches, in order. without: an array that is too large for all of it to be in memory."""
        parts = [{name: v for name, v in self.read(batch).items() if name != without} for batch in self.batches]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _file(self, batch: slice) -> Path:
        return self.folder / f"{batch.start:06d}-{batch.stop:06d}.observed"

    def _is_sound(self, batch: slice) -> bool:
        """Whether a batch is here as it was written: by its checksum, which a torn or changed file fails."""
        try:
            return opened(self._file(batch).read_bytes()) is not None
        except OSError:
            return False
