"""The evaluate stage: every model at every number of steps, on one protocol, into report.json and report.html."""

import hashlib
import json
import platform
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from instaflow.digits.images import SIZE
from instaflow.digits.networks import PIXELS
from instaflow.digits.protocol import (
    PROTOCOLS,
    ClassProtocol,
    DigitsProtocol,
    UnpromptedProtocol,
    distances,
    unrelated_distance,
)
from instaflow.digits.tokenizer import MAX_LENGTH
from instaflow.errors import InstaFlowError
from instaflow.evaluation import findings
from instaflow.evaluation.card import Card, check_alike, prompts_hash
from instaflow.evaluation.clip import load_clip
from instaflow.evaluation.frechet import Gaussian, frechet_distance
from instaflow.evaluation.history import loss_curves, preview_curves, stages_so_far, start_checks
from instaflow.evaluation.image_protocol import PRESETS, ImageProtocol, captions_of, classes_in_turn
from instaflow.evaluation.inception import inception
from instaflow.evaluation.kernel_distance import kernel_distance
from instaflow.evaluation.markdown import markdown
from instaflow.evaluation.observations import Observations
from instaflow.evaluation.page import write_page
from instaflow.evaluation.precision_recall import precision_recall
from instaflow.evaluation.references import RealImages
from instaflow.evaluation.report import (
    Floors,
    Gallery,
    GalleryRow,
    Gap,
    Gaps,
    Neighbour,
    Neighbours,
    Protocol,
    Report,
    Row,
    Stage,
    StraightnessProfile,
    Strip,
    Trajectories,
    model_kind,
    report_json,
)
from instaflow.evaluation.saved import read_report
from instaflow.evaluation.trajectories import project
from instaflow.files import fingerprint_of, write_file, write_json
from instaflow.flow.straightness import Straightness, straightness
from instaflow.interruption import Stop
from instaflow.models.device import device
from instaflow.models.loading import load_model
from instaflow.models.model import Model
from instaflow.models.pixels import PixelModel
from instaflow.models.text_to_image import TextToImage
from instaflow.progress import Progress
from instaflow.rundir import StageFolder
from instaflow.sections import EvaluatedModel
from instaflow.weights import find
from instaflow.world import hardware, world
from pipelines.observing import Judging, Subject, bends_of, noise_of, observe, pixels

KERNEL_SUBSETS, KERNEL_SUBSET = 100, 1000
"""Of the kernel distance; of the digits a tenth, whose features have 64 dimensions."""
GALLERY = 10
STRIPS = 3
BETWEEN = 10
WORST = 12
LIBRARIES = ("torch", "diffusers", "transformers", "deepspeed", "numpy", "scikit-learn")


@dataclass
class Measured:
    """A row: what was sampled, and what was seen of it."""

    subject: Subject
    observed: dict[str, np.ndarray]

    @property
    def label(self) -> str:
        return self.subject.label

    @property
    def features(self) -> np.ndarray:
        """Of all images, or of all their cells: [N, D]."""
        found = self.observed["features"]
        return found.reshape(-1, found.shape[-1])

    @property
    def images(self) -> np.ndarray:
        """The first ones, as many as are kept: uint8 [N, H, W, 3]."""
        return self.observed["images"]


