"""What a report shows beside its figures: images of the same noise, the worst of them, strips, neighbours, paths."""

import numpy as np
import torch
from torch import Tensor

from instaflow.digits.protocol import unrelated_distance
from instaflow.evaluation.report import (
    Gallery,
    GalleryRow,
    Gap,
    Gaps,
    Neighbour,
    Neighbours,
    Row,
    StraightnessProfile,
    Strip,
    Trajectories,
)
from instaflow.evaluation.trajectories import project
from instaflow.flow.paths import slerp
from instaflow.flow.straightness import Straightness
from instaflow.models.device import device
from instaflow.models.loading import load_model
from instaflow.rundir import StageFolder
from pipelines.judging import Judging
from pipelines.observing import Measured, Subject, features_of, noise_of, pixels

GALLERY = 10
STRIPS = 3
BETWEEN = 10
WORST = 12
ALONE = 2000
DISTANCES = 2**26
"""So many are in memory at a time: 256 MB of them."""


def gallery(protocol: Judging, measured: list[Measured], rows: list[Row]) -> Gallery:
    places = [place for place in protocol.gallery(GALLERY) if place < measured[0].kept]
    return Gallery(
        prompts=[protocol.prompts[place] for place in places],
        rows=[
            GalleryRow(model=m.label, kind=row.kind, num_steps=row.num_steps, images=list(m.images(places)))
            for m, row in zip(measured, rows, strict=True)
        ],
    )


def gaps(
    protocol: Judging, measured: list[Measured], rows: list[Row], reference: Measured, about: Measured | None
) -> Gaps | None:
    """The one-step students' distances to the reference's images; the worst of the one that the report is about.

    Of the last student after reflow, where that is none of them.
    By the perceptual network where there is one, else by pixels. Raw weights are left out where any student has its
    moving average.
    """
    one_step = {
        m.label: (row.kind, m)
        for m, row in zip(measured, rows, strict=True)
        if row.num_steps == 1 and row.kind not in ("teacher", "flow") and m is not reference
    }
    if not one_step:
        return None
    averaged = {label: found for label, found in one_step.items() if found[1].subject.entry.weights == "ema"}
    one_step = averaged or one_step
    students = [label for label, (kind, _) in reversed(one_step.items()) if kind == "student"]
    own = [about.label] if about and about.label in one_step else []
    student = [*own, *students, *one_step][0]
    far = {label: m.pixel_gaps if m.gaps is None else m.gaps for label, (_, m) in one_step.items()}
    if reference.own is None:
        measure = "root mean squared pixel difference, pixels in [-1, 1]"
        size = reference.subject.images.batch_size
        unrelated = unrelated_distance(reference.images, protocol.prompts[: reference.kept], size)
    else:
        measure, unrelated = "perceptual distance", float(np.median(reference.own))
    _, shown = one_step[student]
    worst = np.argsort(-far[student], kind="stable")[:WORST].tolist()
    return Gaps(
        student=student,
        teacher=reference.label,
        measure=measure,
        distances={label: values.tolist() for label, values in far.items()},
        worst=[
            Gap(
                prompt=protocol.prompts[place],
                teacher_image=teacher_image,
                student_image=student_image,
                distance=float(far[student][place]),
                teacher_reading=reference.told(protocol, place),
                student_reading=shown.told(protocol, place),
            )
            for place, teacher_image, student_image in zip(
                worst, reference.images(worst), shown.images(worst), strict=True
            )
        ],
        unrelated=unrelated,
    )


def strips(stage: StageFolder, protocol: Judging, subject: Subject) -> list[Strip]:
    """What a one-step model draws of a few prompts between two noises; nothing of a model of several steps."""
    if subject.num_steps > 1:
        return []
    model = load_model(stage.locate_weights(subject.entry.model, subject.entry.weights), device=device())
    found = []
    for place in protocol.gallery(STRIPS):
        first, last = (noise_of(stage, model, [index]) for index in (place, place + 1))
        noise = torch.cat([slerp(first, last, step / (BETWEEN - 1)) for step in range(BETWEEN)])
        prompt = protocol.prompts[place]
        latents = model.sample(noise, [prompt] * BETWEEN, num_steps=1, guidance_scale=subject.guidance_scale)
        found.append(Strip(prompt=prompt, images=list(pixels(model.decode(latents).cpu()))))
    return found


def neighbours(protocol: Judging, best: Measured, real: np.ndarray) -> Neighbours:
    """The real image that is nearest to each of the model's. real: the features of the real ones [N, D].

    How far real images are from one another is told of at most ALONE of them, evenly spaced among all.
    """
    points = torch.from_numpy(real).to(device())
    far, nearest = nearest_of(torch.from_numpy(features_of(best.observed())).to(device()), points)
    alone = torch.arange(0, len(points), -(-len(points) // ALONE))
    apart, _ = nearest_of(points[alone], points, themselves=alone)
    shown = [place for place in protocol.gallery(GALLERY) if place < best.kept]
    return Neighbours(
        model=best.label,
        shown=[
            Neighbour(
                prompt=protocol.prompts[place],
                image=image,
                real=pixels(protocol.real_image(int(nearest[place]))[None])[0],
                distance=float(far[place]),
            )
            for place, image in zip(shown, best.images(shown), strict=True)
        ],
        median=float(far.median()),
        real_median=float(apart.median()),
    )


def nearest_of(points: Tensor, others: Tensor, *, themselves: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The distance [N] to the nearest of `others` [M, D], and its place [N], for each of `points` [N, D].

    themselves: the places of the points among the others, which don't count.
    """
    distances, places = [], []
    for part in torch.arange(len(points)).split(max(1, DISTANCES // len(others))):
        far = torch.cdist(points[part], others)
        if themselves is not None:
            far[torch.arange(len(part)), themselves[part]] = torch.inf
        least = far.min(1)
        distances.append(least.values.cpu())
        places.append(least.indices.cpu())
    return torch.cat(distances), torch.cat(places)


def profile_of(label: str, found: Straightness) -> StraightnessProfile:
    """Where along its time a flow bends, relative as its S(Z) is."""
    ratio = found.relative / found.value if found.value else 0.0
    return StraightnessProfile(
        model=label, times=[t for t, _ in found.profile], values=[value * ratio for _, value in found.profile]
    )


def trajectories(states: dict[str, np.ndarray]) -> list[Trajectories]:
    return list(project(states)) if states else []
