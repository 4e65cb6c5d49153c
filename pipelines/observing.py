"""The work of an evaluation: every row's images and every flow's paths, shared by the processes and kept on disk."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instaflow.couplings.noise import coupled_noise
from instaflow.digits.protocol import distances
from instaflow.errors import Interrupted, NotFiniteError
from instaflow.evaluation.card import CIRCUMSTANCES, Card
from instaflow.evaluation.features import in_bytes
from instaflow.evaluation.observations import Observations, Observed
from instaflow.evaluation.perception import IMAGES, Perception
from instaflow.evaluation.report import labelled
from instaflow.evaluation.wording import joined, steps
from instaflow.flow.straightness import Bends, Trajectory
from instaflow.interruption import Stop
from instaflow.models.device import device
from instaflow.models.loading import DTYPES, load_model
from instaflow.models.model import Model
from instaflow.progress import Progress
from instaflow.rundir import StageFolder
from instaflow.sections import EvaluatedModel
from instaflow.world import barrier, gather, world
from pipelines.judging import Judging

PATHS = 6
"""So many paths are kept whole, for the page to draw."""


@dataclass(frozen=True)
class Subject:
    """A row of the report: a model with its weights, at one number of steps and one guidance scale."""

    entry: EvaluatedModel
    card: Card
    images: Observations
    paths: Observations | None
    """Of a model that follows a path in several steps, once for each guidance scale."""
    load: Callable[[torch.dtype], Model] | None = None
    """Makes the model in a precision, where its weights lie in no folder of one."""
    gaps: Observations | None = None
    """How different each image that is kept looks from the reference's; none of the reference itself."""
    own: Observations | None = None
    """How different its images of one prompt look from one another."""

    @property
    def num_steps(self) -> int:
        return self.card.num_steps

    @property
    def guidance_scale(self) -> float:
        return self.card.guidance_scale

    def told_card(self) -> dict[str, Any]:
        """The card, with the circumstances that all was made in, which may be those of several commands."""
        return asdict(self.card) | together([made for kept in self.kept for made in kept.circumstances()])

    @property
    def kept(self) -> list[Observations]:
        """All that is observed of the row."""
        return [kept for kept in (self.images, self.paths, self.gaps, self.own) if kept]

    @property
    def swept(self) -> bool:
        return len(self.entry.scales) > 1

    @property
    def label(self) -> str:
        return labelled(self.entry.model, self.card.weights, self.guidance_scale if self.swept else None)


@dataclass(frozen=True)
class Measured:
    """A row: what was sampled, and how it compares. Its images and features are read when they are asked for."""

    subject: Subject
    pixel_gaps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """How far the images that are kept lie from the reference's [N], by their pixels; empty where not compared."""
    gaps: np.ndarray | None = None
    """And how different they look from them [N]."""
    own: np.ndarray | None = None
    """How different two images of one prompt look [prompts, pairs]."""

    @classmethod
    def of(cls, subject: Subject, reference: Subject) -> "Measured":
        far = []
        for batch in subject.images.batches:
            images = subject.images.read(batch)["images"]
            if not len(images):
                break  # no more are kept
            others = images if subject is reference else reference.images.read(batch)["images"]
            far.append(distances(images, others))
        pixel_gaps = np.concatenate(far)
        gaps, own = (kept.joined()["apart"] if kept else None for kept in (subject.gaps, subject.own))
        if own is not None and gaps is None:  # the reference itself
            gaps = np.zeros(len(pixel_gaps), np.float32)
        return cls(subject, pixel_gaps, gaps, own)

    @property
    def label(self) -> str:
        return self.subject.label

    @property
    def kept(self) -> int:
        """So many of its images are kept, the first, where they were compared."""
        return len(self.pixel_gaps)

    def observed(self) -> dict[str, np.ndarray]:
        """What was seen of all its images, without themselves."""
        return self.subject.images.joined(without="images")

    def images(self, places: Sequence[int]) -> np.ndarray:
        """Those at a few places of the kept ones: uint8 [len(places), H, W, 3]."""
        return self.subject.images.at(places, "images") if places else np.empty((0, 1, 1, 3), np.uint8)

    def told(self, protocol: Judging, place: int) -> str:
        """What is read in an image."""
        batch, within = divmod(place, self.subject.images.batch_size)
        return protocol.told(self.subject.images.read(self.subject.images.batches[batch]), within)