def run(stage: StageFolder, stop: Stop) -> Callable[[], str]:
    """Sample, measure, and write the report. The processes share the sampling, and the leading one does the rest."""
    settings = stage.stage
    protocol, seen = look_at_models(stage)
    subjects = subjects_of(stage, protocol, seen)
    observe(stage, stop, protocol, subjects)
    if not world().leads:
        return str

    # Figures
    measured = [Measured(subject, subject.images.joined()) for subject in subjects]
    paths = {subject.label: subject.paths.joined() for subject in subjects if subject.paths}
    straight = {label: straightness(bends_of(observed)) for label, observed in paths.items()}
    stages = stages_so_far(stage)
    wanted = (settings.reference.model, "ema", settings.reference.num_steps)
    reference = next(
        m for m in measured if (m.subject.entry.model, m.subject.entry.weights, m.subject.num_steps) == wanted
    )
    real = protocol.reference_features()
    of_real, taught = Gaussian.of(real), Gaussian.of(reference.features)
    looks = zip(settings.models, seen, strict=True)
    kinds = {
        entry.model: model_kind(entry.model, stages) if entry.model in stage.stage_names else look.kind
        for entry, look in looks
    }
    subsets = KERNEL_SUBSETS if settings.of_images else 10
    rows = []
    for m in measured:
        seconds = float(np.median(m.observed["seconds"]))
        stage.log(model=m.label, num_steps=m.subject.num_steps, seconds_per_image=seconds)
        found, of_row = straight.get(m.label), Gaussian.of(m.features)
        manifolds = precision_recall(m.features, real, device=device())
        fewest = min(KERNEL_SUBSET, len(m.features), len(real))
        rows.append(
            Row(
                model=m.subject.entry.model,
                kind=kinds[m.subject.entry.model],
                num_steps=m.subject.num_steps,
                guidance_scale=m.subject.guidance_scale,
                weights=m.subject.entry.weights,
                num_samples=settings.count,
                frechet_distance_real=frechet_distance(of_row, of_real),
                frechet_distance_teacher=0.0 if m is reference else frechet_distance(of_row, taught),
                kernel_distance=kernel_distance(m.features, real, subsets=subsets, subset_size=fewest).mean,
                precision=manifolds.precision,
                recall=manifolds.recall,
                **protocol.figures(m.observed),
                straightness=found.value if found else None,
                straightness_relative=found.relative if found else None,
                seconds_per_image=seconds,
                swept=m.subject.swept,
                card=asdict(m.subject.card),
            )
        )

    rows += rows_beside(stage, rows)

    # Report
    report = Report(
        title=stage.run.name,
        config=Path(stage.source).name,
        seed=stage.seed,
        hardware=hardware(),
        protocol=protocol_words(stage, protocol, reference),
        rows=rows,
        versions=versions(),
        peak_memory=float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        floors=floors(stage, protocol),
        stages=[*stages, evaluation_stage(stage, sum(m.subject.images.count for m in measured))],
        losses=loss_curves(stage, stages),
        previews=preview_curves(stage, stages),
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
            neighbours=neighbours(protocol, best) if protocol.side == 1 else None,
        )
    content = report_json(report)
    write_json(stage.folder / "report.json", content)
    write_page(stage.folder / "report.html", report)
    write_file(stage.folder / "report.md", markdown(report))
    return lambda: hashlib.sha256(json.dumps(content["rows"]).encode()).hexdigest()


@dataclass(frozen=True)
class Seen:
    """What a look at a model told."""

    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    guidance_scale: float
    sampler: str
    kind: str
    """"teacher", "flow" or "student", by its folder."""


def look_at_models(stage: StageFolder) -> tuple[Judging, list[Seen]]:
    """The protocol, once every model was seen to go with it, and what they are. Raises InstaFlowError."""
    seen: list[Seen] = []
    kinds: list[type[DigitsProtocol]] = []
    for entry in stage.stage.models:
        model = load_model(stage.locate_weights(entry.model, entry.weights), device=torch.device("cpu"))
        if stage.stage.of_images:
            check_images(stage, entry.model, model)
        else:
            kinds.append(of_digits(stage, entry.model, model))
        seen.append(
            Seen(
                latent_shape=model.latent_shape,
                image_size=model.image_size,
                guidance_scale=model.settings.guidance_scale,
                sampler=type(model.scheduler).__name__,
                kind=model.settings.kind,
            )
        )
        if seen[-1].latent_shape != seen[0].latent_shape:
            raise InstaFlowError(
                f"The models of '{stage.name}' make latents of different shapes: '{stage.stage.models[0].model}' "
                f"{list(seen[0].latent_shape)}, '{entry.model}' {list(seen[-1].latent_shape)}"
            )
    if stage.stage.of_images:
        return of_images(stage), seen
    return kinds[0](stage.stage.count), seen


