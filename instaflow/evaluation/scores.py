"""What a model's checkpoints scored while it trained: a line each in REPORT/watch/scores.jsonl."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from instaflow.evaluation.card import Card
from instaflow.evaluation.report import Row, ScoreCurve
from instaflow.rundir import read_json, read_stats

WATCH = "watch"
"""The folder in an evaluate stage's own; no part of what the stage makes."""
FILE = "scores.jsonl"


def training_of(folder: Path) -> str | None:
    """What tells a stage's training from any other: a hash of what it was begun as; None of one that was not begun."""
    file = folder / "stage.json"
    if not file.is_file():
        return None
    identity = json.dumps(read_json(file)["identity"], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def curve_of(run: Path, card: Card) -> str | None:
    """What scores are marked with that make up one curve: of one training, under a row's card; None where none was."""
    training = training_of(run / card.model)
    return None if training is None else dataclasses.replace(card, model_content=training).key()


def scored(report: Path, curve: str | None, reference: Card | None) -> dict[int, Row]:
    """A curve's rows by the samples seen, from the folder of an evaluate stage.

    reference: of the row that the distances to the teacher are to be to. What was scored beside another one belongs to
    another curve; of what was scored before there was one, by a version that did not tell it, or while it is not known
    here (None), those distances are left out.
    """
    names, found = [field.name for field in dataclasses.fields(Row)], {}
    wanted = reference and same(reference.subject())
    for line in read_stats(report / WATCH / FILE):
        own = line.get("reference") and same(line["reference"])
        if "diverged" in line:
            continue
        if curve and line.get("curve") == curve and (own == wanted or not own or not wanted):
            row = Row(**{name: line[name] for name in names if name in line})
            if own != wanted or not own:
                row = dataclasses.replace(row, frechet_distance_teacher=None)
            found[line["samples_seen"]] = row
    return {seen: found[seen] for seen in sorted(found)}


def diverged(report: Path, curve: str | None) -> set[int]:
    """The samples seen where a curve has no score, since the checkpoint drew no images."""
    lines = read_stats(report / WATCH / FILE)
    return {line["samples_seen"] for line in lines if "diverged" in line and line.get("curve") == curve}


def same(subject: Mapping[str, Any]) -> dict[str, Any]:
    """What was sampled, however it is called."""
    return {name: value for name, value in subject.items() if name != "model"}


def score_curves(report: Path, curves: Iterable[str | None], reference: Card | None) -> list[ScoreCurve]:
    """Those of the wanted curves that have scores: see `scored`."""
    found = [scored(report, curve, reference) for curve in curves]
    return [ScoreCurve(samples_seen=[*rows], rows=[*rows.values()]) for rows in found if rows]
