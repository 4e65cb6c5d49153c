"""Where a model comes from: the stages from the teacher on, with hashes and cost, and the figures measured of it.

Read from a run's files alone, or from `provenance.json`, which an exported model carries.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from instaflow.errors import DataError
from instaflow.files import fingerprint_of, write_json
from instaflow.places import is_hub_name
from instaflow.plurals import counted
from instaflow.rundir import read_json

FILE = "provenance.json"
SHOWN = 16
"""Digits of a hash."""
LICENCES = {
    "CompVis/stable-diffusion-v1": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "XCLiu/instaflow_0_9B_from_sd_1_5": "cc-by-nc-4.0",
    "XCLiu/2_rectified_flow_from_sd_1_5": "cc-by-nc-4.0",
}
"""What the hub says of models whose names begin so."""
FIGURES = {
    "frechet_distance_real": ("Fréchet distance to real images", "{:.3f}"),
    "frechet_distance_teacher": ("to the teacher's", "{:.3f}"),
    "prompt_accuracy": ("prompts drawn right", "{:.1%}"),
    "clip_score": ("CLIP score", "{:.3f}"),
    "kernel_distance": ("kernel distance", "{:.4f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "seconds_per_image": ("seconds an image", "{:.4f}"),
}
"""What is told of a report's row, in this order."""
PROTOCOL = ("num_samples", "prompts", "seed", "features", "reference", "judge", "dtype", "hardware")
"""What is told of its protocol card."""
GONE = "no longer where it was"
PHASES = {
    "autoencoder_phases": "autoencoder: ",
    "text_phases": "text encoder: ",
    "phases": "",
    "perceptual_phases": "perceptual network: ",
}
"""A stage's trainings, and what they are called."""
TERMS = ("fake", "regression", "gan", "real")
"""The sections of a stage's settings that say how it was trained."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A stage on the way to a model, or a model from elsewhere (kind "model") that the way began with."""

    name: str
    kind: str
    content: str  # a fingerprint, or a hub model's name and commit
    summary: str = ""
    data: str = ""  # which prompts or images, by hash
    phases: list[str] = field(default_factory=list)
    terms: list[str] = field(default_factory=list)  # what its method works with beside its phases
    seconds: float | None = None
    hardware: str = ""
    samples: int | None = None  # made, or seen in training
    processes: int | None = None  # each with a device of its own


@dataclass(frozen=True, kw_only=True)
class Provenance:
    origins: list[Origin] = field(default_factory=list)
    """Oldest first; the last one is the model."""
    figures: list[dict[str, Any]] = field(default_factory=list)
    """The rows of reports that measured this very model."""
    teacher: str = ""
    """The place of what it began with: a model from elsewhere, on this machine or the hub, or a teacher stage's."""
    licence: str = ""
    """Its licence, as the hub spells it."""


def provenance_of(folder: Path, lineage: list[dict[str, Any]]) -> Provenance:
    """Where the model in `folder` comes from. lineage: what its settings say. Raises DataError."""
    if (folder / FILE).is_file():
        return read_provenance(folder / FILE)
    stage = maker_of(folder)
    summaries = {entry["stage"]: entry.get("summary", "") for entry in lineage}
    if stage is None:
        entries = [
            Origin(name=entry["stage"], kind=entry.get("kind", ""), content="", summary=summaries[entry["stage"]])
            for entry in lineage
        ]
        return Provenance(origins=entries, licence=licence_of(f"XCLiu/{lineage[0]['stage']}" if lineage else ""))
    content, found = fingerprint_of(folder), Beginnings()
    origins = each_once(stages_behind(stage, content, summaries, found))
    weights = "raw" if folder.name == "model-raw" else "ema"
    made = read_json(stage / "done.json")["fingerprint"] if (stage / "done.json").is_file() else ""
    measured = weights == "raw" or content == made  # not where the folder was changed since
    teacher = next(iter([*found.places, *found.teachers]), "")
    return Provenance(
        origins=origins,
        figures=list(rows_of(stage.parent, made, weights)) if measured else [],
        teacher=teacher,
        licence=licence_of(teacher),
    )


