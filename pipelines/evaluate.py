"""The evaluate stage: every model at every number of steps, on one protocol, into report.json and report.html."""

import hashlib
import json
import resource
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from instaflow.errors import ConfigError, InstaFlowError
from instaflow.evaluation import findings
from instaflow.evaluation.card import Card, prompts_hash
from instaflow.evaluation.costs import cost_of
from instaflow.evaluation.history import loss_curves, preview_curves, stages_so_far, start_checks
from instaflow.evaluation.markdown import markdown
from instaflow.evaluation.observations import Observations
from instaflow.evaluation.page import write_page
from instaflow.evaluation.perception import of_one_prompt
from instaflow.evaluation.report import Report, Stage, model_kind, report_json
from instaflow.evaluation.scores import WATCH, curve_of, score_curves
from instaflow.files import fingerprint_of, write_file, write_json
from instaflow.flow.straightness import straightness
from instaflow.interruption import Stop
from instaflow.models.samplers import NOISY
from instaflow.provenance import Origin, way_to
from instaflow.rundir import StageFolder, locked
from instaflow.sections import EvaluatedModel
from instaflow.world import hardware, world
from pipelines.earlier import rows_beside
from pipelines.judging import Judging, Seen, look_at_models, perception_of
from pipelines.measuring import (
    Measure,
    floors,
    half_widths,
    protocol_words,
    straightness_in_words,
    subset_size,
    versions,
)
from pipelines.observing import Looks, Measured, Subject, bends_of, leave_if, observe
from pipelines.showing import gallery, gaps, neighbours, profile_of, strips, trajectories


def run(stage: StageFolder, stop: Stop) -> Callable[[], str]:
    """Sample, measure, and write the report. The processes share the sampling, and the leading one does the rest."""
    settings = stage.stage
    protocol, seen = look_at_models(stage)
    looks = looks_of(stage, protocol)
    subjects = subjects_of(stage, protocol, seen, looks)
    earlier = rows_beside(stage, subjects[0])
    place = subjects.index(reference_of(stage, subjects, seen))
    if looks:
        subjects = [looks.of(subject, subjects[place]) for subject in subjects]
    if world().leads:
        remove_other_batches(stage, subjects)
    # First: a real image that cannot be read is told before hours of sampling.
    real = protocol.reference_features(stage.folder / "observed", lambda: leave_if(stop, stage))
    observe(stage, stop, protocol, subjects, subjects[place], looks)
    if not world().leads:
        return str

    # Figures
    measured = [Measured.of(subject, subjects[place]) for subject in subjects]
    reference = measured[place]
    paths = {subject.label: subject.paths.joined() for subject in subjects if subject.paths}
    straight = {label: straightness(bends_of(observed)) for label, observed in paths.items()}
    stages = stages_so_far(stage)
    kinds = {
        entry.model: model_kind(entry.model, stages) if entry.model in stage.stage_names else look.kind
        for entry, look in zip(settings.models, seen, strict=True)
    }
    ways = {name: way_in(stage, name) for name in kinds}
    reflowed = {name for name, way in ways.items() if any(origin.kind == "reflow" for origin in way or ())}
    kinds = {name: "student" if kind == "direct" and name in reflowed else kind for name, kind in kinds.items()}
    measure = Measure.by(protocol, real, reference, kinds[reference.subject.entry.model])
    costs = {name: cost_in(way) for name, way in ways.items()}
    rows = []
    for m in measured:
        name = m.subject.entry.model
        row, found = replace(measure.row(m, kinds[name]), cost=costs[name]), straight.get(m.label)
        stage.log(model=m.label, num_steps=row.num_steps, seconds_per_image=row.seconds_per_image)
        if found:
            parts = {"straightness": found.paths.numpy(), "straightness_relative": found.paths_relative.numpy()}
            row = replace(
                row,
                straightness=found.value,
                straightness_relative=found.relative,
                card={**row.card, "straightness": straightness_in_words(stage)},
                parts={**row.parts, **parts},
                intervals={**row.intervals, **half_widths(parts)},
            )
        rows.append(row)

    rows += earlier

    # Report
    report = Report(
        title=Path(stage.source).stem,
        config=Path(stage.source).name,
        seed=stage.seed,
        hardware=hardware(),
        protocol=protocol_words(stage, protocol, reference, looks),
        rows=rows,
        versions=versions(),
        peak_memory=float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        floors=floors(stage, protocol, measure.real),
        stages=[*stages, evaluation_stage(stage, sum(m.subject.images.count for m in measured))],
        aims=stage.stage.aims,
        losses=loss_curves(stage, stages),
        previews=preview_curves(stage, stages),
        scores=score_curves(
            stage.folder, [curve_of(stage.run, subject.card) for subject in subjects], subjects[place].card
        ),
        checks=start_checks(stage, stages),
        gallery=gallery(protocol, measured, rows[: len(measured)]),
        straightness=[profile_of(label, found) for label, found in straight.items()],
        trajectories=trajectories({label: observed["states"] for label, observed in paths.items()}),
    )
    best = next((m for m, row in zip(measured, rows, strict=False) if row is findings.result(report)), None)
    report = replace(report, gaps=gaps(protocol, measured, rows[: len(measured)], reference, best))
    if best:
        report = replace(
            report,
            strips=strips(stage, protocol, best.subject),
            neighbours=neighbours(protocol, best, measure.real) if protocol.side == 1 else None,
        )
    content = report_json(report)
    write_json(stage.folder / "report.json", content)
    write_page(stage.folder / "report.html", report)
    write_file(stage.folder / "report.md", markdown(report))
    return lambda: hashlib.sha256(json.dumps(content["rows"]).encode()).hexdigest()


