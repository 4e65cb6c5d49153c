"""The page of all settings, made from the schemas: `python docs/settings.py > docs/settings.md`."""

import ast
import inspect
import json
import re
import textwrap
import types
import typing
from typing import Any, Literal

from pydantic.fields import FieldInfo

from instaflow.cluster import Cluster
from instaflow.methods import KINDS, METHODS, TEACHERS
from instaflow.sections import Section
from instaflow.stages import NetworkStage, TrainingStage

INTRODUCTION = """# Settings

Every key of an experiment file, by the stage that takes it, and last what is asked of a cluster; this page is made from
the code. A key without a default must be given, and one that the stage does not know is an error. `instaflow run CONFIG
--dry-run` prints a file with every default spelled out, and `--set stages.NAME.KEY=VALUE` changes any of them for one
run.
"""
TITLES = {
    "Aim": "aims (one of them)",
    "EvaluatedModel": "models (one of them)",
    "FakeScore": "fake",
    "FlowPhase": "phases (one of them), in reflow and distill",
    "Gan": "gan",
    "HalvingPhase": "phases (one of them), in method: progressive",
    "Keep": "keep",
    "KeepImages": "keep.images",
    "MatchingPhase": "phases (one of them), in method: dmd",
    "Perceptual": "perceptual",
    "Phase": "phases (one of them), in teacher",
    "Preview": "preview",
    "PromptSource": "prompts, as a mapping",
    "RealCouplings": "real",
    "Reference": "reference",
    "Regression": "regression",
    "Resources": "cluster",
}


SHARED = {"Every stage that trains": TrainingStage, "Every stage that goes on training a model": NetworkStage}


def page() -> str:
    """The whole page in Markdown."""
    stages = {
        **{f"kind: teacher, method: {method}": schema for method, schema in TEACHERS.items()},
        **{f"kind: {kind}": KINDS[kind] for kind in ("couple", "reflow")},
        **{f"kind: distill, method: {method}": schema for method, schema in METHODS.items()},
        "kind: evaluate": KINDS["evaluate"],
        **SHARED,
    }
    sections: dict[str, type[Section]] = {}
    for schema in stages.values():
        sections |= within(schema)
    mappings = sorted((TITLES[name], schema) for name, schema in sections.items())
    chapters = [chapter(title, schema) for title, schema in [*stages.items(), *mappings, ("cluster", Cluster)]]
    return "\n".join([INTRODUCTION, *chapters])


def chapter(title: str, schema: type[Section]) -> str:
    """A schema's heading, its docstring and the table of its keys, those without a default first.

    What all that train have in common stands in a chapter of its own.
    """
    words = documented(schema)
    shared = {
        key: field
        for common in SHARED.values()
        if schema is not common and issubclass(schema, common)
        for key, field in common.model_fields.items()
    }
    fields = {
        key: field
        for key, field in schema.model_fields.items()
        if key not in ("kind", "method") and (key not in shared or shared[key].annotation != field.annotation)
    }
    rows = [
        f"| `{key}` | {takes(field.annotation)} | {default(field)} | {words.get(key, '')} |"
        for key, field in sorted(fields.items(), key=lambda item: not item[1].is_required())
    ]
    name = title if schema in SHARED.values() else f"`{title}`"
    about = " ".join(inspect.cleandoc(schema.__doc__ or "").split())
    return "\n".join([f"## {name}\n", about, "", "| key | takes | default | |", "|---|---|---|---|", *rows, ""])


def documented(schema: type[Section]) -> dict[str, str]:
    """The words under each key, its ancestors' included."""
    found: dict[str, str] = {}
    for ancestor in reversed([cls for cls in schema.__mro__ if issubclass(cls, Section)]):
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(ancestor))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, after in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                assert isinstance(statement.target, ast.Name)
                found[statement.target.id] = " ".join(ast.literal_eval(after.value).split()).replace("|", "\\|")
    return found


def takes(annotation: Any) -> str:
    """What may be written, in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return takes(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys("`null`" if part is type(None) else takes(part) for part in inner))
    if origin is tuple:
        return "two numbers"
    if origin is dict:
        return f"mapping of {takes(inner[1])}"
    if origin is not None:
        return f"list of {takes(inner[0])}"
    if issubclass(annotation, Section):
        return f"mapping `{re.split('[ ,]', TITLES[annotation.__name__])[0]}`"
    return {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}[annotation]


def default(field: FieldInfo) -> str:
    """A key's default as YAML has it; empty where it must be given."""
    if field.is_required():
        return ""
    value = field.default
    if isinstance(value, Section):
        return "its own defaults"
    return f"`{json.dumps(value)}`".replace('"', "")


def within(schema: type[Section]) -> dict[str, type[Section]]:
    """The mappings that a schema's keys take, and theirs, by the name of their class."""
    found: dict[str, type[Section]] = {}
    waiting = [field.annotation for field in schema.model_fields.values()]
    while waiting:
        part = waiting.pop()
        if isinstance(part, type) and issubclass(part, Section):
            found[part.__name__] = part
            waiting += [field.annotation for field in part.model_fields.values()]
        waiting += typing.get_args(part)
    return found


if __name__ == "__main__":
    print(page(), end="")
