"""An experiment as a chain of Slurm jobs: a script for each stage, kept in RUN/jobs, each after those it builds on.

RUN/jobs/experiment.yaml   the experiment with every default, as the jobs run it, whatever becomes of its file
RUN/jobs/STAGE.sh          the stage's script, which a person may edit and submit by hand
RUN/jobs/STAGE-JOB.log     what its job printed; of an array's jobs STAGE-JOB_TASK.log
RUN/jobs/jobs.json         the stages in order, with the numbers of their jobs
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from instaflow.cluster import Cluster, Resources, resources_of, seconds_of
from instaflow.config import Experiment, load_profile
from instaflow.errors import ConfigError, InstaFlowError
from instaflow.files import write_file
from instaflow.jobs import ENDS, FOLDER, STARTS, Submitted, write_jobs
from instaflow.plurals import counted
from instaflow.rundir import StageFolder, locked, stage_folders
from instaflow.sections import share_of
from instaflow.stages import CoupleStage, TrainingStage
from pipelines.experiment import check_files

LINGER = 60  # seconds that the tasks of a training have to end when the first one has, in failure too


@dataclass(frozen=True)
class Job:
    """A stage that is not done, and what it asks for."""

    stage: StageFolder
    asked: Resources
    after: list[str]
    """The stages that it builds on."""

    @property
    def array(self) -> int:
        """How many jobs share its work, no more than it has shards; 1 for no array."""
        settings = self.stage.stage
        if not isinstance(settings, CoupleStage):
            return 1
        return min(self.asked.array, -(-settings.count // settings.records_per_shard))


def run(experiment: Experiment, profile: str | None, *, dry_run: bool) -> None:
    """Submit the stages that are not done, or only print their scripts.

    Raises InstaFlowError where one can't run so, Slurm refuses, or jobs of an earlier submission are live.
    """
    layers = [*([load_profile(profile, experiment.stages)] if profile else []), experiment.cluster]
    jobs = jobs_of(experiment, layers)
    check_files(experiment, None, None)
    folder = Path(experiment.run).absolute() / FOLDER
    scripts = {folder / f"{name}.sh": script(job, folder, experiment) for name, job in jobs.items()}
    if done := [name for name in experiment.stages if name not in jobs]:
        print(f"{'# ' if dry_run else ''}Done before: {', '.join(done)}")
    if dry_run:
        for path, text in scripts.items():
            print(f"# --- {path}\n{text}")
    elif jobs:
        if shutil.which("sbatch") is None:
            hint = "Type this where jobs are submitted to the cluster; `instaflow run` runs all stages here"
            raise InstaFlowError("There is no Slurm here: no program 'sbatch'", hint)
        with locked(folder):
            refuse_beside_live_jobs(folder)
            saved = replace(experiment, cluster=Cluster(), run=str(folder.parent))
            write_file(folder / "experiment.yaml", saved.resolved())
            for path, text in scripts.items():
                write_file(path, text)
            submit(experiment, jobs, folder)


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


# --- scripts ----------------------------------------------------------------------------------------------------------


def script(job: Job, folder: Path, experiment: Experiment) -> str:
    """A stage's batch script, which goes on in a further turn of its job where the first one was too short."""
    name, asked = job.stage.name, job.asked
    log, array = str(folder / name).replace("%", "%%"), "-%j"
    if job.array > 1:
        array = "-%A_%a"
    options = [
        f"--job-name={quoted(job_name(folder, name))}",
        f"--chdir={quoted(str(Path.cwd()))}",
        f"--output={quoted(f'{log}{array}.log')}",
        "--open-mode=append",
        *([f"--array=0-{job.array - 1}"] if job.array > 1 else []),
        *(f"--{key}={value}" for key in ("partition", "account", "qos") if (value := getattr(asked, key))),
        f"--nodes={asked.nodes}",
        f"--ntasks-per-node={asked.tasks_per_node}",
        *([f"--gpus-per-node={asked.gpus}"] if asked.gpus else []),
        *([f"--cpus-per-task={asked.cpus}"] if asked.cpus else []),
        *([f"--mem={asked.memory}"] if asked.memory else []),
        *([f"--time={asked.time}"] if asked.time else []),
        f"--signal=USR1@{asked.notice}",
        "--requeue",
        *(["--kill-on-invalid-dep=yes"] if job.after else []),
    ]
    after = "--dependency=afterok:JOB[:JOB...] " if job.after else ""
    of = f", after {' and '.join(job.after)}" if job.after else ""
    me = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.array > 1 else "$SLURM_JOB_ID"
    lines = [
        "#!/bin/bash",
        f"# Stage '{name}' of {one_line(experiment.source)}{of}. Written by `instaflow submit`; to submit it by hand:",
        f"#   sbatch {after}{shlex.quote(str(folder / f'{name}.sh'))}",
        *(f"#SBATCH {option}" for option in options),
        *asked.lines,
        *([f"module load {shlex.join(asked.modules)}"] if asked.modules else []),
        *(f"export {key}={shlex.quote(value)}" for key, value in asked.environment.items()),
        "",
        f'echo "{STARTS.format("$SLURM_JOB_ID", "$SLURM_JOB_NODELIST")}"',
        " \\\n    ".join(
            shlex.join(words) for words in (srun(job), contained(job, folder), command(job, folder)) if words
        ),
        "code=$?",
        f'echo "{ENDS.format("$SLURM_JOB_ID", "$code")}"',
        "if [ $code = 75 ] || [ $code = 138 ]; then  # told to stop, and saved; or told before it could listen",
        f"    scontrol requeue {me}",
        "fi",
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def job_name(folder: Path, name: str) -> str:
    return one_line(f"{folder.parent.name}-{name}")


def one_line(text: str) -> str:
    return text.replace("\n", " ")


def quoted(text: str) -> str:
    """A value as an #SBATCH line takes it."""
    if not text.isprintable():
        raise ConfigError(f"{text!r} cannot stand in a batch script", "Choose a folder with a plainer name")
    return text if shlex.quote(text) == text else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def srun(job: Job) -> list[str]:
    """What starts a task for each GPU, all of which hear Slurm's signals.

    Those of a training end together, so when one has failed the others are not waited for; those of a couple stage
    end each in its own time. A task that is told to stop ends before others that still save: none is killed for that.
    """
    asked, is_shared = job.asked, isinstance(job.stage.stage, CoupleStage)
    return [
        "srun",
        "--kill-on-bad-exit=0",
        f"--wait={0 if is_shared else LINGER}",
        *([f"--cpus-per-task={asked.cpus}"] if asked.cpus else []),
        *(["--gpus-per-task=1"] if is_shared and asked.gpus > 1 else []),
    ]


def contained(job: Job, folder: Path) -> list[str]:
    """What puts a task into its container, with the folders that it is called in and works on."""
    image = job.asked.container
    if image is None:
        return []
    places = [*dict.fromkeys([str(Path.cwd()), str(folder.parent), *job.asked.mounts])]
    if not image.endswith(".sif"):
        mounts = ",".join(place if ":" in place else f"{place}:{place}" for place in places)
        return [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={Path.cwd()}"]
    gpus = ["--nv"] if job.asked.gpus else []
    return ["apptainer", "exec", *gpus, f"--bind={','.join(places)}", f"--pwd={Path.cwd()}", image]


def command(job: Job, folder: Path) -> list[str]:
    """The stage's own command: of this environment, or of the container's."""
    program = Path(sys.executable).with_name("instaflow")
    here = [str(program)] if program.is_file() else [sys.executable, "-m", "cli"]
    instaflow = ["instaflow"] if job.asked.container else here
    return [*instaflow, job.stage.stage.kind, str(folder / "experiment.yaml"), "--stage", job.stage.name]


# --- Slurm ------------------------------------------------------------------------------------------------------------


def submit(experiment: Experiment, jobs: dict[str, Job], folder: Path) -> None:
    """Submit the scripts, all or none. Raises InstaFlowError with Slurm's own words."""
    submitted = {name: Submitted(experiment.stage_parents(name)) for name in experiment.stages}
    for name, job in jobs.items():
        parents = [number for parent in job.after if (number := submitted[parent].job)]
        after = [f"--dependency=afterok:{':'.join(parents)}"] if parents else []
        try:
            said = slurm("sbatch", "--parsable", *after, str(folder / f"{name}.sh"))
        except InstaFlowError as error:
            if numbers := [entry.job for entry in submitted.values() if entry.job]:
                slurm("scancel", *numbers)
                (folder / "jobs.json").unlink()
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


def refuse_beside_live_jobs(folder: Path) -> None:
    """Raises InstaFlowError if jobs of this run wait or run, also such as were submitted by hand, and says which."""
    live: dict[str, list[str]] = {}
    stages: dict[str, str] = {}
    for line in slurm("squeue", "--noheader", "--array", "--format=%F|%T|%o", "--sort=i").splitlines():
        number, state, script = line.strip().split("|", 2)
        path = Path(script)
        if path.suffix == ".sh" and path.parent.resolve() == folder.resolve():
            stages[number] = path.stem
            live.setdefault(number, []).append(state.lower())
    if live:
        told = [f"'{stages[number]}' (job {number}: {', '.join(how_many(states))})" for number, states in live.items()]
        raise InstaFlowError(
            f"'{folder.parent}' was submitted before, and has live jobs: {'; '.join(told)}",
            f"Wait for them, or cancel them: scancel {' '.join(live)}",
        )


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