def of_digits(stage: StageFolder, name: str, model: Model) -> type[DigitsProtocol]:
    """The digits' protocol for a model. Raises InstaFlowError where it can't draw what the protocol judges."""
    protocol, where = stage.stage.protocol, f"'{stage.name}': protocol {stage.stage.protocol} goes with"
    length = MAX_LENGTH[protocol]
    advice = f"Choose the protocol by the teacher's data: {' or '.join(PROTOCOLS)}"
    sides, side = model.latent_shape[1:], SIZE // 4
    pixels = isinstance(model, PixelModel)
    if pixels and protocol != "digits":
        raise InstaFlowError(f"{where} latents, and '{name}' makes pixels", advice)
    wanted = PIXELS if pixels else side
    if sides != (wanted, wanted):
        made = f"{'pixels' if pixels else 'latents'} of {sides[0]}×{sides[1]}"
        allowed = f", or pixels of {PIXELS}×{PIXELS}" if protocol == "digits" else ""
        raise InstaFlowError(f"{where} latents of {side}×{side}{allowed}, and '{name}' makes {made}", advice)
    if isinstance(model, PixelModel):
        return ClassProtocol if model.num_classes else UnpromptedProtocol
    if isinstance(model, TextToImage) and model.tokenizer.model_max_length != length:
        raise InstaFlowError(
            f"{where} prompts of {length} tokens, and '{name}' takes {model.tokenizer.model_max_length}", advice
        )
    return PROTOCOLS[protocol]


def check_images(stage: StageFolder, name: str, model: Model) -> None:
    """Raises InstaFlowError for a model that can't draw what a protocol of real images asks for."""
    preset, where = PRESETS[stage.stage.protocol], f"'{stage.name}': protocol {stage.stage.protocol} goes with"
    classes = model.num_classes if isinstance(model, PixelModel) else 0
    if classes != preset.classes:
        what = f"a model of {preset.classes:,} classes" if preset.classes else "models that take captions"
        told = f"takes {classes:,} classes" if classes else "takes captions"
        raise InstaFlowError(f"{where} {what}, and '{name}' {told}", "Choose the protocol by what the model draws")
    height, width = model.image_size
    if height != width or height < preset.side:
        raise InstaFlowError(
            f"{where} square images of at least {preset.side} pixels, and '{name}' makes {height}×{width}",
            "Enlarging images would be judged as well; choose a protocol of smaller ones",
        )


def of_images(stage: StageFolder) -> ImageProtocol:
    """A protocol of real images, with its weights. Raises ConfigError and DataError for what is missing."""
    settings = stage.stage
    preset = PRESETS[settings.protocol]
    by_class = bool(preset.classes)
    prompts = (
        classes_in_turn(preset, settings.count)
        if by_class
        else captions_of(settings.captions, preset, settings.count, settings.captions_seed)
    )
    resize: Any = "clean-fid" if settings.features == "inception-clean-fid" else "tensorflow"
    clip = None
    if settings.clip and not by_class:
        clip = load_clip(settings.clip, find(settings.clip), device=device())
    extractor = inception(find("inception"), resize=resize, device=device())
    with Progress(f"{stage.name}: real images hashed", total=0, unit="images", quiet=not world().leads) as progress:
        real = RealImages.of(Path(settings.real), progress.update)
    return ImageProtocol(preset, prompts, real, extractor, clip, settings.clip_prefix, settings.batch)


def content_of(stage: StageFolder, entry: EvaluatedModel) -> str:
    """What tells an entry's weights from others: of a folder's raw ones, the fingerprint of their own folder."""
    if entry.weights == "raw" and entry.model not in stage.stage_names:
        return fingerprint_of(Path(stage.locate_weights(entry.model, "raw")))
    return stage.content(entry.model)


