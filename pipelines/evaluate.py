"""The evaluate stage: every model at every number of steps, on one protocol, into report.json and report.html."""

import hashlib
import json
import platform
import resource
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from instaflow import __version__
from instaflow.errors import ConfigError, InstaFlowError
from instaflow.evaluation import findings
from instaflow.evaluation.card import OF_LOOKS, Card, check_alike, difference, prompts_hash
from instaflow.evaluation.frechet import Gaussian, frechet_distance
from instaflow.evaluation.history import loss_curves, preview_curves, stages_so_far, start_checks
from instaflow.evaluation.kernel_distance import kernel_distance
from instaflow.evaluation.markdown import markdown
from instaflow.evaluation.observations import Observations
from instaflow.evaluation.page import write_page
from instaflow.evaluation.perception import of_one_prompt
from instaflow.evaluation.precision_recall import precision_recall
from instaflow.evaluation.report import Floors, Protocol, Report, Row, Stage, model_kind, report_json
from instaflow.evaluation.saved import read_report
from instaflow.evaluation.scores import WATCH, curve_of, score_curves
from instaflow.files import fingerprint_of, write_file, write_json
from instaflow.flow.straightness import straightness
from instaflow.interruption import Stop
from instaflow.models.device import device
from instaflow.models.loading import load_model
from instaflow.models.samplers import NOISY
from instaflow.rundir import StageFolder, locked
from instaflow.sections import EvaluatedModel
from instaflow.world import hardware, world
from pipelines.judging import Judging, Seen, look_at_models, perception_of
from pipelines.observing import Looks, Measured, Subject, bends_of, features_of, leave_if, observe
from pipelines.showing import gallery, gaps, neighbours, profile_of, strips, trajectories

KERNEL_SUBSET = 1000
"""Samples in one of the kernel distance's, where there are as many."""
ENOUGH_STEPS = 100
"""Of the paths that straightness is measured on; fewer, as a rehearsal takes, are told."""
LIBRARIES = (
    *("torch", "torchvision", "diffusers", "transformers", "deepspeed", "numpy", "scikit-learn"),
    *("torch-fidelity", "open_clip_torch", "pillow"),
)


@dataclass(frozen=True)
class Measure:
    """What rows are measured against: the real images, and the reference's of the same noise."""

    protocol: Judging
    real: np.ndarray
    """Features of the real images [N, D]."""
    of_real: Gaussian
    reference: Measured | None
    taught: Gaussian | None
    """Of the reference's features."""

    @classmethod
    def by(cls, protocol: Judging, real: np.ndarray, reference: Measured | None) -> "Measure":
        """real: features of the real images [N, D]."""
        taught = Gaussian.of(features_of(reference.observed())) if reference else None
        return cls(protocol, real, Gaussian.of(real), reference, taught)

    def row(self, m: Measured, kind: str) -> Row:
        """All figures of what was sampled, but for straightness, which is its paths'."""
        observed, card = m.observed(), m.subject.told_card()
        features = features_of(observed)
        of_row = Gaussian.of(features)
        manifolds = precision_recall(features, self.real, device=device())
        subset = subset_size(self.protocol, m.subject.images.count)
        apart = kernel_distance(features, self.real, subsets=self.protocol.kernel_subsets, subset_size=subset)
        to_teacher = frechet_distance(of_row, self.taught) if self.taught else None
        return Row(
            model=m.subject.entry.model,
            kind=kind,
            num_steps=m.subject.num_steps,
            guidance_scale=m.subject.guidance_scale,
            weights=m.subject.entry.weights,
            num_samples=m.subject.images.count,
            frechet_distance_real=frechet_distance(of_row, self.of_real),
            frechet_distance_teacher=0.0 if m is self.reference else to_teacher,
            kernel_distance=apart.mean,
            precision=manifolds.precision,
            recall=manifolds.recall,
            **self.protocol.figures(observed),
            pixel_gap=float(m.pixel_gaps.mean()) if len(m.pixel_gaps) else None,
            perceptual_gap=None if m.gaps is None else float(m.gaps.mean()),
            diversity=None if m.own is None else float(m.own.mean()),
            seconds_per_image=float(np.median(observed["seconds"])) if timed_here(m.subject, card) else None,
            swept=m.subject.swept,
            card=card,
        )


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
    measure = Measure.by(protocol, real, reference)
    kinds = {
        entry.model: model_kind(entry.model, stages) if entry.model in stage.stage_names else look.kind
        for entry, look in zip(settings.models, seen, strict=True)
    }
    rows = []
    for m in measured:
        row, found = measure.row(m, kinds[m.subject.entry.model]), straight.get(m.label)
        stage.log(model=m.label, num_steps=row.num_steps, seconds_per_image=row.seconds_per_image)
        if found:
            card = {**row.card, "straightness": straightness_in_words(stage)}
            row = replace(row, straightness=found.value, straightness_relative=found.relative, card=card)
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
        gaps=gaps(protocol, measured, rows[: len(measured)], reference),
        straightness=[profile_of(label, found) for label, found in straight.items()],
        trajectories=trajectories({label: observed["states"] for label, observed in paths.items()}),
    )
    if best := next((m for m, row in zip(measured, rows, strict=False) if row is findings.result(report)), None):
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
    """What tells an entry's weights from others: of a folder's raw ones, the fingerprint of their own folder."""
    if entry.weights == "raw" and entry.model not in stage.stage_names:
        return fingerprint_of(Path(stage.locate_weights(entry.model, "raw")))
    return stage.content(entry.model)


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
            weights=entry.weights,
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


