"""What a machine has that stages need: packages, GPUs, processes that reach one another, a compiler, Slurm, models."""

import os
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from instaflow import weights
from instaflow.config import Experiment
from instaflow.errors import InstaFlowError
from instaflow.meeting import interfaces, missing_gpu
from instaflow.places import cached_model, find_model, is_hub_name
from instaflow.plurals import counted
from instaflow.rundir import stage_folders
from pipelines.doctor_table import FAILURE, OK, WARNING
from pipelines.experiment import look_at_measures, look_at_perception, look_at_source, place_of_source
from pipelines.plan_tables import sized

SLURM = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
TOGETHER = 120  # seconds that processes have to reach one another, start included
SHARED = 2**30  # bytes of /dev/shm, through which NCCL's processes on one machine speak
FILES = 1024  # that may be open at once

ALL_REDUCE = """
import sys, time
from datetime import timedelta
import torch, torch.distributed as dist
backend, seconds = sys.argv[1], int(sys.argv[2])
place = torch.device("cpu")
if backend == "nccl":
    import os
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    place = torch.device("cuda")
dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
numbers = torch.ones(2**20, device=place)
dist.all_reduce(numbers)
start = time.perf_counter()
dist.all_reduce(numbers)
assert float(numbers[0]) == dist.get_world_size() ** 2, numbers[0]
print("took", time.perf_counter() - start, flush=True)
dist.destroy_process_group()
"""
COMPILE = """
#include <Python.h>
#include <omp.h>
int main() { return omp_get_max_threads() < 1; }
"""


def packages() -> tuple[str, ...]:
    """The packages' versions beside those that this one asks for."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(line) for line in requires("instaflow") or ()]
    except PackageNotFoundError:
        return WARNING, "instaflow runs from its source alone: which versions it wants is not known", "pip install ."
    missing: list[str] = []
    other: list[str] = []
    fine: list[str] = []
    for one in asked:
        if one.marker and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            here = version(one.name)
        except PackageNotFoundError:
            missing.append(f"{one.name} is not here")
            continue
        fits = one.specifier.contains(here, prereleases=True)
        (fine if fits else other).append(f"{one.name} {here}{'' if fits else f', not {one.specifier}'}")
    if missing or other:
        remedy = "Install the versions that were tested: pip install -c constraints.txt ."
        return FAILURE if missing else WARNING, "; ".join([*missing, *other]), remedy
    shown = [one for one in fine if one.split()[0] in ("deepspeed", "diffusers", "transformers")]
    return OK, f"instaflow {version('instaflow')}, {', '.join(shown)}; all of {len(fine)} in the range that was tested"


def pytorch() -> tuple[str, ...]:
    """PyTorch, the CUDA that it is built for, and the GPUs that it sees."""
    import torch

    if wrong := missing_gpu():
        return FAILURE, *wrong
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    words = f"torch {torch.__version__}, built for {built}"
    if count := torch.cuda.device_count() if torch.cuda.is_available() else 0:
        memory = torch.cuda.get_device_properties(0).total_memory
        return OK, f"{words}; {counted(count, 'GPU')}: {torch.cuda.get_device_name(0)}, {sized(memory)} each"
    if shutil.which("nvidia-smi") and not subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode:
        remedy = "Install PyTorch's build for the driver's CUDA (pytorch.org says how)"
        return FAILURE, f"{words}; nvidia-smi lists GPUs that PyTorch does not see", remedy
    return OK, f"{words}; no GPU here"


def all_reduce(backend: str, processes: Sequence[Mapping[str, str]]) -> float | str:
    """The seconds of a sum of a million numbers over processes that these variables start; else why there is none."""
    words = [sys.executable, "-c", ALL_REDUCE, backend, str(TOGETHER)]
    own = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}  # torchrun's
    started = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**own, **variables})
        for variables in processes
    ]
    seconds = []
    try:
        for process in started:
            said, errors = process.communicate(timeout=TOGETHER)
            if process.returncode or not said.startswith("took"):
                return ([line for line in errors.splitlines() if "Error" in line] or ["a process ended"])[-1]
            seconds.append(float(said.split()[1]))
    except subprocess.TimeoutExpired:
        return f"nothing for {TOGETHER} s"
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return max(seconds)


def here(size: int) -> list[dict[str, str]]:
    """What tells so many processes of this machine to work together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def gloo() -> tuple[str, ...]:
    return reached("gloo", "two processes", all_reduce("gloo", here(2)))


def nccl() -> tuple[str, ...]:
    import torch

    if not torch.cuda.is_available():
        return OK, "not tried: no GPU here"
    count = torch.cuda.device_count()
    told = ".".join(map(str, torch.cuda.nccl.version()))
    return reached("nccl", f"NCCL {told}, {counted(count, 'GPU')}", all_reduce("nccl", here(count)))


def reached(backend: str, who: str, seconds: float | str) -> tuple[str, ...]:
    """What is said of a sum over processes."""
    if isinstance(seconds, float):
        return OK, f"{who}: a sum of a million numbers in {1000 * seconds:,.1f} ms"
    listed = ", ".join(f"{name} ({address})" for name, address in interfaces().items() if address)
    remedy = f"Name the interface that all processes reach by {backend.upper()}_SOCKET_IFNAME: here are {listed}"
    if backend == "nccl":
        remedy += ". NCCL_DEBUG=INFO has NCCL tell what it tries"
    return FAILURE, f"{who}: {seconds}", remedy


