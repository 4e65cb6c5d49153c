"""What was seen of many samples, kept batch by batch on disk: processes share the work, and a killed one goes on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from instaflow.files import remove_leftovers, write_file, write_json

Observed = Mapping[str, np.ndarray]
"""Arrays by name, an entry a sample."""


@dataclass(frozen=True)
class Observations:
    """FOLDER/card.json says of what, FOLDER/000000-000250.safetensors holds a batch of samples, and so on.

    A batch is a file, whole or absent, and does not depend on who makes it: samples follow from their index.
    """

    folder: Path
    count: int
    batch_size: int

    def begin(self, card: Mapping[str, object]) -> None:
        """Say what this is of, and clear what killed processes left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "card.json", card)
        remove_leftovers(self.folder / "*")

    @property
    def batches(self) -> list[slice]:
        return [
            slice(start, min(start + self.batch_size, self.count)) for start in range(0, self.count, self.batch_size)
        ]

    def missing(self, rank: int = 0, size: int = 1) -> list[slice]:
        """The batches of one of `size` processes that are not here yet, or are damaged."""
        return [batch for batch in self.batches[rank::size] if not self._is_sound(batch)]

    def write(self, batch: slice, observed: Observed) -> None:
        """Keep a batch: arrays whose first axis is the batch's samples, or fewer where not all are kept."""
        content = save({name: np.ascontiguousarray(values) for name, values in observed.items()})
        write_file(self._file(batch), content)

    def read(self, batch: slice) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = load_file(self._file(batch))
        return found

    def joined(self) -> dict[str, np.ndarray]:
        """All batches, in order."""
        parts = [self.read(batch) for batch in self.batches]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _file(self, batch: slice) -> Path:
        return self.folder / f"{batch.start:06d}-{batch.stop:06d}.safetensors"

    def _is_sound(self, batch: slice) -> bool:
        try:
            with safe_open(self._file(batch), "numpy"):
                return True
        except (OSError, SafetensorError, json.JSONDecodeError):
            return False
