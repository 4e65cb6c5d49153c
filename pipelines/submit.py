"""An experiment as a chain of Slurm jobs: a script for each stage, kept in RUN/jobs, each after those it builds on.

RUN/jobs/experiment.yaml   the experiment with every default, as the jobs run it, whatever becomes of its file
RUN/jobs/STAGE.sh          the stage's script, which a person may edit and submit by hand
RUN/jobs/STAGE-JOB.log     what its job printed; of an array's jobs STAGE-JOB_TASK.log
RUN/jobs/jobs.json         the stages in order, with the numbers of their jobs
RUN/jobs/written.json      the scripts' hashes as they were written: another one was edited, and stays
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from instaflow.cluster import TIME, Cluster, resources_of, seconds_of
from instaflow.config import Experiment, load_profile
from instaflow.errors import ConfigError, InstaFlowError
from instaflow.files import sha256_of, write_file, write_json
from instaflow.jobs import FOLDER, Submitted, write_jobs
from instaflow.plurals import counted
from instaflow.rundir import locked, read_json, stage_folders
from instaflow.sections import share_of
from instaflow.stages import TrainingStage
from pipelines import submit_here
from pipelines.batch_scripts import Job, script, script_here
from pipelines.experiment import check_files, tell_results


def run(experiment: Experiment, profile: str | None, backend: str, *, dry_run: bool, write: bool) -> None:
    """Submit the stages that are not done, or only print their scripts, or only write them.

    backend: "slurm", or "local", which runs them on this machine. Raises InstaFlowError where a stage can't run so,
    Slurm refuses, or the run is worked on: by jobs of an earlier submission, or by a command.
    """
    is_here = backend == "local"
    layers = [*([load_profile(profile, experiment.stages)] if profile else []), experiment.cluster]
    jobs = jobs_of(experiment, [*layers, submit_here.ONE_NODE] if is_here else layers)
    check_files(experiment, None, None)
    folder = Path(experiment.run).absolute() / FOLDER
    written = script_here if is_here else script
    scripts = {folder / f"{name}.sh": written(job, folder, experiment) for name, job in jobs.items()}
    if done := [name for name in experiment.stages if name not in jobs]:
        print(f"{'# ' if dry_run else ''}Done before: {', '.join(done)}")
    if dry_run:
        for path, text in scripts.items():
            print(f"# --- {path.stem if is_here else path}\n{text}")
    elif jobs:
        has_slurm = shutil.which("sbatch") is not None
        if not (has_slurm or write or is_here):
            hint = (
                "Type this where jobs are submitted to the cluster, or add --backend local to run them on this machine"
            )
            raise InstaFlowError("There is no Slurm here: no program 'sbatch'", hint)
        with alone(folder):
            if has_slurm:
                refuse_beside_live_jobs(folder, jobs_of_slurm(needed=not is_here))
            refuse_beside_live_commands(jobs)
            saved = replace(experiment, cluster=Cluster(), run=str(folder.parent))
            write_file(folder / "experiment.yaml", saved.resolved())
            if write or is_here:
                write_jobs(folder, {name: Submitted(experiment.stage_parents(name)) for name in experiment.stages})
            if is_here:
                again = ["instaflow", "submit", *experiment.arguments(), *(["--profile", profile] if profile else [])]
                by_name = {path.stem: text for path, text in scripts.items()}
                submit_here.run(jobs, by_name, folder, [*again, "--backend", backend])
                tell_results(stage_folders(experiment))
                return
            write_scripts(folder, scripts)
            if write:
                print(f"Written, and not submitted: {', '.join(map(str, scripts))}; each says how it is, by hand")
            else:
                submit(experiment, jobs, folder)
                warn_of_limits(jobs)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let no other command submit this run meanwhile. Raises InstaFlowError where one does."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except InstaFlowError as error:
            _, _, holder = error.message.rpartition(" by ")
            said = f"'{folder.parent}' is being submitted by {holder}"
            raise InstaFlowError(said, "Wait for it; `instaflow status` tells then what was submitted") from error
        yield


def write_scripts(folder: Path, scripts: dict[Path, str]) -> None:
    """Write the scripts, but for those that a person has changed since they were written."""
    file = folder / "written.json"
    written = read_json(file) if file.is_file() else {}
    for path, text in scripts.items():
        is_edited = path.is_file() and written.get(path.name) != sha256_of(path)
        if is_edited and path.read_text(encoding="utf-8") != text:
            print(f"Kept, for it was edited: {path}; to have it written anew, delete it")
        else:
            write_file(path, text)
            written[path.name] = sha256_of(path)
    write_json(file, written)


def jobs_of(experiment: Experiment, layers: Sequence[Cluster]) -> dict[str, Job]:
    """A job for each stage that is not done, in order; one that is made anew for other settings is not done.

    Raises ConfigError where a stage can't run as one, and where `instaflow run` would refuse to go on with it.
    """
    if FOLDER in experiment.stages:
        raise ConfigError(f"'stages.{FOLDER}': the jobs' own files go into a folder of that name", "Call it otherwise")
    jobs = {}
    for name, stage in stage_folders(experiment).items():
        stage.check_identity()
        if stage.is_done() and not (stage.stage.remade and stage.changes()):
            continue
        asked = resources_of(name, stage.stage.kind, layers)
        if asked.time and seconds_of(asked.time) <= asked.notice:
            raise ConfigError(
                f"Stage '{name}' has a time of {asked.time}, and a notice of {asked.notice} s before its end",
                "Ask for more time, or for a shorter notice",
            )
        if isinstance(stage.stage, TrainingStage):
            for key in ("autoencoder_phases", "text_phases", "phases", "perceptual_phases"):
                for index, phase in enumerate(getattr(stage.stage, key, None) or ()):
                    share_of(phase, stage.stage.micro_batch_size, asked.tasks, f"stages.{name}.{key}.{index}")
        jobs[name] = Job(stage, asked, experiment.stage_parents(name))
    return jobs


# --- Slurm ------------------------------------------------------------------------------------------------------------


def submit(experiment: Experiment, jobs: dict[str, Job], folder: Path) -> None:
    """Submit the scripts, all or none. Raises InstaFlowError with Slurm's own words."""
    submitted = {name: Submitted(experiment.stage_parents(name)) for name in experiment.stages}
    for name, job in jobs.items():
        parents = [number for parent in job.after if (number := submitted[parent].job)]
        after = [f"--dependency=afterok:{':'.join(parents)}"] if parents else []
        try:
            said = slurm("sbatch", "--parsable", *after, str(folder / f"{name}.sh"))
        except (InstaFlowError, KeyboardInterrupt) as error:
            if numbers := [entry.job for entry in submitted.values() if entry.job]:
                slurm("scancel", *numbers)
                (folder / "jobs.json").unlink()
            if isinstance(error, KeyboardInterrupt):
                raise
            error.message = f"Stage '{name}' was not submitted: {error.message}"
            error.hint = "No stage is: change what the experiment's `cluster` or the profile asks for"
            if "(gres)" in error.message:
                error.hint += f"; no node has its {counted(job.asked.gpus, 'GPU')}, and `gpus: 0` asks for none"
            raise
        submitted[name] = replace(submitted[name], job=said.strip().partition(";")[0])
        write_jobs(folder, submitted)
        waits = f", after {' and '.join(parents)}" if parents else ""
        array = f", an array of {job.array}" if job.array > 1 else ""
        print(f"{name}: job {submitted[name].job}{array}{waits}")
    print(f"To see how it goes: {shlex.join(['instaflow', 'status', experiment.run])}")