def compiler() -> tuple[str, ...]:
    """Whether PyTorch can compile a network: on a CPU by a C++ compiler, on a GPU by Triton, which calls one of C."""
    remedy = "Debian: g++ and python3-dev; on clusters often a module. Without, leave `compile: true` out of stages"
    program = next(filter(shutil.which, filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"])), None)
    if program is None:
        return WARNING, "there is no C++ compiler: no network can be compiled", remedy
    headers = sysconfig.get_path("include")
    with tempfile.TemporaryDirectory() as folder:
        words = [program, "-x", "c++", "-", "-fopenmp", f"-I{headers}", "-shared", "-fPIC", "-o", f"{folder}/made.so"]
        done = subprocess.run(words, input=COMPILE, capture_output=True, text=True)
    if done.returncode:
        reason = ([line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"])[0]
        return WARNING, f"{program} cannot compile what PyTorch makes: {reason}", remedy
    return OK, f"{program}, with OpenMP and Python's headers"


def network() -> tuple[str, ...]:
    """The interfaces, and whether this machine's name leads others to it."""
    listed = ", ".join(f"{name} ({address})" for name, address in interfaces().items() if address)
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "no address"
    words = f"{listed}; '{socket.gethostname()}' leads to {address}"
    if address.startswith("127.") or not address[0].isdigit():
        words += ": between several machines, GLOO_SOCKET_IFNAME must name the interface"
    return OK, words


def limits() -> tuple[str, ...]:
    """Shared memory and open files."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    told, remedies = [], []
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total
        told.append(f"{sized(size)} of /dev/shm")
        if size < SHARED:
            remedies.append("NCCL's processes speak through /dev/shm: give a container more (docker: --shm-size=8g)")
    told.append("any number of files open" if files == resource.RLIM_INFINITY else f"{files:,} files open at once")
    if 0 <= files < FILES:
        remedies.append(f"`ulimit -n {FILES}` before the command, in a job by `lines`: sockets and shards need files")
    return WARNING if remedies else OK, ", ".join(told), "; ".join(remedies)


def slurm() -> tuple[str, ...]:
    """The commands that jobs are submitted with, and whether the controller answers them."""
    absent = [program for program in SLURM if shutil.which(program) is None]
    if len(absent) == len(SLURM):
        return OK, "not here: `instaflow run` needs none"
    if absent:
        return WARNING, f"not here: {', '.join(absent)}", "Submit where all of Slurm's commands are"
    remedy = "Nothing can be submitted from here: is this a node of the cluster's? `scontrol ping` tells more"
    try:
        done = subprocess.run(["sinfo", "--noheader", "--format=%P|%D|%T"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return WARNING, "its controller does not answer", remedy
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        return WARNING, f"its controller does not answer: {said.splitlines()[-1]}", remedy
    version = subprocess.run(["sinfo", "--version"], capture_output=True, text=True).stdout.strip()
    rows = [line.strip().split("|") for line in done.stdout.splitlines() if line.count("|") == 2]
    nodes = [f"{count} {state} in {partition.rstrip('*')}" for partition, count, state in rows]
    return OK, f"{version}; nodes: {', '.join(nodes) or 'none'}"


def models(experiment: Experiment | None) -> tuple[str, ...]:
    """The hub models that an experiment wants, and where they are kept."""
    from huggingface_hub import constants

    offline = bool(constants.HF_HUB_OFFLINE)
    kept = Path(constants.HF_HUB_CACHE)
    words = f"{'offline (HF_HUB_OFFLINE)' if offline else 'the hub may be asked'}, kept in {kept}"
    if experiment is None:
        count = len(list(kept.glob("models--*")))
        return OK, f"{words}: {counted(count, 'model')}"
    asked = {parent for stage in experiment.stages.values() for parent in stage.parents().values()}
    names = sorted(asked - experiment.stages.keys())
    for name in names:
        if not is_hub_name(name) and not Path(name).is_dir():
            find_model(name)  # raises DataError
    absent = [name for name in names if is_hub_name(name) and cached_model(name) is None]
    if absent:
        told = " and ".join(f"'{name}'" for name in absent)
        way = f"On a machine with network and the same HF_HOME: hf download {absent[0]}"
        return FAILURE if offline else WARNING, f"{words}: {told} not here", way
    return OK, f"{words}: {', '.join(names) or 'none is wanted'}"


def files_of(experiment: Experiment) -> tuple[str, ...]:
    """The prompts, images and weights that an experiment's stages read."""
    for stage in stage_folders(experiment).values():
        if not stage.is_done():
            try:
                if "://" not in place_of_source(stage):
                    look_at_source(stage)
                look_at_perception(stage)
                look_at_measures(stage)
            except InstaFlowError as error:
                error.message = f"Stage '{stage.name}': {error.message}"
                raise
    return OK, "prompts, images and weights that its stages read are here"


def measures() -> tuple[str, ...]:
    """The files of weights that metrics and losses measure by."""
    known = [weights.look_for(one) for one in weights.WEIGHTS.values()]
    if wrong := [one for one in known if one.state == "wrong"]:
        told = ", ".join(f"'{one.path}'" for one in wrong)
        return FAILURE, f"damaged, or another file: {told}", f"instaflow weights {wrong[0].weights.name} tells more"
    present = [one.weights.name for one in known if one.state == "present"]
    return OK, f"{', '.join(present) or 'none'} of {', '.join(weights.WEIGHTS)} here (`instaflow weights` tells more)"
