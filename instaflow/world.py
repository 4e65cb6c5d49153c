"""Which process this is among those that work together, from the launcher's variables."""

import os
import platform
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from instaflow.errors import InstaFlowError
from instaflow.plurals import counted

WORK = timedelta(days=7)  # a stage on one process may keep the rest waiting
PORTS = 20_000
STRIDE = 12_361  # between two jobs' ports: by the golden ratio, it keeps those of neighbours and their steps apart


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
    """This process's place as torchrun, the DeepSpeed launcher or `together_under_srun` says; alone where none does."""
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


def together_under_srun() -> None:
    """Make the tasks of one `srun` processes that work together: say what torchrun would, from Slurm's variables.

    Task 0 runs on the first node of the step, where the others find it at a port that follows from job and step. No
    two of a hundred jobs in a row share one before their hundredth step; jobs whose numbers are 20,000 apart do.
    MASTER_ADDR and MASTER_PORT come first where they are set, as does a launcher that `srun` started. Raises
    InstaFlowError.
    """
    # SLURM_STEP_NUM_TASKS is srun's own: a batch script without srun is one process, whatever SLURM_NTASKS says.
    tasks = number("SLURM_STEP_NUM_TASKS") or 1
    if "RANK" in os.environ or tasks == 1:
        return
    rank, local_rank, nodes = number("SLURM_PROCID"), number("SLURM_LOCALID"), os.environ.get("SLURM_STEP_NODELIST", "")
    if rank is None or local_rank is None or not (nodes or "MASTER_ADDR" in os.environ):
        raise InstaFlowError(
            f"srun started {tasks} tasks, but SLURM_PROCID, SLURM_LOCALID or SLURM_STEP_NODELIST is missing",
            "Unset SLURM_STEP_NUM_TASKS if this is no task of srun's; else use torchrun",
        )
    check_task(rank, tasks)
    if gpus := os.environ.get("CUDA_VISIBLE_DEVICES"):  # --gpus-per-task lets each task see its own alone
        local_rank %= len(gpus.split(","))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(tasks), "LOCAL_RANK": str(local_rank)}
    alone = number("SLURM_STEP_NUM_NODES") == 1
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = "127.0.0.1" if alone else first_node(nodes)
    job, step = number("SLURM_JOB_ID") or 0, number("SLURM_STEP_ID") or 0
    place = (STRIDE * job + step) % PORTS
    os.environ.setdefault("MASTER_PORT", str(10_000 + place))  # below those that systems hand out
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # several processes share the cores: don't spin


def first_node(nodes: str) -> str:
    """The first name in a Slurm node list such as "node[01-03,7],login". Raises InstaFlowError."""
    first = re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes).partition(",")[0]
    if not first or "[" in first:
        raise InstaFlowError(
            f"Which node is the first of '{nodes}' is not told by it",
            "Set MASTER_ADDR to the first name that `scontrol show hostnames` gives",
        )
    return first


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
        array = range(first, last + 1, number("SLURM_ARRAY_TASK_STEP") or 1)
        if len(array) != tasks:
            raise InstaFlowError(
                f"The Slurm array has {tasks} tasks between {first} and {last}: which of them this is, is not told",
                "Give --worker-index and --worker-count, or submit a range such as --array=0-7",
            )
        if task not in array:
            raise InstaFlowError(
                f"SLURM_ARRAY_TASK_ID is {task}, but the array's tasks are {first} to {last} by {array.step}",
                "Slurm sets it; unset it, or give --worker-index and --worker-count",
            )
        index, count = array.index(task), tasks
    process, processes = number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS")
    if process is not None and processes is not None and "RANK" not in os.environ:
        check_task(process, processes)
        index, count = index * processes + process, count * processes
    return Worker(index, count)


def check_task(process: int, processes: int) -> None:
    """Raises InstaFlowError where a task of srun's cannot be one of so many."""
    if process >= processes:
        raise InstaFlowError(
            f"SLURM_PROCID is {process}, but SLURM_STEP_NUM_TASKS is {processes}",
            f"srun sets both, the first to 0 to {max(processes, 1) - 1}; unset both if this is no task of srun's",
        )


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
    """Connect the processes (NCCL and gloo with a GPU, gloo without); one process alone needs no network port.

    Raises InstaFlowError where they don't reach one another, or don't run the same.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    place = world()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        if place.local_rank >= (gpus := torch.cuda.device_count()):
            raise InstaFlowError(
                f"This is process {place.local_rank + 1} on this machine, where PyTorch sees {counted(gpus, 'GPU')}",
                "Start no more processes than there are GPUs, each of which takes one",
            )
        torch.cuda.set_device(place.local_rank)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    if place.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        if missing := sorted({"MASTER_ADDR", "MASTER_PORT"} - {*os.environ}):
            raise InstaFlowError(
                f"WORLD_SIZE is {place.size}, but {' and '.join(missing)}, where the first process listens, is not set",
                "Use torchrun, the DeepSpeed launcher or srun",
            )
        from instaflow.meeting import Meeting

        meeting = Meeting(place.rank, place.size)
        meeting.check_alike()
        meeting.check_gloo()
        meeting.store.set_timeout(WORK)
        store = dist.PrefixStore("work", meeting.store)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=WORK)


def barrier() -> None:
    """Wait until every process has come here."""
    if world().size > 1:
        import torch
        import torch.distributed as dist

        join()
        dist.all_reduce(torch.zeros(1))  # on the CPU, whatever the backend


def as_the_leader_sees(value: bool) -> bool:
    """The leading process's value, in every process of a launch."""
    return bool(numbers_of_the_leader(int(value))[0])


def numbers_of_the_leader(*numbers: int) -> list[int]:
    """The leading process's whole numbers, in every process of a launch; the others give as many."""
    if world().size == 1:
        return [*numbers]
    import torch
    import torch.distributed as dist

    join()
    said = torch.tensor(numbers, dtype=torch.int64)
    dist.broadcast(said, src=0)
    found: list[int] = said.tolist()
    return found


def as_any_sees(value: bool) -> bool:
    """Whether any process of a launch says so, in all of them."""
    if world().size == 1:
        return value
    import torch
    import torch.distributed as dist

    join()
    said = torch.tensor([float(value)])  # on the CPU, whatever the backend
    dist.all_reduce(said)
    return bool(said.item())


def gather(value: Any) -> list[Any]:
    """Each process's value, in all of them, in the order of their ranks."""
    if world().size == 1:
        return [value]
    import torch.distributed as dist

    join()
    found: list[Any] = [None] * world().size
    dist.all_gather_object(found, value)
    return found


def leave() -> bool:
    """Take the connections down at a program's end; whether there were other processes to be connected to."""
    import sys

    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return False
    size = dist.get_world_size()
    dist.destroy_process_group()
    return size > 1


def hardware() -> str:
    """What this process computes on, in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{processor_name() or platform.machine()}, {threads} thread{'' if threads == 1 else 's'}"


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        return ""
    return names[0] if names else ""
