"""What a model cost after its teacher: training samples, and hours of devices."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from instaflow.evaluation.report import Report, Row, Stage
from instaflow.provenance import GONE, Origin

TRAINED = ("reflow", "distill")
"""Kinds of stages whose samples are training's."""
BEFORE = ("teacher", "model")
"""Kinds of what a way begins with."""


def told_cost(report: Report, row: Row) -> Mapping[str, Any]:
    """A row's `cost`, also where it is the report's stages that tell it."""
    if row.cost is not None:
        return row.cost
    made = road(report.stages, row.model)
    samples = sum(stage.samples or 0 for stage in made if stage.kind in TRAINED)
    return _told(samples, made) if made else {}


def training_samples(report: Report, row: Row) -> int:
    """Training samples seen after the teacher, by all stages on the way to a row's model; 0 where that is not known."""
    return told_cost(report, row).get("training_samples") or 0


def device_hours(report: Report, row: Row) -> float | None:
    """Hours times devices after the teacher, of all stages on the way to a row's model, couplings too.

    None where a stage does not tell both, or there is no way.
    """
    return told_cost(report, row).get("device_hours")


def seconds(report: Report, row: Row) -> float | None:
    """Of all stages after the teacher on the way to a row's model; None where one does not tell them."""
    return told_cost(report, row).get("seconds")


def devices(report: Report) -> list[str]:
    """What the stages after the teacher were computed on, each once."""
    own = [stage.hardware for stage in report.stages if stage.kind not in ("teacher", "evaluate")]
    others = [name for row in report.rows for name in (row.cost or {}).get("devices", ())]
    return [name for name in dict.fromkeys([*own, *others]) if name]


def road(stages: Iterable[Stage], model: str) -> list[Stage]:
    """The stages that made `model`, itself included, without those that made a teacher."""
    by_name = {stage.name: stage for stage in stages}
    found: dict[str, Stage] = {}
    waiting = [model]
    while waiting:
        stage = by_name.get(waiting.pop())
        if stage and stage.kind != "teacher" and stage.name not in found:
            found[stage.name] = stage
            waiting += stage.parents
    return list(found.values())


def cost_of(origins: Sequence[Origin]) -> Mapping[str, Any]:
    """A row's `cost`, of the way to its model; empty where there is no way, or a part of it is not known."""
    way = [origin for origin in origins if origin.kind not in BEFORE]
    trained = [origin.samples for origin in way if origin.kind in TRAINED]
    unknown = any(origin.kind == "stage" or origin.summary == GONE for origin in origins)
    if not trained or None in trained or unknown:
        return {}
    return _told(sum(samples or 0 for samples in trained), way)


def _told(samples: int, way: Sequence[Stage] | Sequence[Origin]) -> Mapping[str, Any]:
    names = [name for name in dict.fromkeys(one.hardware for one in way) if name]
    spent = [one.seconds for one in way if one.seconds is not None]
    taken = sum(spent) if len(spent) == len(way) else None
    return {"training_samples": samples, "seconds": taken, "device_hours": _hours(way), "devices": names}


def _hours(way: Sequence[Stage] | Sequence[Origin]) -> float | None:
    spent = [one.seconds * one.processes / 3600 for one in way if one.seconds is not None and one.processes]
    return sum(spent) if way and len(spent) == len(way) else None
