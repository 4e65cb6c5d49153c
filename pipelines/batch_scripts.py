"""A stage's batch script: what Slurm is asked for, the stage's own command, and whether its job is queued again."""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from instaflow.cluster import Resources
from instaflow.config import Experiment
from instaflow.errors import ConfigError
from instaflow.jobs import ENDS, STARTS
from instaflow.rundir import StageFolder
from instaflow.stages import CoupleStage, EvaluateStage

DIRECTIVE = "#SBATCH"
SIF = ".sif"
LINGER = 60  # seconds that the tasks of a training have to end when the first one has, in failure too
KEPT = r"-path '*/shards/*.json' -o -path '*/checkpoints/*/state.json' -o -name '*.observed'"
"""What `find` finds: a couple stage's shards, a training's checkpoints, an evaluation's batches."""
IDLE = 3
"""Turns of a job in a row that may keep nothing, before it is no longer queued again."""


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


def script(job: Job, folder: Path, experiment: Experiment) -> str:
    """A stage's batch script, which goes on in a further turn of its job where the first one was too short."""
    name, asked = job.stage.name, job.asked
    log, array = str(folder / name), job.array > 1
    options = [
        f"--job-name={quoted(job_name(folder, name))}",
        f"--chdir={quoted(str(Path.cwd()))}",
        f"--output={quoted(log.replace('%', '%%') + ('-%A_%a.log' if array else '-%j.log'))}",
        "--open-mode=append",
        *([f"--array=0-{job.array - 1}"] if array else []),
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
    depends = "--dependency=afterok:JOB[:JOB...] " if job.after else ""
    me = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if array else '"$SLURM_JOB_ID"'
    lines = [
        "#!/bin/bash",
        f"# Stage '{name}' of {one_line(experiment.source)}{after(job)}. Written by `instaflow submit`; "
        "to submit it by hand:",
        f"#   sbatch {depends}{shlex.quote(str(folder / f'{name}.sh'))}",
        *(f"#SBATCH {option}" for option in options),
        *(line for line in asked.lines if line.startswith(DIRECTIVE)),  # which Slurm reads before commands alone
        "",
        "# By these two lines in the log `instaflow status` knows where a turn of the job begins, and how it ended.",
        f'end() {{ trap - EXIT; echo "{ENDS.format("$SLURM_JOB_ID", "$1")}"; }}',
        "trap 'end $?' EXIT",
        f'echo "{STARTS.format("$SLURM_JOB_ID", "$SLURM_JOB_NODELIST")}"',
        "",
        *set_up(job),
        *waiting(job),
        "code=0",
        continued([srun(job), *contained(job, folder), command(job, folder)]) + " || code=$?",
        "",
        'if [ "$code" = 75 ] || [ "$code" = 138 ]; then  # told to stop, and saved; or told before it could listen',
        "    # A sum over the names of what is kept: the same after too many turns, they are too short for anything.",
        f"    kept=$(find {shlex.quote(str(job.stage.folder.absolute()))} \\",
        f"        {KEPT} 2>/dev/null | sort | cksum) || true",
        '    again="This job is queued again, and goes on by itself; what it has kept: $kept"',
        f'    same=$(grep -csxF "$again" {shlex.quote(f"{log}-")}{me}.log) || true',
        f'    if [ "${{same:-0}}" -ge {IDLE} ]; then',
        f"        echo {shlex.quote(f'Error: {IDLE} turns of this job in a row kept nothing: each is too short')}",
        f"        echo {shlex.quote(f'Hint: Ask for a longer time{or_else(job)}')}",
        "        code=1",
        "    else",
        '        echo "$again"',
        '        end "$code"',
        f"        scontrol requeue {me} || {{",
        '            echo "Error: Slurm did not queue this job again: submit what is not done anew"',
        "            code=1",
        "            end 1",
        "        }",
        "    fi",
        "fi",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def script_here(job: Job, folder: Path, experiment: Experiment) -> str:
    """What a stage's job does on this machine, without Slurm: of several GPUs a process for each, by torchrun.

    Raises ConfigError for a container that Slurm alone can start.
    """
    name, count = job.stage.name, job.asked.tasks_per_node
    if job.asked.container and not job.asked.container.endswith(SIF):
        said = f"Stage '{name}' runs in '{job.asked.container}': such an image is started by pyxis, a part of Slurm"
        raise ConfigError(said, "Here name a .sif file, which apptainer starts, or none: --set cluster.container=null")
    lines = [
        "#!/bin/bash",
        f"# Stage '{name}' of {one_line(experiment.source)}{after(job)}, on this machine.",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        *set_up(job),
        *([f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={job.asked.notice}  # seconds to save in"] if count > 1 else []),
        "exec " + continued([*contained(job, folder), command(job, folder, count)]),
    ]
    return "\n".join(lines) + "\n"


def after(job: Job) -> str:
    return f", after {' and '.join(job.after)}" if job.after else ""


def set_up(job: Job) -> list[str]:
    """What comes before a stage's command: lines as they stand, modules, and variables."""
    asked = job.asked
    return [
        *(line for line in asked.lines if not line.startswith(DIRECTIVE)),
        *([f"module load {shlex.join(asked.modules)} || exit 1"] if asked.modules else []),
        *(f"export {key}={shlex.quote(value)}" for key, value in asked.environment.items()),
    ]


def continued(parts: list[list[str]]) -> str:
    """One command of the shell, a line for each of its parts."""
    return " \\\n    ".join(map(shlex.join, parts))


def waiting(job: Job) -> list[str]:
    """What a reader is told of srun's options."""
    shared = isinstance(job.stage.stage, CoupleStage)
    after = "--wait=0: however long they take" if shared else f"--wait={LINGER}: they have so many seconds then"
    return [
        "",
        "# --kill-on-bad-exit=0: a task that ends, told to stop or failed, ends no other that may still save;",
        f"# {after}.",
    ]


def or_else(job: Job) -> str:
    """What helps besides more time where turns are too short for anything to be kept."""
    settings = job.stage.stage
    if isinstance(settings, CoupleStage):
        return ", or make the stage anew with a smaller records_per_shard"
    return ", or a smaller batch_size" if isinstance(settings, EvaluateStage) else ", or a shorter notice"


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


def contained(job: Job, folder: Path) -> list[list[str]]:
    """What puts a task into its container, with the folders that it is called in and works on, line by line.

    Raises ConfigError for a folder that a list of mounts cannot tell.
    """
    image = job.asked.container
    if image is None:
        return []
    own = [str(Path.cwd()), str(folder.parent)]
    if unclear := next((place for place in own if re.search("[:,]", place)), None):
        message = f"'{unclear}' cannot be mounted in a container: ':' and ',' stand between mounts"
        raise ConfigError(message, "Choose a folder with a plainer name")
    places = [*dict.fromkeys([*own, *job.asked.mounts])]
    if not image.endswith(SIF):
        mounts = ",".join(place if ":" in place else f"{place}:{place}" for place in places)
        return [[f"--container-image={image}"], [f"--container-mounts={mounts}"], [f"--container-workdir={Path.cwd()}"]]
    gpus = ["--nv"] if job.asked.gpus else []
    return [["apptainer", "exec", *gpus], [f"--bind={','.join(places)}"], [f"--pwd={Path.cwd()}", image]]


def command(job: Job, folder: Path, count: int = 1) -> list[str]:
    """The stage's own command, of this environment or of the container's; by torchrun in so many processes."""
    program = Path(sys.executable).with_name("instaflow")
    if job.asked.container:
        python, instaflow = "python3", ["instaflow"]
    else:
        python = sys.executable
        instaflow = [str(program)] if program.is_file() else [python, "-m", "cli"]
    if count > 1:
        launcher = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        instaflow = [*launcher, "--no-python", *instaflow]  # by -m a cli.py of the current folder would come first
    return [*instaflow, job.stage.stage.kind, str(folder / "experiment.yaml"), "--stage", job.stage.name]
