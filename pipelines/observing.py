"""The work of an evaluation: every row's images and every flow's paths, shared by the processes and kept on disk."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from instaflow.couplings.noise import coupled_noise
from instaflow.errors import Interrupted
from instaflow.evaluation.card import Card
from instaflow.evaluation.features import in_bytes
from instaflow.evaluation.observations import Observations, Observed
from instaflow.evaluation.report import labelled
from instaflow.flow.straightness import Bends, Trajectory
from instaflow.interruption import Stop
from instaflow.models.device import device
from instaflow.models.loading import DTYPES, load_model
from instaflow.models.model import Model
from instaflow.progress import Progress
from instaflow.rundir import StageFolder
from instaflow.sections import EvaluatedModel
from instaflow.world import barrier, world
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
    """Of a model that is sampled in several steps, once for each guidance scale."""
    load: Callable[[torch.dtype], Model] | None = None
    """Makes the model in a precision, where its weights lie in no folder of one."""

    @property
    def num_steps(self) -> int:
        return self.card.num_steps

    @property
    def guidance_scale(self) -> float:
        return self.card.guidance_scale

    @property
    def swept(self) -> bool:
        return len(self.entry.scales) > 1

    @property
    def label(self) -> str:
        return labelled(self.entry.model, self.entry.weights, self.guidance_scale if self.swept else None)


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
    def seconds(self) -> float:
        """An image took."""
        return float(np.median(self.observed["seconds"]))

    @property
    def images(self) -> np.ndarray:
        """The first ones, as many as are kept: uint8 [N, H, W, 3]."""
        return self.observed["images"]


def observe(
    stage: StageFolder, stop: Stop, protocol: Judging, subjects: Sequence[Subject], *, quiet: bool = False
) -> None:
    """Make and keep what is missing, each process its share; on return all of it is there."""
    if world().leads:
        for subject in subjects:
            for kept in filter(None, (subject.images, subject.paths)):
                kept.begin(asdict(subject.card))
    barrier()

    def draw(model: Model, subject: Subject, batch: slice) -> Observed:
        noise, began = noise_of(stage, model, batch), time.perf_counter()
        latents = model.sample(
            noise, protocol.prompts[batch], num_steps=subject.num_steps, guidance_scale=subject.guidance_scale
        )
        images = model.decode(latents).cpu()
        seconds = (time.perf_counter() - began) / len(noise)
        kept = images[: max(0, stage.stage.compared_samples - batch.start)]
        return {"seconds": np.full(len(images), seconds), "images": pixels(kept), **protocol.observe(images, batch)}

    def follow(model: Model, subject: Subject, batch: slice) -> Observed:
        path = model.trajectory(
            noise_of(stage, model, batch),
            protocol.prompts[batch],
            num_steps=stage.stage.straightness_steps,
            guidance_scale=subject.guidance_scale,
        )
        return bends_kept(path, max(0, PATHS - batch.start))

    images = [(subject, subject.images) for subject in subjects]
    share(stage, stop, images, draw, stage.name, "images", quiet=quiet)
    curved = [(subject, subject.paths) for subject in subjects if subject.paths]
    if curved:
        share(stage, stop, curved, follow, f"{stage.name} straightness", "paths", quiet=quiet)
    barrier()


def share(
    stage: StageFolder,
    stop: Stop,
    rows: Sequence[tuple[Subject, Observations]],
    see: Callable[[Model, Subject, slice], Observed],
    label: str,
    unit: str,
    *,
    quiet: bool,
) -> None:
    """Write every batch of this process's that is not there yet; a model is loaded when its first one is due."""
    place = world()
    own = [batch for _, kept in rows for batch in kept.batches[place.rank :: place.size]]
    missing = [(subject, kept, batch) for subject, kept in rows for batch in kept.missing(place.rank, place.size)]
    total, left = (sum(batch.stop - batch.start for batch in batches) for batches in (own, [m[2] for m in missing]))
    model, loaded = None, None
    with Progress(label, total=total, unit=unit, start=total - left, quiet=quiet or not place.leads) as progress:
        for subject, kept, batch in missing:
            leave_if(stop, stage)
            wanted = (subject.entry.model, subject.entry.weights)
            if model is None or loaded != wanted:
                model, loaded = None, wanted  # the one before makes room first
                dtype = DTYPES[stage.stage.dtype]
                model = (
                    subject.load(dtype)
                    if subject.load
                    else load_model(stage.locate_weights(*wanted), device=device(), dtype=dtype)
                )
            kept.write(batch, see(model, subject, batch))
            progress.update(progress.done + batch.stop - batch.start)


def noise_of(stage: StageFolder, model: Model, batch: slice) -> Tensor:
    """The evaluation's noise of a batch [N, C, H, W]: by index, so that it does not depend on the batches."""
    indices = range(batch.start, batch.stop)
    return torch.from_numpy(coupled_noise(stage.seed, "evaluate", indices, model.latent_shape))


def pixels(images: Tensor) -> np.ndarray:
    """uint8 [N, H, W, 3], of images [N, 3, H, W]: uint8 already, or in [-1, 1]."""
    return in_bytes(images).permute(0, 2, 3, 1).numpy()


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
