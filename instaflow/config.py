"""An experiment: one YAML file of named stages, read strictly."""

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from instaflow.cluster import Cluster, Resources
from instaflow.dialect import Dumper, parse_yaml
from instaflow.errors import ConfigError
from instaflow.files import is_utf8
from instaflow.methods import KINDS, METHODS, TEACHERS, DmdStage
from instaflow.places import check_file, is_hub_name, is_to_import
from instaflow.sections import DIGITS, Section
from instaflow.stages import CoupleStage, EdmTeacherStage, EvaluateStage, ReflowStage, Stage, TeacherStage

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
RESERVED = ("evaluate", "sample")
"""Names in the key of noise that no stage may share: the evaluation's and that of `instaflow sample`."""


@dataclass(frozen=True)
class Experiment:
    """A checked experiment: its stages in an order in which each comes after those it builds on."""

    source: str
    """How the user named the file; commands in hints repeat it."""
    run: str
    seed: int
    stages: dict[str, Stage]
    overrides: tuple[str, ...] = ()
    """What `--set` changed; commands in hints repeat it too."""
    cluster: Cluster = field(default_factory=Cluster)
    """What its stages ask of a cluster."""

    def stage_parents(self, name: str) -> list[str]:
        """The stages that `name` builds on, in the file's order."""
        wanted = set(self.stages[name].parents().values())
        return [other for other in self.stages if other in wanted]

    def check_stage(self, name: str, kind: str | None = None) -> None:
        """Raises ConfigError if there is no stage `name`, or it is not of this kind."""
        if name not in self.stages:
            raise ConfigError(f"'{self.source}' has no stage '{name}'", nearest(name, self.stages))
        own: str = self.stages[name].kind  # type: ignore[attr-defined]
        if kind and own != kind:
            command = shlex.join(["instaflow", own, *self.arguments(), "--stage", name])
            raise ConfigError(f"Stage '{name}' is of kind '{own}'", f"Run: {command}")

    def arguments(self) -> list[str]:
        """What follows the command's name to mean this experiment again."""
        return [self.source, "--run-dir", self.run, *(word for change in self.overrides for word in ("--set", change))]

    def resolved(self) -> str:
        """The whole experiment as YAML, every default spelled out that has a use."""
        stages = {name: in_story_order(stage) for name, stage in self.stages.items()}
        tree: dict[str, Any] = {"run": self.run, "seed": self.seed}
        if cluster := self.cluster.model_dump(mode="json", exclude_unset=True):
            tree["cluster"] = cluster
        tree["stages"] = stages
        return yaml.dump(tree, Dumper=Dumper, sort_keys=False, width=100, allow_unicode=True)


def in_story_order(stage: Stage) -> dict[str, Any]:
    """A stage's settings as a person would write them: its kind and what it builds on first."""
    settings = stage.model_dump(mode="json", exclude=stage.without_use())
    first = [key for key in ("kind", "method", *stage.parent_keys) if key in settings]
    return {**{key: settings[key] for key in first}, **settings}