def way_to(folder: Path) -> list[Origin]:
    """The stages behind the model in a folder, oldest first, as far as files tell them; it is not hashed itself.

    Raises DataError.
    """
    if (folder / FILE).is_file():
        return read_provenance(folder / FILE).origins
    stage = maker_of(folder)
    return each_once(stages_behind(stage, "", {}, Beginnings())) if stage else []


def each_once(origins: Iterable[Origin]) -> list[Origin]:
    """Also where a folder and an exported model's `provenance.json` tell the same stage in other words."""
    return [*{(origin.name, origin.kind, origin.content): origin for origin in origins}.values()]


@dataclass(frozen=True)
class Beginnings:
    """Where the models lie that a way began with."""

    places: list[str] = field(default_factory=list)
    """Of models from elsewhere."""
    teachers: list[str] = field(default_factory=list)
    """Of those that teacher stages made."""
    stages: set[Path] = field(default_factory=set)
    """The folders of stages that the way has come by: each is told once, and hashed once."""


def stages_behind(stage: Path, content: str, summaries: Mapping[str, str], found: Beginnings) -> Iterator[Origin]:
    """What a stage was made from, oldest first, and the stage; in whatever runs that was, as long as they lie here.

    Nothing of a stage that `found` holds.
    """
    if stage.resolve() in found.stages:
        return
    found.stages.add(stage.resolve())
    record = read_json(stage / "stage.json")
    done = read_json(stage / "done.json") if (stage / "done.json").is_file() else {}
    identity, settings = record["identity"], record["settings"]
    for key, parent in identity.items():
        key = key.removesuffix(" (content)") if key.endswith(" (content)") else ""
        place = setting(settings, key)
        if not isinstance(place, str):
            continue
        sibling, elsewhere = stage.parent / place, Path(place)
        name = place if is_hub_name(place) else elsewhere.name
        changed = Origin(name=name, kind="stage", content=parent, summary="made anew since, or changed")
        is_model = key in ("init", "model", "teacher")
        if (sibling / "done.json").is_file() and not elsewhere.is_absolute():
            if read_json(sibling / "done.json")["fingerprint"] == parent:
                yield from stages_behind(sibling, parent, summaries, found)
            else:
                yield changed
        elif maker := maker_of(elsewhere):
            if maker.resolve() in found.stages:
                continue
            if maker == elsewhere or fingerprint_of(elsewhere) == parent:  # couplings are too large to be hashed
                made = read_json(maker / "done.json")["fingerprint"] if maker == elsewhere else parent
                yield from stages_behind(maker, made, summaries, found)
            else:
                found.places.extend([place] if is_model else [])
                yield changed
        elif (elsewhere / FILE).is_file():
            told = read_provenance(elsewhere / FILE)
            found.places.extend([told.teacher or place] if is_model else [])
            yield from told.origins
        elif is_model:
            found.places.append(place)
            is_here = is_hub_name(place) or elsewhere.exists()
            yield Origin(name=name, kind="model", content=parent, summary="" if is_here else GONE)
        elif key.endswith("couplings"):
            yield Origin(name=name, kind="couple", content=parent, summary=GONE)
    if settings["kind"] == "teacher" and (stage / "model").is_dir():
        found.teachers.append(str(stage / "model"))
    hashed = next((f"{name} {value[:SHOWN]}" for name in ("prompts", "data") if (value := identity.get(name))), "")
    yield Origin(
        name=stage.name,
        kind=settings["kind"],
        content=content,
        summary=summaries.get(stage.name, ""),
        data=hashed,
        phases=[f"{PHASES[key]}{phase_in_words(phase)}" for key in PHASES for phase in settings.get(key) or ()],
        terms=[words for key in TERMS if (words := term_in_words(key, settings.get(key)))],
        seconds=done.get("seconds"),
        hardware=done.get("hardware", ""),
        samples=samples_of(settings),
        processes=done.get("processes"),
    )


def maker_of(place: Path) -> Path | None:
    """The folder of the stage, of any run, that made a model or couplings; None of what no stage made."""
    folder = place.absolute().parent if place.name in ("model", "model-raw") else place
    return folder if (folder / "stage.json").is_file() else None


