"""The jobs of a run that was submitted to a cluster, as the files in RUN/jobs tell."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from instaflow.errors import DataError
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
ESCAPES = r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)?"
"""Colours and titles for a terminal."""
CHATTER = (
    r"srun: (?!unrecognized|invalid|fatal|error: (Unable|Invalid|Task launch))"
    r"|slurmstepd.*\*\*\*"
    r'|Try "srun --help"'
)
"""What Slurm prints besides, which gives no reason: above all that a task has ended."""


@dataclass(frozen=True)
class Submitted:
    """A stage of a run that was submitted."""

    after: list[str]
    """The stages that it builds on."""
    job: str | None = None
    """Its job's number; None if it was done before, or is to be submitted by hand."""


@dataclass(frozen=True)
class Turn:
    """The last time that a job of a stage's ran."""

    exit_code: int | None
    """None as long as it runs, and if it was killed."""
    stopped: str
    """Where Slurm ended it: interrupted, to be queued again, or for good, cancelled or failed; else ""."""
    reason: str
    """Where it failed: the error that it printed, in one line."""
    hint: str
    """What that error says is to be done, if it does."""
    written: float
    """When its log was written to."""


def write_jobs(folder: Path, stages: Mapping[str, Submitted]) -> None:
    write_json(folder / "jobs.json", {name: asdict(stage) for name, stage in stages.items()})


def read_jobs(folder: Path) -> dict[str, Submitted]:
    """The stages of the last submission, in order; none where there was none."""
    file = folder / "jobs.json"
    try:
        return {name: Submitted(**entry) for name, entry in read_json(file).items()} if file.is_file() else {}
    except TypeError as error:
        raise DataError(f"'{file}' is damaged: {error}", "Delete it, and submit what is not done anew") from error


def latest(folder: Path, name: str, job: str | None) -> str | None:
    """The number of a stage's last job: the one that was submitted, or, by its log, one submitted by hand later.

    Times decide, for Slurm can begin anew with its numbers.
    """
    written = {job: (folder / "jobs.json").stat().st_mtime} if job else {}
    for path in folder.iterdir():
        if log := re.fullmatch(rf"{re.escape(name)}-(\d+)(_\d+)?\.log", path.name):
            written[log[1]] = max(written.get(log[1], 0.0), path.stat().st_mtime)
    return max(written, key=lambda number: written[number], default=None)


def turns(folder: Path, name: str, job: str) -> list[Turn]:
    """The last turn of each job that a stage's `job` consists of, as far as they have begun."""
    log = re.compile(rf"{re.escape(name)}-{re.escape(job)}(_\d+)?\.log")
    return [turn_of(path) for path in sorted(folder.iterdir()) if log.fullmatch(path.name)]


def turn_of(log: Path) -> Turn:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        text = re.sub(ESCAPES, "", file.read().decode(errors="replace"))
    lines = ["".join(filter(str.isprintable, line)).strip() for line in text.splitlines()]
    start = re.compile(STARTS.format(r"\d+", ".*"))
    starts = [place for place, line in enumerate(lines) if start.fullmatch(line)]
    exit_code, stopped, said = None, "", []
    for line in filter(None, lines[starts[-1] + 1 if starts else 0 :]):
        if end := re.fullmatch(ENDS.format(r"\d+", r"(\d+)"), line):
            exit_code = exit_code if stopped else int(end[1])  # what Slurm ends, ends with no code of its own
        elif why := re.search(r"\*\*\* JOB \d+ ON .* CANCELLED AT \S+(.*) \*\*\*", line):
            stopped = stopped or ("interrupted" if why[1] else "cancelled")
            if why[1] == " DUE TO TIME LIMIT":
                exit_code = exit_code or TIMED_OUT
                said.append("Error: the job came to its time limit before the stage had saved")
        elif re.search(r"\*\*\* \S+ \S+ ON .* FAILED ", line):
            exit_code, stopped = exit_code or 1, stopped or "failed"
            said.append("Error: the batch script was killed, or ended before its tasks did")
        elif line.startswith("srun: error: Node failure on "):  # after which srun exits with 0
            stopped = stopped or "interrupted"
        elif not re.match(CHATTER, line):
            said.append(line)
    errors = [place for place, line in enumerate(said) if line.startswith("Error: ")]
    hint = ""
    if errors:  # the first task to fail tells why, the others what became of it
        reason = said[errors[0]].removeprefix("Error: ")
        hint = next((line for line in said[errors[0] + 1 :][:1] if line.startswith("Hint: ")), "")
    else:
        reason = said[-1] if said else f"it ended with exit code {exit_code}, and nothing was printed"
    return Turn(exit_code, stopped, reason, hint.removeprefix("Hint: "), log.stat().st_mtime)
