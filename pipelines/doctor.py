"""The doctor: what bites on clusters, tried on one machine, or on all nodes of an `srun`, before a run meets it."""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from instaflow.config import Experiment, find_config, load_experiment
from instaflow.errors import ConfigError, InstaFlowError, reason_of
from instaflow.files import remove_leftovers, temporary_name
from instaflow.interruption import ending
from instaflow.jobs import FOLDER
from instaflow.meeting import Facts, Meeting, check_alike, check_folder, facts, host
from instaflow.plurals import counted
from instaflow.rundir import locked
from instaflow.world import World, world
from pipelines import doctor_files as files
from pipelines import doctor_machine as machine
from pipelines.doctor_table import FAILURE, OK, WARNING, Finding, found, merged

TRIAL = "doctor"
"""What the folder is called in which something is tried, but for who does it."""

Look = Callable[[], tuple[str, ...]]


def run(place: str) -> tuple[list[Finding], int]:
    """What is found, and the exit code: 1 where something fails, else 0.

    place: a run's folder or one that runs go to, there yet or not; or an experiment. Under `srun` each process looks
    at its own machine, and the first one has all findings; the others have none.
    """
    experiment, folder = asked(place)
    me = world()
    with ending():
        findings = on_this_machine(experiment, folder) if me.local_rank == 0 else []
        if me.size > 1:
            try:
                findings = on_all(findings, folder, me)
            except InstaFlowError as error:  # nobody is reached: each tells its own
                findings += [Finding("nodes", FAILURE, error.message, error.hint)]
    return findings, int(any(one.state == FAILURE for one in findings))


def asked(place: str) -> tuple[Experiment | None, Path]:
    """The experiment, if one is known, and the folder of its run. Raises ConfigError."""
    folder = Path(place)
    if folder.is_dir():
        submitted = folder / FOLDER / "experiment.yaml"
        return load_experiment(str(submitted)) if submitted.is_file() else None, folder
    try:
        find_config(place)
    except ConfigError:
        if folder.suffix in (".yaml", ".yml"):
            raise
        return None, folder
    experiment = load_experiment(place)
    return experiment, Path(experiment.run)


def on_this_machine(experiment: Experiment | None, folder: Path) -> list[Finding]:
    looks: dict[str, Look] = {
        "packages": machine.packages,
        "PyTorch": machine.pytorch,
        "gloo": machine.gloo,
        "NCCL": machine.nccl,
        "compiler": machine.compiler,
        "network": machine.network,
        "limits": machine.limits,
        "Slurm": machine.slurm,
        "models": partial(machine.models, experiment),
        "weights": machine.measures,
    }
    if experiment:
        looks["files"] = partial(machine.files_of, experiment)
    findings = [found(check, look) for check, look in looks.items()]
    trial = there(folder) / TRIAL
    with suppress(OSError):  # another user's may not be removed
        remove_leftovers(trial)
    own = trial.with_name(temporary_name(TRIAL))
    looks = {
        "renames": partial(files.renames, own),
        "locks": partial(files.locks, own),
        "clock": partial(files.clock, own),
        "disk": partial(files.rate, own),
        "room": partial(room, own, experiment, folder),
    }
    try:
        own.mkdir()
        return [*findings, *(found(check, look) for check, look in looks.items())]
    except OSError as error:
        return [*findings, Finding("folder", FAILURE, reason_of(error), "Choose a folder that you may write to")]
    finally:
        shutil.rmtree(own, ignore_errors=True)


def there(folder: Path) -> Path:
    """The folder, or as long as it isn't there, the nearest one that holds it."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def room(own: Path, experiment: Experiment | None, folder: Path) -> tuple[str, ...]:
    return files.room(own, bytes_of(experiment, folder) if experiment else None)


def bytes_of(experiment: Experiment, folder: Path) -> float | None:
    """What an experiment will take on the disk by its plan, besides what is there; None where a model's networks are
    not known."""
    from pipelines.plan import Plan

    try:
        plan = Plan(experiment, gpus=1)
        costs = [plan.cost_of(name) for name in experiment.stages]
    except InstaFlowError:
        return None
    return max(0, sum(cost.disk for cost in costs) - written(folder)) + max(cost.while_saving for cost in costs)


def written(folder: Path) -> int:
    """The bytes of a run's files, some of which may go while they are counted."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(place, name).stat().st_size
    return total


