"""What a model's checkpoints scored while it trained: a line each in REPORT/watch/scores.jsonl."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

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


def score_curves(report: Path, curves: Iterable[str | None]) -> list[ScoreCurve]:
    """Those of the wanted curves that have scores, from the folder of an evaluate stage."""
    lines = read_stats(report / WATCH / FILE)
    names = [field.name for field in dataclasses.fields(Row)]
    found = []
    for curve in curves:
        own = {line["samples_seen"]: line for line in lines if curve and line.get("curve") == curve}
        if own:
            rows = [Row(**{name: own[seen][name] for name in names if name in own[seen]}) for seen in sorted(own)]
            found.append(ScoreCurve(samples_seen=sorted(own), rows=rows))
    return found