def samples_of(settings: Mapping[str, Any]) -> int:
    """Couplings that a stage makes, or samples that its trainings see in whole batches."""
    if "count" in settings:
        return int(settings["count"])
    phases = [phase for key in PHASES for phase in settings.get(key) or ()]
    return sum(phase["samples"] - phase["samples"] % phase["global_batch_size"] for phase in phases)


def setting(settings: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    found: Any = settings
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def phase_in_words(phase: Mapping[str, Any]) -> str:
    samples = f"{phase['samples']:,} samples, " if "samples" in phase else ""
    words = [f"batch {phase['global_batch_size']:,}", f"learning rate {phase['learning_rate']:g}"]
    return samples + ", ".join([*words, *([phase["loss"]] if phase.get("loss") else [])])


def term_in_words(name: str, section: Any) -> str:
    """A section of a stage's settings in a line, without what is left open in it; empty where there is none."""
    if not isinstance(section, Mapping):
        return ""
    told = [f"{key} {value}" for key, value in section.items() if value is not None]
    return f"{name}: {', '.join(told)}".replace("_", " ")


def rows_of(run: Path, content: str, weights: str) -> Iterator[dict[str, Any]]:
    """The rows in a run's reports whose model has this fingerprint."""
    for file in sorted(run.glob("*/report.json")):
        for row in read_json(file).get("rows", []):
            if (
                row.get("card", {}).get("model_content") == content
                and row["weights"] == weights
                and not row.get("beside")
            ):
                yield {key: row[key] for key in ("num_steps", "guidance_scale", *FIGURES, "card") if key in row}


def licence_of(place: str) -> str:
    """What the hub, or a model's own card, says of its licence; empty where nothing is known."""
    card = Path(place) / "README.md"
    if place and not is_hub_name(place) and card.is_file():
        head = card.read_text(encoding="utf-8").split("---")[1:2]
        lines = [line for part in head for line in part.splitlines() if line.startswith("license:")]
        return lines[0].removeprefix("license:").strip() if lines else ""
    return next((licence for name, licence in LICENCES.items() if place.startswith(name)), "")


def read_provenance(file: Path) -> Provenance:
    """Raises DataError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Provenance(**content | {"origins": [Origin(**origin) for origin in content["origins"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"'{file}' is damaged: {error}", "Restore the file, or export the model again") from error


def write_provenance(folder: Path, found: Provenance) -> None:
    """Beside an exported model; a place on this machine is left out."""
    elsewhere = found.teacher if is_hub_name(found.teacher) else ""
    write_json(folder / FILE, asdict(found) | {"teacher": elsewhere})


# --- in words ---------------------------------------------------------------------------------------------------------


def told(found: Provenance) -> str:
    """The provenance as Markdown that a terminal shows as well."""
    lines = ["## Where it comes from, oldest first", ""]
    for origin in found.origins:
        lines.append(f"- {origin.name} ({origin.kind})" + (f": {origin.summary}" if origin.summary else ""))
        facts = [
            f"content {origin.content if '@' in origin.content else origin.content[:SHOWN]}" if origin.content else "",
            origin.data,
            f"{origin.seconds:,.0f} s" + (f" on {origin.hardware}" if origin.hardware else "")
            if origin.seconds
            else "",
        ]
        lines += ["  - " + "; ".join(fact for fact in facts if fact)] if any(facts) else []
        lines += [f"  - {term}" for term in origin.terms]
        lines += [f"  - phase {number}: {phase}" for number, phase in enumerate(origin.phases, 1)]
    spent = sum(origin.seconds or 0 for origin in found.origins)
    if spent:
        lines += ["", f"In all {spent:,.0f} s ({spent / 3600:,.2f} hours)."]
    if found.figures:
        lines += ["", "## Figures", ""]
    for row in found.figures:
        scale = row.get("guidance_scale") or 1
        how = f"{counted(row['num_steps'], 'step')}, " + (f"guidance {scale:g}" if scale > 1 else "no guidance")
        values = [
            f"{name} {form.format(row[key])}" for key, (name, form) in FIGURES.items() if row.get(key) is not None
        ]
        lines.append(f"- {how}: {', '.join(values)}")
        card = row.get("card", {})
        lines.append(
            "  - protocol: " + "; ".join(f"{key} {card[key]}" for key in PROTOCOL if card.get(key) not in (None, ""))
        )
    return "\n".join(lines)
