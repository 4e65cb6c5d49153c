"""Which process this is among those that work together, from the launcher's variables."""

import os
import platform
from dataclasses import dataclass
from datetime import timedelta

from instaflow.errors import InstaFlowError


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size` processes, the `local_rank`-th on its machine."""

    rank: int
    size: int
    local_rank: int

    @property
    def leads(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0


def world() -> World:
    """This process's place as torchrun or the DeepSpeed launcher says; alone where no launcher speaks."""
    try:
        place = World(
            rank=int(os.environ.get("RANK", "0")),
            size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        )
    except ValueError as error:
        raise InstaFlowError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}", "A launcher such as torchrun sets them"
        ) from error
    if not 0 <= place.rank < place.size:
        raise InstaFlowError(f"RANK is {place.rank}, but WORLD_SIZE is {place.size}", "Unset both, or use torchrun")
    return place


def join() -> None:
    """Connect the processes (NCCL and gloo with a GPU, gloo without); one process alone needs no network port."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    place = world()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    if place.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=timedelta(days=7))  # a stage on one process may keep the rest waiting


def barrier() -> None:
    """Wait until every process has come here."""
    if world().size > 1:
        import torch
        import torch.distributed as dist

        join()
        dist.all_reduce(torch.zeros(1))  # on the CPU, whatever the backend


def leave() -> None:
    """Take the connections down at a program's end."""
    import sys

    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def hardware() -> str:
    """What this process computes on, in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor_name() or platform.machine()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        return ""
    return names[0] if names else ""
