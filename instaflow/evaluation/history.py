"""What an experiment's other stages left behind for its report: their costs, losses and first checks."""

import json
from typing import Any

from instaflow.evaluation.report import LossCurve, PreviewCurve, Stage, StartCheck
from instaflow.evaluation.wording import joined, steps
from instaflow.provenance import samples_of
from instaflow.rundir import StageFolder, read_stats


def stages_so_far(stage: StageFolder) -> list[Stage]:
    """The experiment's stages that are done, with their costs, but for other reports."""
    done = []
    for name in stage.stage_names:
        folder = stage.run / name
        if name != stage.name and (folder / "done.json").is_file():
            record = json.loads((folder / "stage.json").read_text())
            settings, mark = record["settings"], json.loads((folder / "done.json").read_text())
            if settings["kind"] == "evaluate":
                continue  # another report made none of the models
            parents = [settings[key] for key in ("model", "init", "teacher", "couplings") if settings.get(key)]
            sections = (("regression", "couplings"), ("gan", "real"))
            parents += [settings[section][key] for section, key in sections if settings.get(section)]
            done.append(
                Stage(
                    name=name,
                    kind=settings["kind"],
                    method=settings.get("method", "instaflow"),
                    description=description(settings),
                    parents=[parent for parent in dict.fromkeys(parents) if parent in stage.stage_names],
                    seconds=mark["seconds"],
                    processes=mark.get("processes"),
                    hardware=mark.get("hardware", ""),
                    samples=samples_of(settings),
                    of_real_images=bool(settings.get("data")) and settings["kind"] == "couple",
                )
            )
    return done


def description(settings: dict[str, Any]) -> str:
    """A stage in one line."""
    if settings["kind"] == "couple":
        guidance = f", guidance {settings['guidance_scale']:g}" if settings["guidance_scale"] > 1 else ""
        if settings.get("data"):
            return f"real images inverted by {settings['model']} in {steps(settings['num_steps'])}{guidance}"
        return f"{settings['num_steps']}-step couplings of {settings['model']}{guidance}"
    if settings["kind"] == "reflow":
        return f"rectified flow from {settings['init']}, on {settings['couplings']}"
    if settings.get("method") == "progressive":
        counts = [str(phase["num_steps"]) for phase in (settings["phases"][0], settings["phases"][-1])]
        taken = f"{' to '.join(dict.fromkeys(counts))} step{'' if counts[0] == '1' else 's'}"
        guidance = f", guidance {settings['guidance_scale']:g}" if settings["guidance_scale"] > 1 else ""
        return f"progressive distillation from {settings['init']}, {taken}{guidance}"
    if settings.get("method") == "dmd":
        terms = [word for word, key in (("regression", "regression"), ("GAN", "gan")) if settings[key]]
        terms += [f"{updates} fake updates"] if (updates := settings["fake"]["updates"]) > 1 else []
        with_terms = f", with {joined(terms)}" if terms else ""
        few = f" in {steps(settings['num_steps'])}" if settings["num_steps"] > 1 else ""
        return f"{settings['init']}, its images{few} distributed as those of {settings['teacher']}{with_terms}"
    if settings["kind"] == "distill":
        return f"one-step student from {settings['init']}, on {settings['couplings']}"
    if settings.get("method") == "edm":
        return f"EDM of pixels{' by class' if settings['classes'] else ''}, on real images"
    return "autoencoder, text encoder and U-Net, on real images"


def loss_curves(stage: StageFolder, stages: list[Stage]) -> list[LossCurve]:
    """Each training run's loss, from the stages' stats."""
    curves = []
    for name in (entry.name for entry in stages if entry.kind != "couple"):
        lines = [line for line in read_stats(stage.run / name / "stats.jsonl") if "loss" in line]
        for job in dict.fromkeys(line["job"] for line in lines):
            own = [line for line in lines if line["job"] == job]
            curves.append(
                LossCurve(
                    stage=f"{name} {job}".strip(),
                    samples_seen=[line["samples_seen"] for line in own],
                    loss=[line["loss"] for line in own],
                )
            )
    return curves


def preview_curves(stage: StageFolder, stages: list[Stage]) -> list[PreviewCurve]:
    """How near each flow's samples came to its couplings while it trained, from the stages' stats."""
    curves = []
    for entry in stages:
        lines = read_stats(stage.run / entry.name / "stats.jsonl")
        if lines := [line for line in lines if line.get("preview_distance") is not None]:
            curves.append(
                PreviewCurve(
                    stage=entry.name,
                    samples_seen=[line["samples_seen"] for line in lines],
                    distance=[line["preview_distance"] for line in lines],
                    frechet_distance=[line["preview_frechet"] for line in lines],
                )
            )
    return curves


def start_checks(stage: StageFolder, stages: list[Stage]) -> list[StartCheck]:
    """What each training stage measured before its first update."""
    checks = []
    for entry in stages:
        file = stage.run / entry.name / "start_checks.json"
        for check in json.loads(file.read_text()) if file.is_file() else ():
            checks.append(StartCheck(stage=entry.name, **check))
    return checks