def content_of(stage: StageFolder, entry: EvaluatedModel) -> str:
    """What tells an entry's weights from others: of raw ones, the fingerprint of their own folder."""
    if entry.weights == "raw":
        return fingerprint_of(Path(stage.locate_weights(entry.model, "raw")))
    return stage.content(entry.model)


def way_in(stage: StageFolder, model: str) -> list[Origin] | None:
    """The stages behind a model, as far as folders tell, of whatever runs; None of a model on the hub or a file."""
    folder = Path(stage.locate(model))
    if not folder.is_dir():
        return None
    try:
        return way_to(folder)
    except (InstaFlowError, OSError, AttributeError, KeyError, TypeError, ValueError):
        return []  # a damaged file of another run spoils no evaluation


def cost_in(way: list[Origin] | None) -> Mapping[str, Any] | None:
    try:
        return None if way is None else cost_of(way)
    except (AttributeError, TypeError):  # values of a provenance.json that was written by hand
        return {}


def looks_of(stage: StageFolder, protocol: Judging) -> Looks | None:
    """How images are compared as they look, if the stage asks for it."""
    perception, kept = perception_of(stage), min(stage.stage.compared_samples, stage.stage.count)
    return Looks(perception, kept, of_one_prompt(protocol.prompts, kept)) if perception else None


def subjects_of(stage: StageFolder, protocol: Judging, seen: list[Seen], looks: Looks | None = None) -> list[Subject]:
    """The report's rows, each with its card, and the place of what is seen of it."""
    settings, subjects = stage.stage, []
    folder, compared = stage.folder / "observed", min(settings.compared_samples, settings.count)
    followed = min(settings.straightness_samples, settings.count)
    for entry, model in zip(settings.models, seen, strict=True):
        common = Card(
            model=entry.model,
            model_content=content_of(stage, entry),
            weights="raw" if entry.weights == "raw" else model.weights,
            num_steps=0,
            guidance_scale=model.guidance_scale,
            sampler=model.sampler,
            protocol=settings.protocol,
            num_samples=settings.count,
            prompts=prompts_hash(protocol.prompts),
            seed=stage.seed,
            noise="Philox, keyed by seed and 'evaluate'",
            dtype=settings.dtype,
            image_size=" ".join(["{}×{}".format(*model.image_size), protocol.size_in_words]).strip(),
            image_encoding=protocol.image_encoding,
            features=protocol.features_in_words,
            reference=protocol.reference_in_words,
            kernel=f"{protocol.kernel_subsets} subsets of {subset_size(protocol, settings.count):,} samples",
            judge=protocol.reader_in_words,
            perceptual=str(looks.perception) if looks else "",
            diversity=str(looks or ""),
            batch_size=settings.batch,
            processes=world().size,
            hardware=hardware(),
            versions=versions(),
        )
        for scale in entry.scales:
            guided = common if scale is None else replace(common, guidance_scale=scale)
            path = replace(guided, num_steps=settings.straightness_steps, num_samples=followed)
            paths = Observations(folder / f"{path.key()}-paths", followed, settings.batch)
            for num_steps in entry.num_steps:
                card = replace(guided, num_steps=num_steps)
                images = Observations(folder / f"{card.key()}-{compared}", settings.count, settings.batch)
                curved = num_steps > 1 and num_steps == max(entry.num_steps) and model.sampler != NOISY
                subjects.append(Subject(entry=entry, card=card, images=images, paths=paths if curved else None))
    return subjects


def reference_of(stage: StageFolder, subjects: list[Subject], seen: list[Seen]) -> Subject:
    """The row whose images the others' are compared with. seen: of each of the stage's models.

    Raises ConfigError where a model is measured at several guidance scales, and which of them is not told.
    """
    asked = stage.stage.reference
    wanted = (asked.model, "ema", asked.num_steps)
    rows = [row for row in subjects if (row.entry.model, row.entry.weights, row.num_steps) == wanted]
    [own] = [
        look.guidance_scale
        for entry, look in zip(stage.stage.models, seen, strict=True)
        if (entry.model, entry.weights) == wanted[:2]
    ]
    scale = asked.guidance_scale
    if scale is None:
        scale = own if len(rows) > 1 else rows[0].guidance_scale
    for row in rows:
        if row.guidance_scale == scale:
            return row
    scales = " or ".join(f"{row.guidance_scale:g}" for row in rows)
    why = "which its folder recommends" if asked.guidance_scale is None else "which 'reference' names"
    raise ConfigError(
        f"The reference of '{stage.name}', '{asked.model}', is not measured at guidance {scale:g}, {why}",
        f"Set stages.{stage.name}.reference.guidance_scale to {scales}",
    )


def remove_other_batches(stage: StageFolder, subjects: list[Subject]) -> None:
    """Remove what was observed of the rows in batches of another size: this command alone holds the stage.

    Not while a watch goes on, which observes the reference there, perhaps in such batches.
    """
    watch = stage.folder / WATCH
    with suppress(InstaFlowError), locked(watch) if watch.is_dir() else nullcontext():
        for kept in (kept for subject in subjects for kept in subject.kept):
            kept.remove_others()


def evaluation_stage(stage: StageFolder, images: int) -> Stage:
    parents = dict.fromkeys(entry.model for entry in stage.stage.models if entry.model in stage.stage_names)
    return Stage(
        name=stage.name,
        kind="evaluate",
        description="all models, all figures of this page",
        parents=list(parents),
        seconds=stage.seconds(),
        samples=images,
    )
