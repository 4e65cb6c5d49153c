"""Processes of one launch meet: whether they reach one another, run the same, and see the same files.

What is asked here costs a moment at the start of a launch. Left unasked, it shows hours later, or never: as a wait.
"""

import fcntl
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from instaflow import __version__
from instaflow.errors import InstaFlowError, reason_of
from instaflow.files import write_file
from instaflow.world import gather, world

PATIENCE = timedelta(minutes=5)  # until all processes of a launch have come
SEEN_WITHIN = 60.0  # seconds until a new file is seen everywhere: NFS keeps what it knows of a folder for as long
POLL = 0.2
PACKAGES = ("torch", "deepspeed", "diffusers", "transformers")
NO_GPUS = ("", "-1", "NoDevFiles")
"""What CUDA_VISIBLE_DEVICES says where there shall be none."""
ADDRESS_OF = 0x8915  # Linux' SIOCGIFADDR

Gather = Callable[[Any], list[Any]]
"""Gives every process each one's value, in the order of their ranks; all of them must call it."""


@dataclass(frozen=True)
class Facts:
    """What one process says of itself."""

    host: str
    computes_on: str
    """GPUs, or the CPU."""
    without_gpu: tuple[str, str] | None = None
    """What `missing_gpu` says."""
    versions: dict[str, str] = field(default_factory=dict)

    def told(self) -> dict[str, str]:
        """What must be the same in all processes."""
        return {**self.versions, "the device": self.computes_on}


def host() -> str:
    """This machine's name, as Slurm calls it where it does."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def facts() -> Facts:
    import torch

    versions = {"instaflow": __version__}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return Facts(
        host=host(),
        computes_on="a GPU" if torch.cuda.is_available() else "the CPU",
        without_gpu=missing_gpu(),
        versions=versions,
    )


def missing_gpu() -> tuple[str, str] | None:
    """What is wrong where a job was given GPUs and PyTorch sees none, and the way out; None where nothing is."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None and "LOCAL_SIZE" not in os.environ:  # the DeepSpeed launcher names GPUs where there are none
        given = "" if given in NO_GPUS else f"CUDA_VISIBLE_DEVICES is {given}"
    else:
        count = os.environ.get("SLURM_GPUS_ON_NODE", "0")
        given = "" if count == "0" else f"SLURM_GPUS_ON_NODE is {count}"
    if not given:
        return None
    import torch

    if torch.cuda.is_available():
        return None
    cpu = "to compute on the CPU, set CUDA_VISIBLE_DEVICES to nothing"
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"{given}, but this PyTorch, {torch.__version__}, is built without CUDA",
            f"Install PyTorch's build for CUDA (pytorch.org says how); {cpu}",
        )
    return (
        f"{given}, but PyTorch, built for CUDA {torch.version.cuda}, sees no GPU",
        "`nvidia-smi` tells whether the driver is there, and whether it is recent enough; a container must be started "
        f"with its GPUs (apptainer: --nv); {cpu}",
    )


def check_alike(all_facts: Sequence[Facts]) -> None:
    """Raises InstaFlowError where a process lacks the GPU that it was given, or some differ in what they run."""
    for one in all_facts:
        if one.without_gpu:
            message, hint = one.without_gpu
            raise InstaFlowError(f"On '{one.host}' {message}", hint)
    if told := differences([(one.host, one.told()) for one in all_facts]):
        raise InstaFlowError(
            f"The processes of this launch differ: {'; '.join(told)}",
            "Give all nodes the same environment: one container, or one folder that all of them see",
        )


def differences(told: Iterable[tuple[str, dict[str, str]]]) -> list[str]:
    """torch is 2.14.0 on 'node1', 2.15.0 on 'node2'"""
    found: dict[str, dict[str, list[str]]] = {}
    told = [*told]
    for key in dict.fromkeys(key for _, values in told for key in values):
        for host, values in told:
            hosts = found.setdefault(key, {}).setdefault(values.get(key, "missing"), [])
            hosts += [host] if host not in hosts else []
    return [
        f"{key} is {', '.join(f'{value} on {named(hosts)}' for value, hosts in values.items())}"
        for key, values in found.items()
        if len(values) > 1
    ]


def named(hosts: Sequence[str]) -> str:
    shown = " and ".join(f"'{host}'" for host in hosts[:2])
    return shown if len(hosts) < 3 else f"{shown} and {len(hosts) - 2} more"


# --- reaching one another ---------------------------------------------------------------------------------------------