def jobs_of_slurm(*, needed: bool) -> list[str]:
    """Number, state and script of each job that waits or runs. Raises InstaFlowError if that is needed and not told."""
    try:
        return slurm("squeue", "--noheader", "--array", "--format=%F|%T|%o", "--sort=i").splitlines()
    except InstaFlowError:  # its programs are here, and no cluster
        if needed:
            raise
        return []


def refuse_beside_live_jobs(folder: Path, listed: list[str]) -> None:
    """Raises InstaFlowError if jobs of this run wait or run, also such as were submitted by hand, and says which."""
    live: dict[str, list[str]] = {}
    stages: dict[str, str] = {}
    for number, state, place in (line.strip().split("|", 2) for line in listed if line.count("|") > 1):
        path = Path(place)
        if path.suffix == ".sh" and path.parent.resolve() == folder.resolve():
            stages[number] = path.stem
            live.setdefault(number, []).append(state.lower())
    if live:
        told = [f"'{stages[number]}' (job {number}: {', '.join(how_many(states))})" for number, states in live.items()]
        raise InstaFlowError(
            f"'{folder.parent}' was submitted before, and has live jobs: {'; '.join(told)}",
            f"Wait for them, or cancel them: scancel {' '.join(live)}",
        )


def refuse_beside_live_commands(jobs: dict[str, Job]) -> None:
    """Raises InstaFlowError if a command works on a stage that is to be submitted, and says which."""
    for job in jobs.values():
        if (job.stage.folder / ".lock").is_file():
            with locked(job.stage.folder):
                pass


def warn_of_limits(jobs: dict[str, Job]) -> None:
    """Say which jobs would wait for ever: Slurm takes what asks for more than its partition has, nodes that are down
    included. What a quality of service allows, or a script that was edited, is not known here, so none is refused."""
    limits, listed = {}, ""
    with suppress(InstaFlowError):  # what is submitted, is
        listed = slurm("sinfo", "--noheader", "--format=%P|%l|%D")
    for partition, time, count in (line.strip().split("|") for line in listed.splitlines() if line.count("|") == 2):
        limits[partition.rstrip("*")] = limits["*" if partition.endswith("*") else partition] = time, int(count)
    for name, job in jobs.items():
        time, nodes = limits.get(job.asked.partition or "*", ("infinite", job.asked.nodes))
        beyond = []
        if job.asked.nodes > nodes:
            beyond.append(f"{counted(job.asked.nodes, 'node')}, of which there {'is' if nodes == 1 else 'are'} {nodes}")
        if job.asked.time and re.fullmatch(TIME, time) and seconds_of(job.asked.time) > seconds_of(time):
            beyond.append(f"a time of {job.asked.time}, of which {time} is allowed")
        if beyond:
            print(f"{name}: asks its partition for {' and '.join(beyond)}; it may wait for ever, as `squeue` will tell")


def how_many(states: list[str]) -> list[str]:
    """running; of several 3 running, 5 pending."""
    return [state if len(states) == 1 else f"{states.count(state)} {state}" for state in dict.fromkeys(states)]


def slurm(*words: str) -> str:
    """What a command of Slurm's prints. Raises InstaFlowError with what it says where it fails."""
    # Inside a job, its variables would be taken for wishes.
    own = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=own)
    except FileNotFoundError as error:
        raise InstaFlowError(f"There is no program '{words[0]}'", "Type this where Slurm's commands are") from error
    if done.returncode:
        said = done.stderr.strip().replace("\n", "; ") or f"exit code {done.returncode}"
        raise InstaFlowError(f"{words[0]} failed: {said}", "Is Slurm up? `sinfo` tells")
    return done.stdout
