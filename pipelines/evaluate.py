"""The evaluate stage: every model at every number of steps, on one protocol, into report.json and report.html."""

import hashlib
import json
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from instaflow.couplings.noise import coupled_noise
from instaflow.digits.images import SIZE
from instaflow.digits.networks import PIXELS
from instaflow.digits.protocol import (
    PROTOCOLS,
    ClassProtocol,
    DigitsProtocol,
    Reading,
    UnpromptedProtocol,
    distances,
    unrelated_distance,
)
from instaflow.digits.tokenizer import MAX_LENGTH
from instaflow.errors import InstaFlowError, Interrupted
from instaflow.evaluation.frechet import Gaussian, frechet_distance
from instaflow.evaluation.history import loss_curves, preview_curves, stages_so_far, start_checks
from instaflow.evaluation.page import write_page
from instaflow.evaluation.report import (
    Floors,
    Gallery,
    GalleryRow,
    Gap,
    Gaps,
    Protocol,
    Report,
    Row,
    Stage,
    StraightnessProfile,
    Trajectories,
    labelled,
    model_kind,
    report_json,
)
from instaflow.evaluation.trajectories import project
from instaflow.files import write_json
from instaflow.flow.straightness import Straightness, Trajectory, straightness
from instaflow.interruption import Stop
from instaflow.models.device import device
from instaflow.models.loading import load_model
from instaflow.models.model import Model
from instaflow.models.pixels import PixelModel
from instaflow.models.text_to_image import TextToImage
from instaflow.progress import Progress
from instaflow.rundir import StageFolder
from instaflow.sections import EvaluatedModel
from instaflow.world import hardware, world

GALLERY = 10
PATHS = 6
WORST = 12
LIBRARIES = ("torch", "diffusers", "transformers", "deepspeed", "numpy", "scikit-learn")


@dataclass
class Measured:
    """One model at one number of steps: its images and what was found."""

    entry: EvaluatedModel
    num_steps: int
    guidance_scale: float
    weights: str
    seconds_per_image: float
    images: Tensor
    features: np.ndarray
    readings: list[Reading]

    @property
    def label(self) -> str:
        return labelled(self.entry.model, self.weights)