def subjects_of(stage: StageFolder, protocol: Judging, seen: list[Seen]) -> list[Subject]:
    """The report's rows, each with its card, and the place of what is seen of it."""
    settings, subjects = stage.stage, []
    folder, compared = stage.folder / "observed", min(stage.stage.compared_samples, stage.stage.count)
    for entry, model in zip(settings.models, seen, strict=True):
        for scale in entry.scales:
            for num_steps in entry.num_steps:
                card = Card(
                    model=entry.model,
                    model_content=content_of(stage, entry),
                    weights=entry.weights,
                    num_steps=num_steps,
                    guidance_scale=model.guidance_scale if scale is None else scale,
                    sampler=model.sampler,
                    protocol=settings.protocol,
                    num_samples=settings.count,
                    prompts=prompts_hash(protocol.prompts),
                    seed=stage.seed,
                    noise="Philox, keyed by seed and 'evaluate'",
                    dtype="float32",
                    image_size=" ".join(["{}×{}".format(*model.image_size), protocol.size_in_words]).strip(),
                    image_encoding=protocol.image_encoding,
                    features=protocol.features_in_words,
                    reference=protocol.reference_in_words,
                    judge=protocol.reader_in_words,
                    batch_size=settings.batch,
                    processes=world().size,
                    hardware=hardware(),
                    versions=versions(),
                )
                curved = num_steps > 1 and num_steps == max(entry.num_steps)
                paths = replace(
                    card, num_steps=settings.straightness_steps, num_samples=settings.straightness_samples
                ).key()
                count = min(settings.straightness_samples, settings.count)
                subjects.append(
                    Subject(
                        entry=entry,
                        num_steps=num_steps,
                        guidance_scale=card.guidance_scale,
                        card=card,
                        images=Observations(folder / f"{card.key()}-{compared}", settings.count, settings.batch),
                        paths=Observations(folder / f"{paths}-paths", count, settings.batch) if curved else None,
                    )
                )
    return subjects


def floors(stage: StageFolder, protocol: Judging) -> Floors:
    """What a perfect model could reach: real against real, and the autoencoder's round trip."""
    model = load_model(stage.locate_weights(stage.stage.reference.model, "ema"), device=device())
    real, again = protocol.reference_features(), protocol.round_trip_features(model)
    return Floors(
        real_halves=frechet_distance(real[::2], real[1::2]),
        autoencoder=None if again is None else frechet_distance(again, real),
        reader_accuracy=protocol.reader_accuracy,
    )