def subset_size(protocol: Judging, count: int) -> int:
    """How many samples are in one of the kernel distance's subsets, of `count` images."""
    return min(KERNEL_SUBSET, count * protocol.side**2, protocol.num_real)


def remove_other_batches(stage: StageFolder, subjects: list[Subject]) -> None:
    """Remove what was observed of the rows in batches of another size: this command alone holds the stage.

    Not while a watch goes on, which observes the reference there, perhaps in such batches.
    """
    watch = stage.folder / WATCH
    with suppress(InstaFlowError), locked(watch) if watch.is_dir() else nullcontext():
        for kept in (kept for subject in subjects for kept in subject.kept):
            kept.remove_others()


def floors(stage: StageFolder, protocol: Judging, real: np.ndarray) -> Floors:
    """What a perfect model could reach: real against real, and the autoencoder's round trip. real: features [N, D]."""
    model = load_model(stage.locate_weights(stage.stage.reference.model, "ema"), device=device())
    again = protocol.round_trip_features(model)
    return Floors(
        real_halves=frechet_distance(real[::2], real[1::2]),
        autoencoder=None if again is None else frechet_distance(again, real),
        reader_accuracy=protocol.reader_accuracy,
    )


def protocol_words(
    stage: StageFolder, protocol: Judging, reference: Measured | None, looks: Looks | None = None
) -> Protocol:
    """How the figures were measured, in words; without a reference, but for those of its images."""
    settings = stage.stage
    looked = ""
    if looks:  # a network that the experiment itself trains is another one with each seed
        own = settings.perceptual.network in stage.stage_names
        network = f"{looks.perception.words} of '{settings.perceptual.network}'" if own else str(looks.perception)
        looked = f"{network}; diversity of {looks}"
    unseen = int(protocol.unseen.sum())
    return Protocol(
        samples=f"{settings.count:,} prompts"
        + (f", drawn from COCO's captions by seed {settings.captions_seed}" if settings.draws_captions else "")
        + (f", {unseen:,} of them in words that no training stage saw together" if unseen else ""),
        noise=f"Philox, keyed by seed {stage.seed} and 'evaluate': no training stage saw it; the same for every model",
        features=protocol.features_in_words,
        reference_real=protocol.reference_in_words,
        reference_teacher=f"the images of {reference.label} at {reference.subject.num_steps} steps, "
        f"guidance {reference.subject.guidance_scale:g}, for the same prompts and noise; gaps to them are of the first "
        f"{min(settings.compared_samples, settings.count):,} of a row"
        if reference
        else "",
        reader=protocol.reader_in_words,
        judged=protocol.judged,
        perceptual=looked,
        straightness=straightness_in_words(stage),
        timing=timing_in_words(stage),
        weights="their moving average (EMA); raw, as the optimizer left them, where a name says so",
    )


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


def rows_beside(stage: StageFolder, subject: Subject) -> list[Row]:
    """The rows of reports that were made before, without the figures that go by this one's own circumstances.

    Raises ConfigError where their protocol is another one, DataError where one is no report.
    """
    found = []
    places = [Path(place) for place in stage.stage.beside]
    for place, name in zip(places, told_apart([place.resolve().parent.parent for place in places]), strict=True):
        if place.resolve() == (stage.folder / "report.json").resolve():
            raise ConfigError(f"'{place}', given beside this report, is this report", "Leave it out of 'beside'")
        report = read_report(place, "Name the report.json of an earlier evaluation, or leave it out of 'beside'")
        for row in report.rows:
            own, other = asdict(subject.card), row.card
            check_alike([(f"'{subject.label}'", own), (f"'{row.model}' in '{place}'", other)], but=OF_LOOKS)
            row = replace(row, model=f"{name}/{row.model}", beside=True, frechet_distance_teacher=None)
            row = replace(row, pixel_gap=None, perceptual_gap=None)  # they were to another teacher
            if difference(own, other):
                row = replace(row, diversity=None, card={**other, **dict.fromkeys(OF_LOOKS, "")})
            if report.protocol.straightness != straightness_in_words(stage):
                row = replace(row, straightness=None, straightness_relative=None)
            if report.protocol.timing != timing_in_words(stage) or not timed_here(subject, other):
                row = replace(row, seconds_per_image=None)
            found.append(row)
    return found


def told_apart(folders: list[Path]) -> list[str]:
    """A name for each folder: its own, with those above it as far as another one's ends alike."""
    names = []
    for folder in folders:
        others = [other.parts for other in folders if other != folder]
        length = next(
            n for n in count(1) if n >= len(folder.parts) or folder.parts[-n:] not in {o[-n:] for o in others}
        )
        names.append("/".join(folder.parts[-length:]))
    return names


def straightness_in_words(stage: StageFolder) -> str:
    noises = min(stage.stage.straightness_samples, stage.stage.count)
    steps = stage.stage.straightness_steps
    few = f" (few: S(Z) wants {ENOUGH_STEPS} or more)" if steps < ENOUGH_STEPS else ""
    return f"{noises} noises, {steps} Euler steps of the guided velocity{few}"


def timing_in_words(stage: StageFolder) -> str:
    return f"batches of {stage.stage.batch}, text encoder and decoder included, {hardware()}"


def timed_here(subject: Subject, card: Mapping[str, Any]) -> bool:
    """Whether a row's images were made on this hardware, in batches of this size: else its times don't compare.

    A card of an earlier version that tells neither is taken for one of here.
    """
    own = subject.card.circumstances()
    return all(card.get(name, own[name]) == own[name] for name in ("hardware", "batch_size"))


def versions() -> dict[str, str]:
    return {
        "InstaFlow": __version__,
        "Python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }
