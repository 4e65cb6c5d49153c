"""Where networks run, and how."""

import os

import torch

from instaflow.world import world


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device("cuda", world().local_rank) if torch.cuda.is_available() else torch.device("cpu")


def set_up_cpu() -> None:
    """Compute with as many threads as there are cores, however many processes share them.

    A result's last bits depend on the number of threads; couplings must not depend on the number of processes.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_flush_denormal(True)
