"""A report as it was saved, read back: all but its pictures and curves."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from instaflow.errors import DataError
from instaflow.evaluation.report import Floors, Protocol, Report, Row, Stage
from instaflow.sections import Aim

FIGURES = (
    "frechet_distance_real",
    "frechet_distance_teacher",
    "prompt_accuracy",
    "prompt_accuracy_unseen",
    "kernel_distance",
    "precision",
    "recall",
    "clip_score",
    "pixel_gap",
    "perceptual_gap",
    "diversity",
    "straightness",
    "straightness_relative",
    "seconds_per_image",
)
"""The figures of a row."""
Part = TypeVar("Part", Row, Floors, Stage, Protocol)


def read_report(file: Path, hint: str = "") -> Report:
    """The report in a report.json. Raises DataError, which names the file, if it is damaged or no report.

    hint: the way out, where it is not to make the stage's folder anew.
    """
    hint = hint or f"Delete '{file.parent}' to measure anew"
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"'{file}' is no report that can be read: {error.strerror}", hint) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{file}' is damaged: {error}", hint) from error
    try:
        return _report(content)
    except (KeyError, TypeError, ValueError) as error:
        said = f"it has no '{error.args[0]}'" if isinstance(error, KeyError) else str(error)
        raise DataError(f"'{file}' is no report: {said}", hint) from error


def _report(content: dict[str, Any]) -> Report:
    rows = [_part(Row, row) for row in content["rows"]]
    if not rows:
        raise ValueError("it has no rows")
    for row in rows:
        if not isinstance(row.card, dict):
            raise TypeError(f"the card of {row.label} is {row.card!r}")
        for key in FIGURES:
            _check_number(f"{row.label}, '{key}'", getattr(row, key))
        _check_cost(row)
        if not isinstance(row.intervals, dict):
            raise TypeError(f"the intervals of {row.label} are {row.intervals!r}")
        for key, value in row.intervals.items():
            _check_number(f"{row.label}, interval of '{key}'", value)
    floors = _part(Floors, content["floors"])
    for key, value in vars(floors).items():
        _check_number(f"floors, '{key}'", value)
    if not isinstance(content["seed"], int):
        raise TypeError(f"its seed is {content['seed']!r}")
    return Report(
        title=content["title"],
        config=content["config"],
        seed=content["seed"],
        hardware=content["hardware"],
        protocol=_part(Protocol, content["protocol"]),
        rows=rows,
        versions=content["versions"],
        floors=floors,
        stages=[_part(Stage, stage) for stage in content["stages"]],
        aims=[Aim(**aim) for aim in content.get("aims", [])],
    )


def _part(kind: type[Part], values: Mapping[str, Any]) -> Part:
    """One data class of a report, without entries that this version does not know. Raises KeyError and TypeError."""
    for field in dataclasses.fields(kind):
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise KeyError(field.name)
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values})


def _check_cost(row: Row) -> None:
    cost = {} if row.cost is None else row.cost
    if not isinstance(cost, dict):
        raise TypeError(f"the cost of {row.label} is {cost!r}")
    for key in ("training_samples", "seconds", "device_hours"):
        _check_number(f"{row.label}, cost, '{key}'", cost.get(key))
    names = cost.get("devices", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{row.label}, cost, 'devices' is {names!r}")


def _check_number(what: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{what} is {value!r}, not a number")
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{what} is {value}")