# --- several machines -------------------------------------------------------------------------------------------------


def on_all(findings: list[Finding], folder: Path, me: World) -> list[Finding]:
    """All machines' findings, and those of all processes together, for the first one; none for the others."""
    meeting = Meeting(me.rank, me.size)
    told = meeting.gather([host(), [asdict(one) for one in findings], asdict(facts()), str(there(folder))])
    clocks = meeting.gather(time.time())
    hosts: dict[str, list[Finding]] = {}
    for name, own, *_ in told:
        if own:
            hosts.setdefault(name, [Finding(**one) for one in own])
    everybody, place = [Facts(**one) for *_, one, _ in told], Path(told[0][3])
    looks: dict[str, Look] = {
        "nodes: versions": partial(alike, everybody),
        "nodes: clocks": partial(one_clock, [one.host for one in everybody], clocks),
        "nodes: folder": partial(one_folder, place, meeting),
        "nodes: locks": partial(one_lock, place, meeting),
        "nodes: gloo": partial(connected, "gloo", meeting),
    }
    if all(one.computes_on == "a GPU" for one in everybody):
        looks["nodes: NCCL"] = partial(connected, "nccl", meeting)
    together = [found(check, look) for check, look in looks.items()]
    meeting.gather(None)  # the first one keeps what the others read
    return [*merged(hosts), *together] if me.leads else []


def alike(everybody: list[Facts]) -> tuple[str, ...]:
    check_alike(everybody)
    count = len({one.host for one in everybody})
    return OK, f"{counted(count, 'machine')} with {len(everybody)} processes run the same"


def one_clock(hosts: list[str], clocks: list[float]) -> tuple[str, ...]:
    """The clocks of all machines, read at the same moment or nearly so."""
    apart = max(clocks) - min(clocks)
    if apart < files.APART:
        return OK, f"within {apart:.1f} s"
    late, early = hosts[clocks.index(min(clocks))], hosts[clocks.index(max(clocks))]
    return WARNING, f"'{early}' is {apart:,.0f} s ahead of '{late}'", "Have all set by one server (NTP)"


def one_folder(place: Path, meeting: Meeting) -> tuple[str, ...]:
    check_folder(place, meeting.gather, leads=meeting.rank == 0)
    return OK, f"what the first one writes into '{place}' is seen by all"


def one_lock(place: Path, meeting: Meeting) -> tuple[str, ...]:
    """Whether a lock that the first process holds keeps those of other machines out."""
    stage = place / meeting.gather(temporary_name(TRIAL))[0]
    try:
        with locked(stage) if meeting.rank == 0 else nullcontext():
            meeting.gather(None)
            is_free = meeting.rank > 0 and files.is_free(stage) if place.is_dir() else None
            free = meeting.gather([host(), is_free])
    finally:
        if meeting.rank == 0:
            shutil.rmtree(stage, ignore_errors=True)
    if broken := [name for name, is_free in free if is_free]:
        return (
            FAILURE,
            f"a lock that '{free[0][0]}' holds does not keep '{broken[0]}' out",
            "Mount the file system with locks for all nodes (Lustre: -o flock, not localflock; NFS: without nolock): "
            "two commands could work on one stage at once",
        )
    if blind := [name for name, is_free in free if is_free is None]:
        return WARNING, f"not tried: '{blind[0]}' has no folder '{place}'", "Let all nodes see the run's folder"
    return OK, "a lock of the first one's keeps all others out"


def connected(backend: str, meeting: Meeting) -> tuple[str, ...]:
    """A sum over all processes, as a training forms it, in processes of its own: one that hangs is given up."""
    (port,) = (one["MASTER_PORT"] for one in machine.here(1))
    variables = {"RANK": str(meeting.rank), "MASTER_PORT": meeting.gather(port)[0], "OMP_NUM_THREADS": "1"}
    tried = meeting.gather([host(), machine.all_reduce(backend, [variables])])
    failed = [(name, said) for name, said in tried if isinstance(said, str)]
    if failed:
        return machine.reached(backend, f"'{failed[0][0]}'", failed[0][1])
    return machine.reached(backend, f"all {meeting.size} processes", max(said for _, said in tried))
