"""Where networks run, and how."""

import os

import torch

from instaflow.world import world


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device("cuda", world().local_rank) if torch.cuda.is_available() else torch.device("cpu")


def set_up_cpu() -> None:
    """Use the machine's cores the same way whatever launched us: the number of threads is part of a result's bits."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_flush_denormal(True)