def load_experiment(source: str, overrides: Sequence[str] = (), run: str | None = None) -> Experiment:
    """Read, override and check an experiment.

    `source` is a path, or the name of a packaged config ("digits"); `overrides` are `a.b=c` strings as `--set` takes
    them; `run` replaces the file's run folder. Everything that can be checked without running is checked here.
    Raises ConfigError.
    """
    path = find_config(source)
    tree = parse_yaml(read_text(path), f"'{source}'")
    if not isinstance(tree, dict):
        raise ConfigError(f"'{source}' is not an experiment: a mapping with 'run', 'seed' and 'stages' is expected")
    tree.setdefault("cluster", {})
    for override in overrides:
        apply_override(tree, override)
    check_keys(tree, ("run", "seed", "cluster", "stages"), source)
    folder, seed, stages = tree.get("run") if run is None else run, tree.get("seed", 0), tree.get("stages")
    if not isinstance(folder, str) or not folder:
        said = "is missing: the folder that the run is written to" if not folder else f"must be text, not {folder!r}"
        raise ConfigError(f"'run' {said}", "Write, say, run: runs/digits")
    if "\0" in folder or not is_utf8(folder):
        raise ConfigError(f"'run' is no name of a folder: {folder!r}", "Write it in plain UTF-8, say, runs/digits")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        said = f"must be a whole number from 0 to 2^63 - 1, not {seed!r}" if seed is not None else "is empty"
        raise ConfigError(f"'seed' {said}", "Write, say, seed: 0")
    if not isinstance(stages, dict) or not stages:
        raise ConfigError("'stages' is missing or empty: a mapping from a stage's name to its settings is expected")
    parsed = {name: parse_stage(name, settings) for name, settings in stages.items()}
    parsed = {name: locate_sources(stage, path.parent) for name, stage in parsed.items()}
    for name, stage in parsed.items():
        check_parents(name, stage, parsed)
    cluster = parse_cluster(tree["cluster"], "cluster", parsed)
    ordered = in_order(parsed)
    for name, stage in ordered.items():
        if isinstance(stage, DmdStage):
            check_matching(name, stage, ordered)
    return Experiment(source, folder, seed, ordered, tuple(overrides), cluster)


def find_config(source: str) -> Path:
    """The file that `source` names: a path, or a packaged config without its ending."""
    path = Path(source)
    if path.is_file():
        return path
    packaged = Path(str(resources.files("instaflow.configs")))
    if (packaged / f"{source}.yaml").is_file() and path.name == source:
        return packaged / f"{source}.yaml"
    if path.is_dir():
        raise ConfigError(f"'{source}' is a folder; an experiment is a YAML file")
    names = sorted(file.stem for file in packaged.glob("*.yaml"))
    raise ConfigError(f"No experiment file '{source}'", f"Give a path, or a packaged config: {', '.join(names)}")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not UTF-8 text (byte {error.start})") from error


# --- changes from the command line ------------------------------------------------------------------------------------


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one value in place, `stages.2rf.phases.0.samples=64`: the value is read as YAML, as in the file."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set '{override}' is not of the form a.b=c", "Example: --set stages.2rf.ema_decay=0.999")
    value = parse_yaml(text, f"--set '{override}'")
    node: Any = tree
    keys = split_path(path, tree)
    last_key = len(keys) - 1
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth]) or "the experiment"
        last = depth == last_key
        if isinstance(node, list):
            if not re.fullmatch("[0-9]+", key) or int(key) >= len(node):
                items = f"items 0 to {len(node) - 1}, not '{key}'" if node else f"no items, so no '{key}'"
                raise ConfigError(f"--set '{override}': '{here}' has {items}")
            if last:
                node[int(key)] = value
            else:
                node[int(key)] = copy(node[int(key)])  # an alias elsewhere in the file keeps its value
                node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            elif key not in node:
                whole = (
                    f"{'.'.join(keys[: depth + 1])}={{{': {'.join(keys[depth + 1 :])}: {text}{'}' * (last_key - depth)}"
                )
                known = f"{nearest(key, node)}; to" if node else "To"
                hint = f"{known} add a section, set it whole: --set '{whole}'"
                raise ConfigError(f"--set '{override}': '{here}' has no '{key}'", hint)
            else:
                node[key] = copy(node[key])
                node = node[key]
        else:
            raise ConfigError(f"--set '{override}': '{here}' is a single value and has nothing below it")


def split_path(path: str, tree: dict[str, Any]) -> list[str]:
    """The keys of a dotted path; a stage's own name may hold dots."""
    stages = tree.get("stages")
    for name in stages if isinstance(stages, dict) else ():
        if "." in name and f"{path}.".startswith(f"stages.{name}."):
            below = path.removeprefix(f"stages.{name}").removeprefix(".")
            return ["stages", name, *(below.split(".") if below else ())]
    return path.split(".")