@dataclass(frozen=True)
class Looks:
    """By which network images are compared as they look, and which images."""

    perception: Perception
    kept: int
    """So many images of a row, the first, are compared with the reference's."""
    groups: list[tuple[str, list[int]]]
    """Prompts with the places of their images, which are compared with one another: see `perception.of_one_prompt`."""

    def __str__(self) -> str:
        """Which images, as a protocol's card has it."""
        return f"{IMAGES} images of each of {len(self.groups)} prompts"

    def of(self, subject: Subject, reference: Subject) -> Subject:
        """The row with the places of what is seen so, of their own for each network and reference."""
        folder, size = subject.images.folder, subject.images.batch_size
        name = hashlib.sha256(f"{self.perception} {self} {reference.card.key()}".encode()).hexdigest()[:8]
        own = Observations(folder.with_name(f"{folder.name}-own-{name}"), len(self.groups), max(1, size // IMAGES))
        gaps = Observations(folder.with_name(f"{folder.name}-gaps-{name}"), self.kept, size)
        return replace(subject, own=own, gaps=None if subject is reference else gaps)


def observe(
    stage: StageFolder,
    stop: Stop,
    protocol: Judging,
    subjects: Sequence[Subject],
    reference: Subject | None = None,
    looks: Looks | None = None,
    *,
    quiet: bool = False,
) -> None:
    """Make and keep what is missing, each process its share; on return all of it is there.

    Raises Interrupted; NotFiniteError, in all processes of a launch, where a row's model draws no images in any.
    """
    if world().leads:
        for subject in subjects:
            for kept in subject.kept:
                kept.begin({name: value for name, value in asdict(subject.card).items() if name not in CIRCUMSTANCES})
    barrier()
    at_hand = AtHand(stage)

    def draw(subject: Subject, batch: slice) -> Observed:
        model = at_hand(subject)
        noise, began = noise_of(stage, model, places_of(batch)), time.perf_counter()
        latents = model.sample(
            noise, protocol.prompts[batch], num_steps=subject.num_steps, guidance_scale=subject.guidance_scale
        )
        images = model.decode(latents).cpu()
        if not torch.isfinite(latents).all() or not torch.isfinite(images).all():
            half = stage.stage.dtype != "float32"
            hint = ", or overflow in this precision: leave it out, or try dtype: float32" if half else ": leave it out"
            raise NotFiniteError(
                f"{subject.label} draws no images in {steps(subject.num_steps)}: of prompts {batch.start:,} to "
                f"{batch.stop - 1:,} some values are not finite",
                f"Its weights may have diverged{hint}",
            )
        seconds = (time.perf_counter() - began) / len(noise)
        kept = images[: max(0, stage.stage.compared_samples - batch.start)]
        return {"seconds": np.full(len(images), seconds), "images": pixels(kept), **protocol.observe(images, batch)}

    def follow(subject: Subject, batch: slice) -> Observed:
        model = at_hand(subject)
        path = model.trajectory(
            noise_of(stage, model, places_of(batch)),
            protocol.prompts[batch],
            num_steps=stage.stage.straightness_steps,
            guidance_scale=subject.guidance_scale,
        )
        return bends_kept(path, max(0, PATHS - batch.start))

    images, diverged = [(subject, subject.images) for subject in subjects], None
    try:
        share(stage, stop, images, draw, stage.name, "images", quiet=quiet)
    except NotFiniteError as error:
        diverged = (error.message, error.hint)
    if told := [one for one in gather(diverged) if one]:
        raise NotFiniteError(*told[0])
    curved = [(subject, subject.paths) for subject in subjects if subject.paths]
    if curved:
        share(stage, stop, curved, follow, f"{stage.name} straightness", "paths", quiet=quiet)
    barrier()
    if looks is None or reference is None:
        return

    def look_beside(subject: Subject, batch: slice) -> Observed:
        images = [row.images.at(places_of(batch), "images") for row in (subject, reference)]
        return {"apart": looks.perception.apart(np.stack(images, axis=1))[:, 0]}

    def look_among(subject: Subject, batch: slice) -> Observed:
        groups, images = looks.groups[batch], dict[int, np.ndarray]()
        asked = {place: prompt for prompt, places in groups for place in places}
        if there := [place for place in asked if place < subject.images.count]:
            images |= zip(there, subject.images.at(there, "images"), strict=True)
        if further := [place for place in asked if place >= subject.images.count]:
            model = at_hand(subject)
            latents = model.sample(
                noise_of(stage, model, further),
                [asked[place] for place in further],
                num_steps=subject.num_steps,
                guidance_scale=subject.guidance_scale,
            )
            images |= zip(further, pixels(model.decode(latents).cpu()), strict=True)
        return {"apart": looks.perception.apart(np.stack([[images[place] for place in own] for _, own in groups]))}

    compared = [(subject, subject.gaps) for subject in subjects if subject.gaps]
    share(stage, stop, compared, look_beside, f"{stage.name} gaps", "images")
    among = [(subject, subject.own) for subject in subjects if subject.own]
    share(stage, stop, among, look_among, f"{stage.name} diversity", "prompts")
    barrier()


def share(
    stage: StageFolder,
    stop: Stop,
    rows: Sequence[tuple[Subject, Observations]],
    see: Callable[[Subject, slice], Observed],
    label: str,
    unit: str,
    *,
    quiet: bool = False,
) -> None:
    """Write every batch of this process's that is not there yet."""
    place = world()
    own = [batch for _, kept in rows for batch in kept.batches[place.rank :: place.size]]
    missing = [(subject, kept, batch) for subject, kept in rows for batch in kept.missing(place.rank, place.size)]
    total, left = (sum(batch.stop - batch.start for batch in batches) for batches in (own, [m[2] for m in missing]))
    with Progress(label, total=total, unit=unit, start=total - left, quiet=quiet or not place.leads) as progress:
        for subject, kept, batch in missing:
            leave_if(stop, stage)
            kept.write(batch, see(subject, batch), subject.card.circumstances())
            progress.update(progress.done + batch.stop - batch.start)


class AtHand:
    """The models of the rows, one at a time, each loaded when its first work is due."""

    def __init__(self, stage: StageFolder) -> None:
        self.stage = stage
        self.model: Model | None = None
        self.loaded: tuple[str, str] | None = None

    def __call__(self, subject: Subject) -> Model:
        wanted = (subject.entry.model, subject.entry.weights)
        if self.model is None or self.loaded != wanted:
            self.model, self.loaded = None, wanted  # the one before makes room first
            dtype = DTYPES[self.stage.stage.dtype]
            self.model = (
                subject.load(dtype)
                if subject.load
                else load_model(self.stage.locate_weights(*wanted), device=device(), dtype=dtype)
            )
        return self.model


def together(made: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several circumstances as one: "NVIDIA A100 and NVIDIA H100" where they differ, and of each library its versions.

    The size of a batch is left to the card: batches of another one are other files.
    """
    found: dict[str, Any] = {}
    for name in ("processes", "hardware"):
        if values := list(dict.fromkeys(one[name] for one in made if name in one)):
            found[name] = values[0] if len(values) == 1 else joined([str(value) for value in values])
    versions = [one["versions"] for one in made if "versions" in one]
    libraries = dict.fromkeys(library for own in versions for library in own)
    told = {library: dict.fromkeys(own[library] for own in versions if library in own) for library in libraries}
    return found | ({"versions": {library: joined([*values]) for library, values in told.items()}} if told else {})


def places_of(batch: slice) -> range:
    return range(batch.start, batch.stop)


def noise_of(stage: StageFolder, model: Model, places: Sequence[int]) -> Tensor:
    """The evaluation's noise at these places [N, C, H, W]: by index, so that it does not depend on the batches."""
    return torch.from_numpy(coupled_noise(stage.seed, "evaluate", places, model.latent_shape))


def pixels(images: Tensor) -> np.ndarray:
    """uint8 [N, H, W, 3], of images [N, 3, H, W]: uint8 already, or in [-1, 1]."""
    return in_bytes(images).permute(0, 2, 3, 1).numpy()


def features_of(observed: Observed) -> np.ndarray:
    """Of all images, or of all their cells: [N, D]."""
    found = observed["features"]
    return found.reshape(-1, found.shape[-1])


def bends_kept(path: Trajectory, whole: int) -> dict[str, np.ndarray]:
    """What S(Z) needs of each path, and the states of the first `whole`."""
    bends = Bends.of(path)
    return {
        "deviations": bends.deviations.numpy(),
        "lengths": bends.lengths.numpy(),
        "states": path.states[:, :whole].transpose(0, 1).cpu().numpy(),
        "times": np.broadcast_to(bends.times.numpy(), (len(bends.lengths), len(bends.times))),
    }


def bends_of(observed: Observed) -> Bends:
    """The paths that `bends_kept` kept, of all batches."""
    deviations, lengths, times = (torch.from_numpy(observed[name]) for name in ("deviations", "lengths", "times"))
    return Bends(deviations, lengths, times[0])


def leave_if(stop: Stop, stage: StageFolder) -> None:
    if stop():
        raise Interrupted(f"Stage '{stage.name}' stopped ({stop.signal})", f"To go on: {stage.command()}")
