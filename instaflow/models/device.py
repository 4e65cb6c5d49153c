"""Where networks run, and how."""

import os

import torch

from instaflow.world import world


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device("cuda", world().local_rank) if torch.cuda.is_available() else torch.device("cpu")


def set_up_cpu() -> None:
    """Share the machine's cores evenly among its processes, whatever the launcher thinks of threads."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    torch.set_flush_denormal(True)