def protocol_words(stage: StageFolder, protocol: Judging, reference: Measured) -> Protocol:
    """How the figures were measured, in words."""
    settings = stage.stage
    unseen = int(protocol.unseen.sum())
    return Protocol(
        samples=f"{settings.count:,} prompts"
        + (f", {unseen:,} of them in words that no training stage saw together" if unseen else ""),
        noise=f"Philox, keyed by seed {stage.seed} and 'evaluate': no training stage saw it; the same for every model",
        features=protocol.features_in_words,
        reference_real=protocol.reference_in_words,
        reference_teacher=f"the images of {reference.label} at {reference.subject.num_steps} steps, "
        f"guidance {reference.subject.guidance_scale:g}, for the same prompts and noise",
        reader=protocol.reader_in_words,
        judged=protocol.judged,
        straightness=f"{min(settings.straightness_samples, settings.count)} noises, "
        f"{settings.straightness_steps} Euler steps of the guided velocity",
        timing=f"batches of {settings.batch}, text encoder and decoder included, {hardware()}",
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


def gallery(protocol: Judging, measured: list[Measured], rows: list[Row]) -> Gallery:
    places = [place for place in protocol.gallery(GALLERY) if place < len(measured[0].images)]
    return Gallery(
        prompts=[protocol.prompts[place] for place in places],
        rows=[
            GalleryRow(model=m.label, kind=row.kind, num_steps=row.num_steps, images=list(m.images[places]))
            for m, row in zip(measured, rows, strict=True)
        ],
    )


def gaps(protocol: Judging, measured: list[Measured], rows: list[Row], reference: Measured) -> Gaps | None:
    """The one-step students' distances to the reference's images; the worst of the last student after reflow.

    Raw weights are left out where any student has its moving average.
    """
    one_step = {
        m.label: (row.kind, m)
        for m, row in zip(measured, rows, strict=True)
        if row.num_steps == 1 and row.kind not in ("teacher", "flow")
    }
    if not one_step:
        return None
    averaged = {label: found for label, found in one_step.items() if found[1].subject.entry.weights == "ema"}
    one_step = averaged or one_step
    student = next(
        (label for label, (kind, _) in reversed(one_step.items()) if kind == "student"), next(iter(one_step))
    )
    far = {label: distances(m.images, reference.images) for label, (_, m) in one_step.items()}
    _, shown = one_step[student]
    worst = np.argsort(-far[student], kind="stable")[:WORST]
    return Gaps(
        student=student,
        teacher=reference.label,
        measure="root mean squared pixel difference, pixels in [-1, 1]",
        distances={label: values.tolist() for label, values in far.items()},
        worst=[
            Gap(
                prompt=protocol.prompts[place],
                teacher_image=reference.images[place],
                student_image=shown.images[place],
                distance=float(far[student][place]),
                teacher_reading=protocol.told(reference.observed, place),
                student_reading=protocol.told(shown.observed, place),
            )
            for place in worst.tolist()
        ],
        unrelated=unrelated_distance(reference.images, protocol.prompts),
    )


def rows_beside(stage: StageFolder, rows: list[Row]) -> list[Row]:
    """The rows of reports that were made before. Raises ConfigError where their protocol is another one."""
    found = []
    for place in stage.stage.beside:
        report = read_report(Path(place))
        name = Path(place).resolve().parent.parent.name
        for row in report.rows:
            check_alike([(f"'{rows[0].model}'", rows[0].card), (f"'{row.model}' in '{place}'", row.card)])
            found.append(replace(row, model=f"{name}/{row.model}", frechet_distance_teacher=None))
    return found


def strips(stage: StageFolder, protocol: Judging, subject: Subject) -> list[Strip]:
    """What a one-step model draws of a few prompts between two noises; nothing of a model of several steps."""
    if subject.num_steps > 1:
        return []
    model = load_model(stage.locate_weights(subject.entry.model, subject.entry.weights), device=device())
    found = []
    for place in protocol.gallery(STRIPS):
        first, last = (noise_of(stage, model, slice(index, index + 1)) for index in (place, place + 1))
        angle = torch.linspace(0, torch.pi / 2, BETWEEN).view(-1, 1, 1, 1)
        noise = torch.cos(angle) * first + torch.sin(angle) * last  # of variance 1, for the two are independent
        prompt = protocol.prompts[place]
        latents = model.sample(noise, [prompt] * BETWEEN, num_steps=1, guidance_scale=subject.guidance_scale)
        found.append(Strip(prompt=prompt, images=list(pixels(model.decode(latents).cpu()))))
    return found


def neighbours(protocol: Judging, best: Measured) -> Neighbours:
    """The real image that is nearest to each of the model's."""
    real = torch.from_numpy(protocol.reference_features())
    far = torch.cdist(torch.from_numpy(best.features), real)
    apart = torch.cdist(real, real).fill_diagonal_(torch.inf)
    shown = [place for place in protocol.gallery(GALLERY) if place < len(best.images)]
    return Neighbours(
        model=best.label,
        shown=[
            Neighbour(
                prompt=protocol.prompts[place],
                image=best.images[place],
                real=protocol.real_picture(int(far[place].argmin())),
                distance=float(far[place].min()),
            )
            for place in shown
        ],
        median=float(far.min(1).values.median()),
        real_median=float(apart.min(1).values.median()),
    )


def profile_of(label: str, found: Straightness) -> StraightnessProfile:
    """Where along its time a flow bends, relative as its S(Z) is."""
    ratio = found.relative / found.value if found.value else 0.0
    return StraightnessProfile(
        model=label, times=[t for t, _ in found.profile], values=[value * ratio for _, value in found.profile]
    )


def trajectories(states: dict[str, np.ndarray]) -> list[Trajectories]:
    return list(project(states)) if states else []


def versions() -> dict[str, str]:
    return {"Python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
