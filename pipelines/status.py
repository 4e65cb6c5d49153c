"""How far a run is, as its files tell: a line for each stage, and the reason of one that failed."""

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instaflow.config import parse_stage
from instaflow.couplings.manifest import read_manifest
from instaflow.couplings.shards import shards_to_make, sidecar_path
from instaflow.errors import DataError, InstaFlowError, reason_of
from instaflow.jobs import AGAIN, FOLDER, Submitted, latest, read_jobs, turns
from instaflow.plurals import counted
from instaflow.rundir import read_done, read_json, read_stats
from instaflow.stages import CoupleStage, EvaluateStage, TrainingStage

RECENT = 20  # pieces of work that a rate is taken from
BROKEN = {"cancelled": "was cancelled", "failed": "failed"}
"""States of a stage with which the jobs that wait for it have ended."""
SILENT = 600  # seconds without a sign, after which they are told


@dataclass(frozen=True)
class Work:
    """How much of a stage is made."""

    done: int
    total: int
    unit: str
    rate: float | None
    """Units a second, lately."""
    written: float
    """When the last of it was, in seconds since 1970; 0 for nothing."""


@dataclass(frozen=True)
class Standing:
    """A line of the status."""

    name: str
    state: str
    """done, running, waiting, interrupted, cancelled, failed, damaged, or unfinished: others make what is left."""
    words: str
    reason: str = ""
    hint: str = ""
    job: str | None = None


def run(run: Path) -> tuple[list[str], int]:
    """The lines, and the exit code: 0 where all is done, 1 where a stage failed, else 75. Raises DataError."""
    submitted = read_jobs(run / FOLDER)
    begun = sorted(run.glob("*/stage.json"), key=lambda file: file.stat().st_mtime)
    others = {file.parent.name: None for file in begun if file.parent.name not in submitted}
    if not (submitted or others):
        raise DataError(f"'{run}' holds no stage of a run", "Give the folder that an experiment's `run` names")
    found: dict[str, Standing] = {}
    for name, entry in {**others, **submitted}.items():
        try:
            found[name] = standing(run, name, entry, found)
        except InstaFlowError as error:
            found[name] = Standing(name, "damaged", "", error.message, error.hint)
        except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
            reason = f"Its files don't hold what they should: {type(error).__name__} {reason_of(error)}"
            found[name] = Standing(name, "damaged", "", reason, f"Delete '{run / name}' to make the stage anew")
    width = max(map(len, found))
    lines = []
    for one in found.values():
        job = f"job {one.job}" if one.job else ""
        lines.append(f"{one.name:<{width}}  {one.state:<11}  {'; '.join(filter(None, [one.words, job]))}".rstrip())
        lines += [f"{'':<{width}}  {told}" for told in (one.reason, one.hint and f"Hint: {one.hint}") if told]
    states = {one.state for one in found.values()}
    return lines, 1 if states & {"failed", "damaged"} else 0 if states == {"done"} else 75


def standing(run: Path, name: str, entry: Submitted | None, before: Mapping[str, Standing]) -> Standing:
    """Where one stage stands; `before` holds those that it builds on."""
    folder = run / name
    job = latest(run / FOLDER, name, entry.job) if entry else None
    if (folder / "done.json").is_file():
        return Standing(name, "done", f"in {duration(read_done(folder)['seconds'])}", job=job)
    state, reason, hint = state_of(run, name, job)
    if state == "waiting":
        stuck = [parent for parent in entry.after if parent in before] if entry else []
        stuck = [parent for parent in stuck if before[parent].state != "done"]
        words = f"for {' and '.join(repr(parent) for parent in stuck)}" if stuck else "for its turn"
        if broken := [parent for parent in stuck if before[parent].state in BROKEN]:
            words = f"for '{broken[0]}', which {BROKEN[before[broken[0]].state]}"
        return Standing(name, state, words, job=job)
    work = work_of(folder)
    return Standing(name, state, told(work, state, folder) if work else "", reason, hint, job)


def state_of(run: Path, name: str, job: str | None) -> tuple[str, str, str]:
    """A stage's state, if it is not done, and of a failure the reason and the hint.

    What its jobs' logs tell of an end counts, unless the stage was worked on since by another command.
    """
    file = run / name / "state.json"
    kept = read_json(file) if file.is_file() else {"state": "waiting"}
    changed = file.stat().st_mtime if file.is_file() else 0.0
    state, reason = kept["state"], kept.get("reason", "") if kept["state"] == "failed" else ""
    if state == "done":  # its mark comes a moment later
        state = "running"
    if job is None:
        return state, reason, ""
    last = turns(run / FOLDER, name, job)
    if not last:
        known = changed > (run / FOLDER / "jobs.json").stat().st_mtime
        return (state, reason, "") if known else ("waiting", "", "")
    ended = {turn.stopped for turn in last} & BROKEN.keys()  # for good, by Slurm; the stage may save a moment later
    beside = len(last) > 1 and any(turn.exit_code is None and not turn.stopped for turn in last)  # its array's others
    if changed > max(turn.written for turn in last) and not (beside or (state == "interrupted" and ended)):
        return state, reason, ""
    failed = [turn for turn in last if turn.exit_code not in (None, 0, *AGAIN)]
    if failed:
        return "failed", failed[0].reason, failed[0].hint
    if any(turn.exit_code is None and not turn.stopped for turn in last):
        return "running", "", ""
    if "cancelled" in ended:
        return "cancelled", "", ""
    return ("interrupted" if any(turn.exit_code or turn.stopped for turn in last) else state), reason, ""