# --- stages -----------------------------------------------------------------------------------------------------------


def parse_stage(name: str, settings: Any) -> Stage:
    """One checked stage. Raises ConfigError, which names the key by its path in the file."""
    where = f"stages.{name}"
    if not NAME.fullmatch(name):
        raise ConfigError(f"'{where}': a stage's name is letters, digits, '_', '.' and '-': it becomes a folder")
    if name in RESERVED:
        message = f"'{where}': no stage may be called '{name}', for its noise would be that of `instaflow {name}`"
        raise ConfigError(message, "Call it, say, report" if name == "evaluate" else "Call it, say, pairs")
    if not isinstance(settings, dict):
        said = "is empty: it" if settings is None else f"is {settings!r}, and"
        raise ConfigError(f"'{where}' {said} must be a mapping of settings")
    kind = settings.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        said = f"no such kind: {kind!r}" if kind is not None else "'kind' is missing"
        raise ConfigError(f"'{where}': {said}", nearest(str(kind), KINDS))
    schema, others = KINDS[kind], {}
    if methods := {"distill": METHODS, "teacher": TEACHERS}.get(kind):
        method = settings.get("method", next(iter(methods)))
        if not isinstance(method, str) or method not in methods:
            said = f"no such method: {method!r}" if method is not None else "'method' is empty"
            raise ConfigError(f"'{where}': {said}", f"Known: {', '.join(methods)}")
        schema = methods[method]
        others = {f"method: {name}": other for name, other in methods.items()}
    check_nested_keys(settings, schema, where, others | ({"kind: reflow": ReflowStage} if kind == "distill" else {}))
    try:
        return schema.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(describe(error, where)) from error


def parse_cluster(settings: Any, where: str, stages: Mapping[str, Stage]) -> Cluster:
    """A checked section `cluster`, or a profile. Raises ConfigError, which names the key by its path after `where`."""
    if not isinstance(settings, dict):
        said = "is empty: it" if settings is None else f"is {settings!r}, and"
        raise ConfigError(f"'{where}' {said} must be a mapping of settings")
    check_keys(settings, Cluster.model_fields, where)
    own_settings = settings.get("stages")
    for name, own in own_settings.items() if isinstance(own_settings, dict) else ():
        if isinstance(own, dict):
            check_keys(own, Resources.model_fields, f"{where}.stages.{name}")
    try:
        cluster = Cluster.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(describe(error, where)) from error
    for name, own in cluster.stages.items():
        if name not in {*stages, *KINDS}:
            message = f"'{where}.stages.{name}' is neither a stage of this experiment nor a kind of stages"
            raise ConfigError(message, nearest(name, [*stages, *KINDS]))
        kind: str = stages[name].kind if name in stages else name  # type: ignore[attr-defined]
        if kind != "couple" and own.array > 1:
            raise ConfigError(f"'{where}.stages.{name}.array': only couple stages share their work in an array")
    return cluster


def load_profile(source: str, stages: Mapping[str, Stage]) -> Cluster:
    """A file of the same form as the section `cluster` of an experiment. Raises ConfigError."""
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"No profile '{source}'", "Give the path of a YAML file with settings such as partition")
    return parse_cluster(parse_yaml(read_text(path), f"'{source}'"), source, stages)


