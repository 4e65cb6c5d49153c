"""What an experiment's stages ask of a Slurm cluster: its section `cluster`, and profiles of the same form."""

import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field, PositiveInt, field_validator

from instaflow.sections import NonNegativeInt, Section

TIME = r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}"
Word = Annotated[str, Field(pattern=r"^\S+$")]
Line = Annotated[str, Field(pattern=r"^[^\n]*$")]


class Resources(Section):
    """What the jobs of a stage ask for, and what they do before the stage's command."""

    partition: Word | None = None
    """Which nodes; what is null, here and below, is left to the cluster."""
    account: Word | None = None
    """Who is charged."""
    qos: Word | None = None
    """The quality of service."""
    nodes: PositiveInt = 1
    """Of one job, each with as many tasks as GPUs: a training's work together, a couple stage's have a share each."""
    gpus: NonNegativeInt = 1
    """Of each node, one for each task; with 0 a node has one task, on its CPUs."""
    cpus: PositiveInt | None = None
    """Of each task."""
    memory: Word | None = None
    """Of each node, such as 64G."""
    time: Word | None = None
    """The limit of one job, such as 8:00:00 or 2-12:00:00. A stage may take longer: its job is then queued again."""
    notice: Annotated[int, Field(ge=1, le=65535)] = 300
    """Seconds before the limit at which a stage is told to save and to leave, so that its job is queued again."""
    array: PositiveInt = 1
    """Of a couple stage: the jobs that share its shards, in a Slurm array. Other stages have one job."""
    container: Word | None = None
    """The image that the command runs in: of a .sif file by apptainer, any other by pyxis and enroot."""
    mounts: list[Word] = []  # noqa: RUF012  (pydantic copies it)
    """Folders that the container sees besides the current one and the run's, such as /data or /data:/inside."""
    modules: list[Word] = []  # noqa: RUF012
    """What `module load` loads."""
    environment: dict[str, Line] = {}  # noqa: RUF012
    """Variables, as they stand: what the shell is to expand belongs into lines."""
    lines: list[Line] = []  # noqa: RUF012
    """What stands in the script besides, as it stands: #SBATCH lines and commands of the shell."""

    @field_validator("time")
    @classmethod
    def as_slurm_reads_it(cls, time: str | None) -> str | None:
        if time is not None and not re.fullmatch(TIME, time):
            raise ValueError(f"{time!r} is no time limit; write hours:minutes:seconds, or days-hours:minutes:seconds")
        return time

    @field_validator("environment")
    @classmethod
    def names_of_variables(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of a variable")
        return environment

    @property
    def tasks_per_node(self) -> int:
        return max(self.gpus, 1)

    @property
    def tasks(self) -> int:
        """The processes of one job."""
        return self.nodes * self.tasks_per_node


class Cluster(Resources):
    """What the jobs of `instaflow submit` ask Slurm for: a section of an experiment, or a profile, a file of its own.

    What the experiment says comes before the profile, and in each a stage's own settings before those for all.
    """

    stages: dict[str, Resources] = {}  # noqa: RUF012
    """What differs, by the name of a stage or of a kind of stages; the name comes before the kind."""


def resources_of(name: str, kind: str, layers: Iterable[Cluster]) -> Resources:
    """What one stage asks for; of the `layers` a later one comes before an earlier one.

    A setting replaces the one below it, but variables of the environment are added one by one.
    """
    found: dict[str, Any] = {}
    for layer in layers:
        for own in (layer, layer.stages.get(kind), layer.stages.get(name)):
            if own is not None:
                given = {key: getattr(own, key) for key in own.model_fields_set - {"stages"}}
                given["environment"] = {**found.get("environment", {}), **given.get("environment", {})}
                found |= given
    return Resources(**found)


def seconds_of(time: str) -> int:
    """A time limit as Slurm reads it: minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = (0, 0, 0)
    if dash or len(parts) == 3:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        minutes, seconds = (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
