"""What a line of stats.jsonl tells about a training."""

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from instaflow.world import world

BINS = 10  # of t


class LossByTime:
    """Losses in equal stretches of t, summed on the device that they are computed on, until they are taken."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, BINS, dtype=torch.float64)
        """Of the losses, and their number."""

    def add(self, t: Tensor, losses: Tensor) -> None:
        """Take in a loss of each sample. t: [B] in [0, 1]; losses: [B]."""
        self.sums = self.sums.to(t.device)
        places = (t * BINS).long().clamp(max=BINS - 1)
        self.sums[0].index_add_(0, places, losses.double())
        self.sums[1].index_add_(0, places, torch.ones_like(places, dtype=torch.float64))

    def total(self) -> Tensor:
        """The sums of all processes [2, BINS]. They must all ask together."""
        return total_of(self.sums)


class Means:
    """Named figures of the micro batches, whose means a line tells."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.sums = torch.zeros(2, len(names), dtype=torch.float64)
        """Of the figures, and their number."""

    def add(self, name: str, value: Tensor) -> None:
        """Take in a micro batch's, a scalar."""
        self.sums = self.sums.to(value.device)
        place = self.names.index(name)
        self.sums[0, place] += value.detach().double()
        self.sums[1, place] += 1

    def total(self) -> Tensor:
        """The sums of all processes [2, number of names]. They must all ask together."""
        return total_of(self.sums)


def total_of(sums: Tensor) -> Tensor:
    """The sums of all processes, on the CPU."""
    sums = sums.to("cpu", copy=True)
    if world().size > 1:
        dist.all_reduce(sums)
    return sums


class Figures:
    """The mean loss since the last line, as a whole and by time, with other means; a stop loses none of it."""

    def __init__(self, by_time: LossByTime | None, saved: dict[str, Any] | None, means: Sequence[Means] = ()) -> None:
        self.by_time, self.means = by_time, means
        self.loss_sum: float = saved["loss_sum"] if saved else 0.0
        self.loss_count: int = saved["loss_count"] if saved else 0
        if by_time:
            by_time.sums = torch.zeros(2, BINS, dtype=torch.float64)
            if saved and world().leads:  # who has them for all
                by_time.sums += torch.tensor(saved["loss_by_time"], dtype=torch.float64)
        for place, named in enumerate(means):
            named.sums = torch.zeros_like(named.sums)
            if saved and world().leads:
                named.sums += torch.tensor(saved["means"][place], dtype=torch.float64).to(named.sums.device)
        self.since, self.samples = time.monotonic(), 0  # of this process

    @property
    def loss(self) -> float:
        return self.loss_sum / self.loss_count

    def add(self, loss: float, samples: int) -> None:
        """Take in a global batch."""
        self.loss_sum, self.loss_count, self.samples = self.loss_sum + loss, self.loss_count + 1, self.samples + samples

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, the same on all processes, which must ask together."""
        kept: dict[str, Any] = {"loss_sum": self.loss_sum, "loss_count": self.loss_count}
        if self.means:
            kept["means"] = [means.total().tolist() for means in self.means]
        return kept | ({"loss_by_time": self.by_time.total().tolist()} if self.by_time else {})

    def take(self) -> dict[str, Any]:
        """A line's worth, and begin anew. All processes must ask together.

        `loss_by_time`: BINS means, from noise to data, None where no sample fell; `peak_memory_gib`: this process's,
        the GPU's where there is one.
        """
        now = time.monotonic()
        line: dict[str, Any] = {"loss": self.loss}
        if self.by_time:
            sums, counts = self.by_time.total().tolist()
            line["loss_by_time"] = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
            self.by_time.sums.zero_()
        for means in self.means:
            sums, counts = means.total().tolist()
            line |= {
                name: total / count if count else None
                for name, total, count in zip(means.names, sums, counts, strict=True)
            }
            means.sums.zero_()
        line["samples_per_second"] = round(self.samples / max(now - self.since, 1e-9), 2)
        line["peak_memory_gib"] = round(peak_memory() / 2**30, 3)
        self.loss_sum, self.loss_count, self.since, self.samples = 0.0, 0, now, 0
        return line


def peak_memory() -> int:
    """The most bytes that this process has held so far: of the GPU's memory where there is one, else of the CPU's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
