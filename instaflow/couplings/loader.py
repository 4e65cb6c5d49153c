"""Batches of couplings at any position of an endless, shuffled stream: exact, and the same for any number of ranks."""

import shlex
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from instaflow.couplings.manifest import read_manifest
from instaflow.couplings.shards import BadShard, Shard, Sidecar, place_of_tar, read_shard, read_sidecar, shards_to_make
from instaflow.errors import DataError
from instaflow.plurals import counted
from instaflow.streams import random_stream, stream_key

WINDOW = 4  # shards whose records are shuffled together


@dataclass(frozen=True)
class Batch:
    """B couplings."""

    noise: np.ndarray  # [B, C, H, W] float32, unit variance
    latent: np.ndarray  # [B, C, H, W] float32, scaled
    prompts: list[str]
    indices: np.ndarray  # [B] int64


class Couplings:
    """The couplings of a finished couple stage, shuffled anew in each epoch by `seed`.

    An epoch's order: a permutation of the shards, cut into windows of `WINDOW`; within a window a permutation of its
    records. A position thus fixes its record by arithmetic alone. Two windows are in memory: that of the batch, and
    the one after it, which `workers` threads read in the background, be it from a disk or from a store; without any,
    a shard is read when the first of its records is due. Raises DataError where shards are missing or don't fit the
    manifest, from `batch` where one's hash doesn't match.
    """

    def __init__(self, folder: Path, seed: int, workers: int = WINDOW) -> None:
        self.folder, self.seed = Path(folder), seed
        self.manifest = read_manifest(self.folder)
        plan = self.manifest.plan
        missing = shards_to_make(self.folder, plan)
        if missing:
            message = f'"{self.folder}" lacks {len(missing)} of its {counted(plan.num_shards, "shard")}'
            hint = f"Run `instaflow repair {shlex.quote(str(self.folder))}`: it makes those that are missing."
            raise DataError(message, hint)
        self._counts = np.empty(plan.num_shards, np.int64)
        self._sidecars: list[str] = []  # in JSON: as objects those of ten million records take 13 MB
        for shard in range(plan.num_shards):
            sidecar = read_sidecar(self.folder, shard, plan)
            self._counts[shard] = sidecar.count
            self._sidecars.append(sidecar.model_dump_json())
        if not self._counts.any():
            raise DataError(f'"{self.folder}" holds not one coupling: all were left out', "Look at the model's images")
        self._reader = ThreadPoolExecutor(workers) if workers else None
        self._reading: OrderedDict[int, Future[Shard]] = OrderedDict()  # the least recently used first
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # the last epoch's
        self._shuffled: dict[tuple[int, int], np.ndarray] = {}  # the last window

    def __len__(self) -> int:
        """The records of one epoch."""
        return int(self._counts.sum())

    def batch(self, position: int, size: int) -> Batch:
        """The `size` records from `position` on; positions count on over the epochs."""
        if position < 0 or size < 1:
            raise ValueError(f"no batch of {size} records at position {position}")
        shards, rows = self._records(position, size).T
        shape = (size, *self.manifest.latent_shape)
        noise, latent = np.empty(shape, np.float32), np.empty(shape, np.float32)
        prompts, indices = [""] * size, np.empty(size, np.int64)
        for shard, reading in {shard: self._read(int(shard)) for shard in np.unique(shards)}.items():
            records = reading.result()
            places = np.flatnonzero(shards == shard)
            noise[places] = records.noise[rows[places]]
            latent[places] = records.latent[rows[places]]
            for place in places:
                prompts[place] = records.prompts[rows[place]]
                indices[place] = records.indices[rows[place]]
        for shard in self._shards_after(position + size - 1) if self._reader else ():
            self._read(int(shard))
        return Batch(noise, latent, prompts, indices)

    def _records(self, position: int, size: int) -> np.ndarray:
        """Shard and row of each of the `size` records from `position` on: [size, 2]."""
        parts = []
        while size:
            epoch, offset = divmod(position, len(self))
            start, window = self._window(epoch, offset)
            parts.append(window[offset - start :][:size])
            position, size = position + len(parts[-1]), size - len(parts[-1])
        return np.concatenate(parts)

    def _window(self, epoch: int, offset: int) -> tuple[int, np.ndarray]:
        """The window that holds the epoch's record `offset`: its first offset, and shard and row of each: [R, 2]."""
        order, ends = self._order(epoch)
        window = self._window_of(epoch, offset)
        shards = order[window * WINDOW : (window + 1) * WINDOW]
        if (epoch, window) not in self._shuffled:
            counts = self._counts[shards]
            rows = np.concatenate([np.arange(count) for count in counts])
            records = np.column_stack([np.repeat(shards, counts), rows])
            stream = random_stream(stream_key("order", self.seed, epoch), 1 + window)
            self._shuffled = {(epoch, window): stream.permutation(records)}
        return ends[window * WINDOW] - self._counts[shards[0]], self._shuffled[epoch, window]

    def _window_of(self, epoch: int, offset: int) -> int:
        """Which of the epoch's windows holds its record `offset`."""
        return int(np.searchsorted(self._order(epoch)[1], offset, side="right")) // WINDOW

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards, and how many records have passed at the end of each."""
        if epoch not in self._orders:
            order = random_stream(stream_key("order", self.seed, epoch), 0).permutation(len(self._counts))
            self._orders = {epoch: (order, np.cumsum(self._counts[order]))}
        return self._orders[epoch]

    def _shards_after(self, position: int) -> np.ndarray:
        """The shards of the window that follows that of the record at `position`."""
        epoch, offset = divmod(position, len(self))
        after = self._window_of(epoch, offset) + 1
        shards = self._order(epoch)[0][after * WINDOW : (after + 1) * WINDOW]
        return shards if len(shards) else self._order(epoch + 1)[0][:WINDOW]

    def _read(self, shard: int) -> Future[Shard]:
        """A shard that is read, or being read; one that could not be read ahead is tried anew."""
        reading = self._reading.get(shard)
        if reading is None or (reading.done() and reading.exception()):
            self._reading[shard] = reading = self._begin(shard)
            if len(self._reading) > 2 * WINDOW:
                self._reading.popitem(last=False)
        self._reading.move_to_end(shard)
        return reading

    def _begin(self, shard: int) -> Future[Shard]:
        if self._reader:
            return self._reader.submit(self._shard, shard)
        read: Future[Shard] = Future()
        read.set_result(self._shard(shard))
        return read

    def _shard(self, shard: int) -> Shard:
        records = read_shard(self.folder, Sidecar.model_validate_json(self._sidecars[shard]))
        if not records.noise.shape[1:] == records.latent.shape[1:] == self.manifest.latent_shape:
            raise BadShard(self.folder, place_of_tar(self.folder, shard), "does not hold the manifest's latent_shape")
        if not records.noise.dtype == records.latent.dtype == self.manifest.stored_dtype:
            raise BadShard(self.folder, place_of_tar(self.folder, shard), "does not hold the manifest's stored_dtype")
        return replace(records, extras={})  # no batch takes them, and they may be larger than all else