def check_nested_keys(
    settings: dict[str, Any], schema: type[Section], where: str, others: Mapping[str, type[Section]]
) -> None:
    """Refuse unknown keys here and in the sections below, naming the nearest known one.

    `others` stand here by other methods: a key of theirs is no misspelt one.
    """
    sections = {key: section_of(field.annotation) for key, field in schema.model_fields.items()}
    below = {name: key for key, section in sections.items() if section for name in section.model_fields}
    for key in settings:
        if key not in sections:
            close = difflib.get_close_matches(key, [*sections, *below], n=1)
            owners = [name for name, other in others.items() if key in other.model_fields]
            hints = [f"'{close[0]}' belongs into '{where}.{below[close[0]]}'"] if close and close[0] in below else []
            if owners:
                hints = [hint for hint in hints if key in below] + [f"'{key}' goes with {', '.join(owners)}"]
            raise ConfigError(f"'{where}' has no setting '{key}'", "; ".join(hints) or nearest(key, sections))
    for key, section in sections.items():
        value = settings.get(key)
        fields = {name: other.model_fields[key] for name, other in others.items() if key in other.model_fields}
        same = {name: found for name, field in fields.items() if (found := section_of(field.annotation))}
        if section and isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    check_nested_keys(item, section, f"{where}.{key}.{index}", same)
        elif section and isinstance(value, dict):
            check_nested_keys(value, section, f"{where}.{key}", same)


