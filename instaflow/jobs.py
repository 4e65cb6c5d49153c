"""The jobs of a run that was submitted to a cluster, as the files in RUN/jobs tell."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from instaflow.files import write_json
from instaflow.rundir import read_json

FOLDER = "jobs"
STARTS = "Job {} starts on {}"
ENDS = "Job {} ends with exit code {}"
"""The first and the last line of a job's turn in its log."""
TAIL = 1 << 16  # bytes of a log that are looked at
TIMED_OUT = 124
"""What counts as the exit code of a turn that Slurm ended at the time limit, as of one that `timeout` does."""
AGAIN = (75, 138)
"""Exit codes after which a job is queued again: told to stop, and saved; or told so before it could listen."""


@dataclass(frozen=True)
class Submitted:
    """A stage of a run that was submitted."""

    after: list[str]
    """The stages that it builds on."""
    job: str | None = None
    """Its job's number; None if it was done before."""


@dataclass(frozen=True)
class Turn:
    """The last time that a job of a stage's ran."""

    exit_code: int | None
    """None as long as it runs, and if it was killed."""
    is_cancelled: bool
    """Whether Slurm ended it, to requeue it or for good."""
    reason: str
    """Where it failed: the error that it printed, in one line."""
    written: float
    """When its log was written to."""


def write_jobs(folder: Path, stages: Mapping[str, Submitted]) -> None:
    write_json(folder / "jobs.json", {name: asdict(stage) for name, stage in stages.items()})


def read_jobs(folder: Path) -> dict[str, Submitted]:
    """The stages of the last submission, in order; none where there was none."""
    file = folder / "jobs.json"
    return {name: Submitted(**entry) for name, entry in read_json(file).items()} if file.is_file() else {}


def turns(folder: Path, name: str, job: str) -> list[Turn]:
    """The last turn of each job that a stage's `job` consists of, as far as they have begun."""
    log = re.compile(rf"{re.escape(name)}-{re.escape(job)}(_\d+)?\.log")
    return [turn_of(path) for path in sorted(folder.iterdir()) if log.fullmatch(path.name)]


def turn_of(log: Path) -> Turn:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    start = re.compile(STARTS.format(r"\d+", ".*"))
    first = max((place for place, line in enumerate(lines) if start.fullmatch(line)), default=0)
    exit_code, is_cancelled, said = None, False, []
    for line in filter(None, lines[first:]):
        if end := re.fullmatch(ENDS.format(r"\d+", r"(\d+)"), line):
            exit_code = int(end[1])
        elif re.search(r"\*\*\* JOB \d+ ON .* CANCELLED AT ", line):
            is_cancelled = True
            if "DUE TO TIME LIMIT" in line:
                exit_code = exit_code or TIMED_OUT
                said.append("Error: the job came to its time limit before the stage had saved")
        elif not line.startswith(("srun: ", "slurmstepd")) or "oom" in line:
            said.append(line)
    errors = [line.removeprefix("Error: ") for line in said if line.startswith("Error: ")]
    reason = (errors or said or [""])[-1]
    return Turn(exit_code, is_cancelled, reason, log.stat().st_mtime)
