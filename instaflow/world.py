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


@dataclass(frozen=True)
class Worker:
    """One of `count` commands that fixed shares of a couple stage's shards belong to; one of 1 may make any of them."""

    index: int = 0
    count: int = 1

    def options(self) -> list[str]:
        """What to type to be this worker again."""
        return ["--worker-index", str(self.index), "--worker-count", str(self.count)] if self.count > 1 else []


ALONE = Worker()


def worker(index: int | None = None, count: int | None = None) -> Worker:
    """Which worker this command is: as the options say, else as Slurm or Kubernetes does; else the only one.

    Slurm: the task of an array, the task of `srun`, or both. Kubernetes tells the index alone, so it counts where
    `count` is given. torchrun's processes share what is their command's. Raises InstaFlowError.
    """
    if index is None and count is None:
        return slurm_worker()
    if index is None:
        task = slurm_worker()
        index = task.index if task.count > 1 else number("JOB_COMPLETION_INDEX")
    if index is None or count is None:
        given, missing = ("index", "count") if count is None else ("count", "index")
        raise InstaFlowError(
            f"--worker-{given} is given, but not --worker-{missing}",
            "Give both, or neither: workers then share the shards among themselves",
        )
    if not 0 <= index < count:
        raise InstaFlowError(
            f"The worker's index is {index}, but their count is {count}", f"Indices are 0 to {count - 1}"
        )
    return Worker(index, count)


def slurm_worker() -> Worker:
    """This task among all tasks of a Slurm job array and of its `srun`. Raises InstaFlowError."""
    first, last = number("SLURM_ARRAY_TASK_MIN"), number("SLURM_ARRAY_TASK_MAX")
    task, tasks = number("SLURM_ARRAY_TASK_ID"), number("SLURM_ARRAY_TASK_COUNT")
    index, count = 0, 1
    if first is not None and last is not None and task is not None and tasks is not None:
        step = number("SLURM_ARRAY_TASK_STEP") or 1
        if len(range(first, last + 1, step)) != tasks:
            raise InstaFlowError(
                f"The Slurm array has {tasks} tasks between {first} and {last}: which of them this is, is not told",
                "Give --worker-index and --worker-count, or submit a range such as --array=0-7",
            )
        index, count = (task - first) // step, tasks
    # SLURM_STEP_NUM_TASKS is srun's own: a batch script without srun is one process, whatever SLURM_NTASKS says.
    process, processes = number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS")
    if process is not None and processes is not None and "RANK" not in os.environ:
        index, count = index * processes + process, count * processes
    return Worker(index, count)


def number(variable: str) -> int | None:
    """A variable of a launcher's as a whole number. Raises InstaFlowError."""
    text = os.environ.get(variable)
    if not text:
        return None
    if not text.isdecimal():
        raise InstaFlowError(
            f"{variable} must be a whole number, not '{text}'", "Slurm or Kubernetes sets it; unset it"
        )
    return int(text)


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


def as_the_leader_sees(value: bool) -> bool:
    """The leading process's value, in every process of a launch."""
    if world().size == 1:
        return value
    import torch
    import torch.distributed as dist

    join()
    said = torch.tensor([float(value)])
    dist.broadcast(said, src=0)
    return bool(said.item())


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