def run(stage: StageFolder, stop: Stop) -> Callable[[], str]:
    """Sample, measure, and write the report; one process does it."""
    if not world().leads:
        return str
    settings = stage.stage
    places = [stage.locate_weights(entry.model, entry.weights) for entry in settings.models]
    models = [load_model(place, device=device()) for place in places]
    shapes = {model.latent_shape for model in models}
    if len(shapes) > 1:
        raise InstaFlowError(f"The models of '{stage.name}' make latents of different shapes: {sorted(shapes)}")
    shape = shapes.pop()
    protocol = protocol_for(stage, models)(settings.num_samples)
    noise = torch.from_numpy(coupled_noise(stage.seed, "evaluate", range(settings.num_samples), shape))
    measured = measure(stage, stop, protocol, models, noise)
    paths = simulate_paths(stage, stop, protocol, models, noise)
    leave_if(stop, stage)

    # Figures
    stages = stages_so_far(stage)
    wanted = (settings.reference.model, "ema", settings.reference.num_steps)
    reference = next(m for m in measured if (m.entry.model, m.entry.weights, m.num_steps) == wanted)
    straight = {label: straightness(path) for label, path in paths.items()}
    real, taught = Gaussian.of(protocol.features(protocol.real_images)), Gaussian.of(reference.features)
    rows = []
    for m in measured:
        accuracy = protocol.accuracy(m.readings)
        found = straight.get(m.label)
        rows.append(
            Row(
                model=m.entry.model,
                kind=model_kind(m.entry.model, stages),
                num_steps=m.num_steps,
                guidance_scale=m.guidance_scale,
                weights=m.weights,
                num_samples=settings.num_samples,
                frechet_distance_real=frechet_distance(Gaussian.of(m.features), real),
                frechet_distance_teacher=0.0 if m is reference else frechet_distance(Gaussian.of(m.features), taught),
                prompt_accuracy=accuracy.all,
                prompt_accuracy_unseen=accuracy.unseen,
                straightness=found.value if found else None,
                straightness_relative=found.relative if found else None,
                seconds_per_image=m.seconds_per_image,
            )
        )

    # Report
    report = Report(
        title=stage.run.name,
        config=Path(stage.source).name,
        seed=stage.seed,
        hardware=hardware(),
        protocol=protocol_card(stage, protocol, reference),
        rows=rows,
        versions={"Python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        peak_memory=float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        floors=floors(protocol, models[settings.models.index(reference.entry)]),
        stages=[*stages, evaluation_stage(stage, sum(len(m.images) for m in measured))],
        losses=loss_curves(stage, stages),
        previews=preview_curves(stage, stages),
        checks=start_checks(stage, stages),
        gallery=gallery(protocol, measured, rows),
        gaps=gaps(protocol, measured, rows, reference),
        straightness=[profile_of(label, found) for label, found in straight.items()],
        trajectories=trajectories(paths),
    )
    content = report_json(report)
    write_json(stage.folder / "report.json", content)
    write_page(stage.folder / "report.html", report)
    return lambda: hashlib.sha256(json.dumps(content["rows"]).encode()).hexdigest()


def protocol_for(stage: StageFolder, models: list[Model]) -> type[DigitsProtocol]:
    """What the models are asked for. Raises InstaFlowError where they can't draw what the protocol judges."""
    name, length = stage.stage.protocol, MAX_LENGTH[stage.stage.protocol]
    advice = f"Choose the protocol by the teacher's data: {' or '.join(PROTOCOLS)}"
    sides, side = models[0].latent_shape[1:], SIZE // 4
    pixels = isinstance(models[0], PixelModel)
    if pixels and name != "digits":
        raise InstaFlowError(f"'{stage.name}': protocol {name} goes with latents, and its models make pixels", advice)
    wanted = PIXELS if pixels else side
    if sides != (wanted, wanted):
        made = f"{'pixels' if pixels else 'latents'} of {sides[0]}×{sides[1]}"
        allowed = f", or pixels of {PIXELS}×{PIXELS}" if name == "digits" else ""
        raise InstaFlowError(
            f"'{stage.name}': protocol {name} goes with latents of {side}×{side}{allowed}, and its models make {made}",
            advice,
        )
    if isinstance(models[0], PixelModel):
        return ClassProtocol if models[0].num_classes else UnpromptedProtocol
    for entry, model in zip(stage.stage.models, models, strict=True):
        if isinstance(model, TextToImage) and model.tokenizer.model_max_length != length:
            raise InstaFlowError(
                f"'{stage.name}': protocol {name} goes with prompts of {length} tokens, and '{entry.model}' takes "
                f"{model.tokenizer.model_max_length}",
                advice,
            )
    return PROTOCOLS[name]


def measure(
    stage: StageFolder, stop: Stop, protocol: DigitsProtocol, models: list[Model], noise: Tensor
) -> list[Measured]:
    """Every model's images at every number of steps, from the same noise [N, C, H, W]."""
    settings = stage.stage
    measured: list[Measured] = []
    total = len(noise) * sum(len(entry.num_steps) for entry in settings.models)
    with Progress(stage.name, total=total, unit="images") as progress:
        for entry, model in zip(settings.models, models, strict=True):
            scale = guidance_of(entry, model)
            for num_steps in entry.num_steps:
                seconds, parts = 0.0, []
                for start in range(0, len(noise), settings.batch_size):
                    leave_if(stop, stage)
                    batch = slice(start, start + settings.batch_size)
                    began = time.perf_counter()
                    latents = model.sample(
                        noise[batch], protocol.prompts[batch], num_steps=num_steps, guidance_scale=scale
                    )
                    parts.append(model.decode(latents).cpu())
                    seconds += time.perf_counter() - began
                    progress.update(progress.done + len(parts[-1]))
                images = torch.cat(parts)
                stage.log(
                    model=entry.model,
                    weights=model.settings.weights,
                    num_steps=num_steps,
                    seconds_per_image=seconds / len(noise),
                )
                measured.append(
                    Measured(
                        entry=entry,
                        num_steps=num_steps,
                        guidance_scale=scale,
                        weights=model.settings.weights,
                        seconds_per_image=seconds / len(noise),
                        images=images,
                        features=protocol.features(images),
                        readings=protocol.readings(images),
                    )
                )
    return measured


def simulate_paths(
    stage: StageFolder, stop: Stop, protocol: DigitsProtocol, models: list[Model], noise: Tensor
) -> dict[str, Trajectory]:
    """Euler's finely simulated paths of each model that is sampled in several steps, by its label."""
    settings = stage.stage
    count = min(settings.straightness_samples, len(noise))
    paths = {}
    entries = zip(settings.models, models, strict=True)
    curved = [(entry, model) for entry, model in entries if max(entry.num_steps) > 1]
    with Progress(f"{stage.name} straightness", total=count * len(curved), unit="paths") as progress:
        for entry, model in curved:
            parts = []
            for start in range(0, count, settings.batch_size):
                leave_if(stop, stage)
                batch = slice(start, min(start + settings.batch_size, count))
                part = model.trajectory(
                    noise[batch],
                    protocol.prompts[batch],
                    num_steps=settings.straightness_steps,
                    guidance_scale=guidance_of(entry, model),
                )
                parts.append(part)
                progress.update(progress.done + len(part.states[0]))
            paths[labelled(entry.model, model.settings.weights)] = Trajectory.joined(parts)
    return paths


def guidance_of(entry: EvaluatedModel, model: Model) -> float:
    """The guidance scale that a model is sampled with: the experiment's, or what its folder recommends."""
    return model.settings.guidance_scale if entry.guidance_scale is None else entry.guidance_scale


def leave_if(stop: Stop, stage: StageFolder) -> None:
    if stop():
        raise Interrupted(f"Stage '{stage.name}' stopped ({stop.signal})", f"To do it again: {stage.command()}")


def floors(protocol: DigitsProtocol, model: Model) -> Floors:
    """What a perfect model could reach: real against real, and the autoencoder's round trip."""
    real = protocol.features(protocol.real_images)
    return Floors(
        real_halves=frechet_distance(real[::2], real[1::2]),
        autoencoder=frechet_distance(protocol.features(model.round_trip(protocol.real_images)), real),
        reader_accuracy=protocol.reader.accuracy,
    )


def protocol_card(stage: StageFolder, protocol: DigitsProtocol, reference: Measured) -> Protocol:
    """How the figures were measured, in words."""
    settings = stage.stage
    unseen = int(protocol.unseen.sum())
    return Protocol(
        samples=f"{settings.num_samples:,} prompts"
        + (f", {unseen:,} of them in words that no training stage saw together" if unseen else ""),
        noise=f"Philox, keyed by seed {stage.seed} and 'evaluate': no training stage saw it; the same for every model",
        features=protocol.features_in_words,
        reference_real=f"{len(protocol.real_images) * protocol.side**2:,} digits of scikit-learn's copy of the UCI set",
        reference_teacher=f"the images of {reference.label} at {reference.num_steps} steps, "
        f"guidance {reference.guidance_scale:g}, for the same prompts and noise",
        reader=protocol.reader_in_words,
        judged=protocol.judged,
        straightness=f"{min(settings.straightness_samples, settings.num_samples)} noises, "
        f"{settings.straightness_steps} Euler steps of the guided velocity",
        timing=f"batches of {settings.batch_size}, text encoder and decoder included, {hardware()}",
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


def pictures(images: Tensor) -> list[np.ndarray]:
    """uint8 [H, W, 3] each, of images [N, 3, H, W] in [-1, 1]."""
    return list(((images.permute(0, 2, 3, 1).numpy() + 1) * 127.5).round().astype(np.uint8))


def gallery(protocol: DigitsProtocol, measured: list[Measured], rows: list[Row]) -> Gallery:
    places = protocol.gallery(GALLERY)
    return Gallery(
        prompts=[protocol.prompts[place] for place in places],
        rows=[
            GalleryRow(model=m.label, kind=row.kind, num_steps=m.num_steps, images=pictures(m.images[places]))
            for m, row in zip(measured, rows, strict=True)
        ],
    )


def gaps(protocol: DigitsProtocol, measured: list[Measured], rows: list[Row], reference: Measured) -> Gaps | None:
    """The one-step students' distances to the reference's images; the worst of the last student after reflow.

    Raw weights are left out where any student has its moving average.
    """
    one_step = {
        m.label: (row.kind, m)
        for m, row in zip(measured, rows, strict=True)
        if m.num_steps == 1 and row.kind not in ("teacher", "flow")
    }
    if not one_step:
        return None
    one_step = {label: found for label, found in one_step.items() if found[1].weights == "ema"} or one_step
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
                teacher_image=pictures(reference.images[place : place + 1])[0],
                student_image=pictures(shown.images[place : place + 1])[0],
                distance=float(far[student][place]),
                teacher_reading=protocol.told(reference.readings[place]),
                student_reading=protocol.told(shown.readings[place]),
            )
            for place in worst.tolist()
        ],
        unrelated=unrelated_distance(reference.images, protocol.prompts),
    )


def profile_of(label: str, found: Straightness) -> StraightnessProfile:
    """Where along its time a flow bends, relative as its S(Z) is."""
    ratio = found.relative / found.value if found.value else 0.0
    return StraightnessProfile(
        model=label, times=[t for t, _ in found.profile], values=[value * ratio for _, value in found.profile]
    )


def trajectories(paths: dict[str, Trajectory]) -> list[Trajectories]:
    shown = {name: path.states[:, :PATHS].transpose(0, 1).numpy() for name, path in paths.items()}
    return list(project(shown)) if shown else []