class Meeting:
    """The processes of a launch, each of which has found the first one and can lay down there what all may read.

    Raises InstaFlowError where they don't find one another within `PATIENCE`, or at once where the first one's name
    leads to no address, which names the ways to mend that; so do its methods.
    """

    def __init__(self, rank: int, size: int) -> None:
        from torch.distributed.rendezvous import rendezvous

        self.rank, self.size, self.turn = rank, size, 0
        with reaching(rank, size):
            socket.getaddrinfo(os.environ["MASTER_ADDR"], None)  # which torch tries for minutes, with pages of frames
            # torch tries twice to reach the first process, for so long each time
            self.store, _, _ = next(rendezvous("env://", timeout=PATIENCE / 2 if rank else PATIENCE))
            self.store.set_timeout(PATIENCE)

    def gather(self, value: Any) -> list[Any]:
        """Each process's value, of what JSON can hold. Nobody leaves before all have read them: the first one keeps
        them."""
        self.turn += 1
        keys = [f"{self.turn}/{rank}" for rank in range(self.size)]
        with reaching(self.rank, self.size):
            self.store.set(keys[self.rank], json.dumps(value))
            found = [json.loads(self.store.get(key)) for key in keys]
            self.store.set(f"{keys[self.rank]}/read", "")
            for key in keys if self.rank == 0 else ():
                self.store.get(f"{key}/read")
        return found

    def check_alike(self) -> None:
        found = self.gather(asdict(facts()))
        check_alike([Facts(**one) for one in found])

    def check_gloo(self) -> None:
        """Whether they reach one another directly, too, as gloo has them do."""
        import torch
        import torch.distributed as dist

        with reaching(self.rank, self.size):
            group: Any = dist.ProcessGroupGloo(dist.PrefixStore("gloo", self.store), self.rank, self.size, PATIENCE)
            group.allreduce([torch.zeros(1)]).wait()


@contextmanager
def reaching(rank: int, size: int) -> Iterator[None]:
    """Turns what torch raises, where processes don't reach one another, into an InstaFlowError."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise unreached(rank, size, reason_of(error)) from error


def unreached(rank: int, size: int, reason: str) -> InstaFlowError:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return InstaFlowError(
        f"Process {rank} of {size}, on '{host()}', does not reach the others, the first of which is to "
        f"be at {address}: {reason}",
        "Either a process did not start, or they look for one another in a network that not all share. Say which: "
        "MASTER_ADDR is the first one's address in it, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name its interface. "
        f"{interfaces_told()}",
    )


def interfaces() -> dict[str, str]:
    """This machine's network interfaces with their IPv4 addresses, "" for those without one, or unknown."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            found[name] = ""
            with suppress(OSError):
                answer = fcntl.ioctl(asked, ADDRESS_OF, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def interfaces_told() -> str:
    """'node1' has lo (127.0.0.1), eth0 (10.0.0.3); GLOO_SOCKET_IFNAME is eth1"""
    listed = [f"{name} ({address})" if address else name for name, address in interfaces().items()]
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    chosen = [f"{name} is {os.environ[name]}" for name in names if name in os.environ]
    return f"'{host()}' has {', '.join(listed)}{'; ' if chosen else ''}{', '.join(chosen)}"


# --- the same files ---------------------------------------------------------------------------------------------------


def check_launch(run: Path) -> None:
    """What a launch's processes ask before they work on a run. Raises InstaFlowError."""
    place = world()
    if place.size > 1:
        check_folder(run, gather, leads=place.leads)
    elif wrong := missing_gpu():
        raise InstaFlowError(*wrong)


def check_folder(folder: Path, gather: Gather, *, leads: bool) -> None:
    """Raises InstaFlowError unless every process sees what the leading one writes into `folder`."""
    mark, reason = folder / f".seen-{secrets.token_hex(8)}", ""
    try:
        if leads:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_file(mark, "")
            except OSError as error:
                reason = reason_of(error)
        name, reason = gather([mark.name, reason])[0]
        if reason:
            raise InstaFlowError(
                f"The first process cannot write into '{folder}': {reason}", "Choose another --run-dir"
            )
        seen = sees(folder / name)
        all_seen = gather([host(), str(folder.absolute()), seen])
    finally:
        with suppress(OSError):
            mark.unlink(missing_ok=True)
    blind = list(dict.fromkeys((host, place) for host, place, seen in all_seen if not seen))
    if blind:
        first, written = all_seen[0][:2]
        places = "; ".join(f"'{host}' at '{place}'" for host, place in blind[:3])
        raise InstaFlowError(
            f"What '{first}' writes into '{written}' is not seen by {places}",
            "A run's folder must be on a file system that all nodes share, and called the same on all of them",
        )


def sees(file: Path) -> bool:
    """Whether a file that another host has written is seen here before long."""
    deadline = time.monotonic() + SEEN_WITHIN
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
        with suppress(OSError):
            list(file.parent.iterdir())  # makes NFS ask anew
    return True