def section_of(annotation: Any) -> type[Section] | None:
    """The Section inside an annotation such as list[Phase], if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_of(part))), None)


def check_keys(mapping: dict[str, Any], known: Any, where: str) -> None:
    for key in mapping:
        if key not in known:
            raise ConfigError(f"'{where}' has no setting '{key}'", nearest(key, known))


def nearest(word: str, known: Any) -> str:
    """A hint: the known word nearest to `word`, or all of them."""
    names = [str(name) for name in known]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(names)}"


def describe(error: ValidationError, where: str) -> str:
    """Pydantic's findings as one line each: the key's path, the rule, the value received."""
    lines = []
    for finding in error.errors():
        path = ".".join([where, *(str(part) for part in finding["loc"] if part not in ("str", "list[str]", "mapping"))])
        rule = finding["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("List ")
        rule = rule.removeprefix("String ")
        rule = rule.partition(" after validation")[0]
        if finding["type"] == "model_type":
            rule = f"must be a mapping of settings, such as {example_of(finding['ctx']['class_name'])}"
        if finding["type"] == "missing":
            lines.append(f"'{path}' is missing")
        elif finding["type"] == "value_error":
            lines.append(f"'{path}': {rule}")
        elif finding["input"] is None:
            lines.append(f"'{path}' is empty: it {rule}")
        else:
            scalar = isinstance(finding["input"], int | float)
            quotes = " (put it in quotes)" if finding["type"] == "string_type" and scalar else ""
            lines.append(f"'{path}' {rule}, not {finding['input']!r}{quotes}")
    return "\n       ".join(dict.fromkeys(lines))


def example_of(name: str) -> str:
    """The keys that a section asks for, or its first, as one would write it."""
    waiting: list[type[Section]] = [Section]
    while (schema := waiting.pop()).__name__ != name:
        waiting += schema.__subclasses__()
    asked = [key for key, entry in schema.model_fields.items() if entry.is_required()]
    return f"{{{', '.join(f'{key}: ...' for key in asked or list(schema.model_fields)[:1])}}}"


def locate_sources(stage: Stage, folder: Path) -> Stage:
    """Read relative prompt files and images beside the experiment file, from wherever the command is called.

    The place is absolute, so that the resolved experiment means the same wherever it is saved.
    """
    if isinstance(stage, EvaluateStage):
        places = {"captions": stage.captions, "real": stage.real, "features": stage.features_folder}
        here = {key: str((folder / place).absolute()) for key, place in places.items() if place}
        return stage.model_copy(update={**here, "beside": [str((folder / one).absolute()) for one in stage.beside]})
    if not isinstance(stage, CoupleStage | DmdStage) or isinstance(stage.prompts, list):
        return stage
    if isinstance(stage, CoupleStage) and stage.data is not None:
        is_place = stage.data != DIGITS and "://" not in stage.data
        return stage.model_copy(update={"data": str((folder / stage.data).absolute())}) if is_place else stage
    prompts = stage.prompts
    assert prompts is not None  # a couple stage has one of the two
    path = prompts if isinstance(prompts, str) else prompts.path
    if "://" in path:
        return stage
    path = str((folder / path).absolute())
    prompts = path if isinstance(prompts, str) else prompts.model_copy(update={"path": path})
    return stage.model_copy(update={"prompts": prompts})


def check_parents(name: str, stage: Stage, stages: dict[str, Stage]) -> None:
    """Every parent must be a stage of the right kind, an existing folder, or (for a model) a hub name."""
    for key, parent in stage.parents().items():
        wanted = stage.parent_keys.get(key, "model")
        where = f"stages.{name}.{key}"
        if parent in stages:
            refused = tuple(METHODS.values()) if key == "teacher" else ()  # students
            serving = [other for other, found in stages.items() if found.serves(wanted) and other != name]
            givers = ", ".join(other for other in serving if not isinstance(stages[other], refused))
            if not stages[parent].serves(wanted):
                hint = f"Stages that do: {givers}" if givers else ""
                if wanted == "perceptual network" and isinstance(stages[parent], TeacherStage):
                    hint = f"'{parent}' trains one where it has perceptual_phases"
                raise ConfigError(
                    f"'{where}' needs a stage that gives {article(wanted)}, and '{parent}' gives none", hint
                )
            if isinstance(stages[parent], refused):
                raise ConfigError(
                    f"'{where}' names '{parent}', a student, which knows the data behind noise at its own timesteps "
                    "alone, and matching asks at all of them",
                    f"Stages that can teach: {givers}" if givers else "Name the teacher that it was distilled from",
                )
            if key == "real.couplings" and getattr(stages[parent], "data", None) is None:
                raise ConfigError(
                    f"'{where}' names '{parent}', which draws its images from prompts: they are the model's own",
                    "Name a couple stage that takes real images, by `data` in place of `prompts`",
                )
        elif not parent:
            raise ConfigError(f"'{where}' is empty: it names a stage, a folder or a hub model")
        elif wanted == "model" and Path(parent).is_file():
            check_file(Path(parent))
        elif not Path(parent).is_dir() and not (wanted == "model" and (is_hub_name(parent) or is_to_import(parent))):
            hint = nearest(parent, stages)
            raise ConfigError(f"'{where}' names '{parent}', which is no stage of this experiment and no folder", hint)


def check_matching(name: str, stage: DmdStage, stages: dict[str, Stage]) -> None:
    """Raises ConfigError where distribution matching asks of an EDM what only a Stable Diffusion's network can do."""
    if stage.guidance_scale > 1 and is_edm(stage.teacher, stages):
        raise ConfigError(
            f"'stages.{name}.guidance_scale': '{stage.teacher}' is an EDM, of which guidance_scale knows nothing",
            "Write guidance_scale: 1",
        )
    if stage.num_steps > 1 and is_edm(stage.init, stages):
        raise ConfigError(
            f"'stages.{name}.num_steps': '{stage.init}' is an EDM, and diffusers has no sampler that adds noise "
            "between the steps of such a one",
            "Write num_steps: 1",
        )


def is_edm(place: str, stages: dict[str, Stage]) -> bool:
    """Whether a model is known to be an EDM by its stage, by the one that this began with, or by its folder's name."""
    while place in stages:
        if isinstance(stages[place], EdmTeacherStage):
            return True
        place = getattr(stages[place], "init", "")
    return is_to_import(place)


def article(thing: str) -> str:
    return "couplings" if thing == "couplings" else f"a {thing}"


def in_order(stages: dict[str, Stage]) -> dict[str, Stage]:
    """The stages in the file's order, but each after its parents. Raises ConfigError on a cycle, which it prints."""
    ordered: dict[str, Stage] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            cycle = " → ".join((*trail[trail.index(name) :], name))
            raise ConfigError(f"The stages build on each other in a circle: {cycle}")
        if name not in ordered:
            for parent in stages[name].parents().values():
                if parent in stages:
                    visit(parent, (*trail, name))
            ordered[name] = stages[name]

    for name in stages:
        visit(name, ())
    return ordered