# --- progress ---------------------------------------------------------------------------------------------------------


def told(work: Work, state: str, folder: Path) -> str:
    """1,250 of 2,000 couplings, 87/s, 9 s left"""
    words = [f"{work.done:,} of {counted(work.total, work.unit)}"]
    if state == "running":
        if work.rate:
            words.append(f"{work.rate:,.{1 if work.rate < 10 else 0}f}/s")
            words.append(f"{duration((work.total - work.done) / work.rate)} left")
        sign = next(file for name in ("state", "stage") if (file := folder / f"{name}.json").is_file())
        silent = time.time() - max(work.written, sign.stat().st_mtime)
        if silent > SILENT:
            words.append(f"nothing written for {duration(silent)}")
    return ", ".join(words)


def work_of(folder: Path) -> Work | None:
    """How much of a stage that has begun is made; None where its files don't tell."""
    if not (folder / "stage.json").is_file():
        return None
    begun = read_json(folder / "stage.json")["settings"]
    with suppress(InstaFlowError):  # of a stage that another version began
        settings: Any = parse_stage(folder.name, begun)
        if isinstance(settings, CoupleStage):
            return couplings_made(folder)
        if isinstance(settings, EvaluateStage):
            return images_seen(folder, settings)
        if isinstance(settings, TrainingStage):
            return samples_seen(folder, settings)
    return None


def couplings_made(folder: Path) -> Work | None:
    if not (folder / "manifest.json").is_file():
        return None
    plan = read_manifest(folder).plan
    left = {*shards_to_make(folder, plan)}
    made = {
        sidecar_path(folder, shard): len(plan.indices(shard)) for shard in range(plan.num_shards) if shard not in left
    }
    return of_files(made, plan.count, "coupling")


def images_seen(folder: Path, settings: EvaluateStage) -> Work:
    """Those that rows drew; what is seen of paths, gaps and diversity lies in folders of longer names."""
    made = {}
    for file in folder.glob("observed/*/*.observed"):
        batch = re.fullmatch(r"(\d+)-(\d+)\.observed", file.name)
        if batch and re.fullmatch(r"[0-9a-f]{16}-\d+", file.parent.name):
            made[file] = int(batch[2]) - int(batch[1])
    rows = sum(len(entry.num_steps) * len(entry.scales) for entry in settings.models)
    return of_files(made, rows * settings.count, "image")


def of_files(made: Mapping[Path, int], total: int, unit: str) -> Work:
    """Work that lies in files, each of so many units; the rate is that of the last ones, whoever wrote them."""
    written = sorted((file.stat().st_mtime, count) for file, count in made.items())
    last = written[-RECENT:]
    seconds = last[-1][0] - last[0][0] if last else 0.0
    rate = sum(count for _, count in last[1:]) / seconds if seconds > 0 else None
    return Work(sum(made.values()), total, unit, rate, written[-1][0] if written else 0.0)


def samples_seen(folder: Path, settings: TrainingStage) -> Work:
    """Of all trainings of a stage together; the rate is that of the one at work."""
    keys = ("autoencoder_phases", "text_phases", "phases", "perceptual_phases")
    phases = [phase for key in keys for phase in getattr(settings, key, None) or ()]
    total = sum(phase.seen for phase in phases)
    lines = [line for line in read_stats(folder / "stats.jsonl") if "samples_seen" in line]
    seen = {line["job"]: line["samples_seen"] for line in lines}
    last = [line for line in lines if line["job"] == lines[-1]["job"]][-RECENT:]
    written = (folder / "stats.jsonl").stat().st_mtime if lines else 0.0
    return Work(sum(seen.values()), total, "sample", rate_of(last), written)


def rate_of(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Samples a second over some lines of a stage's figures."""
    seconds = lines[-1]["seconds"] - lines[0]["seconds"] if lines else 0.0
    return (lines[-1]["samples_seen"] - lines[0]["samples_seen"]) / seconds if seconds > 0 else None


def duration(seconds: float) -> str:
    """9 s, 12 min, 3 h 20 min, 2 d 4 h"""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
