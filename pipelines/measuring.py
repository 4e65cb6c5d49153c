"""How an evaluation measures what was sampled: a row's figures, by what they are measured, and the words for that."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from instaflow import __version__
from instaflow.evaluation import intervals
from instaflow.evaluation.frechet import Gaussian, frechet_distance, influence
from instaflow.evaluation.kernel_distance import kernel_distance
from instaflow.evaluation.precision_recall import precision_recall
from instaflow.evaluation.presets import PRESETS
from instaflow.evaluation.report import Floors, Protocol, Row
from instaflow.evaluation.wording import steps
from instaflow.models.device import device
from instaflow.models.loading import load_model
from instaflow.rundir import StageFolder
from instaflow.world import hardware
from pipelines.judging import Judging
from pipelines.observing import Looks, Measured, Subject, features_of

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
    taught: np.ndarray
    """The reference's features [N, D]; none without one."""
    of_taught: Gaussian | None
    called: str
    """What the reference is called in a row."""

    @classmethod
    def by(cls, protocol: Judging, real: np.ndarray, reference: Measured | None, kind: str = "teacher") -> "Measure":
        """real: features of the real images [N, D]. kind: the reference's."""
        called = "teacher" if kind == "teacher" else "reference"
        taught = features_of(reference.observed()) if reference else np.empty((0, real.shape[1]))
        return cls(
            protocol, real, Gaussian.of(real), reference, taught, Gaussian.of(taught) if reference else None, called
        )

    def row(self, m: Measured, kind: str) -> Row:
        """All figures of what was sampled, but for straightness, which is its paths'."""
        observed, card = m.observed(), m.subject.told_card()
        features = features_of(observed)
        of_row = Gaussian.of(features)
        manifolds = precision_recall(features, self.real, device=device())
        subset = subset_size(self.protocol, m.subject.images.count)
        apart = kernel_distance(features, self.real, subsets=self.protocol.kernel_subsets, subset_size=subset)
        to_teacher = frechet_distance(of_row, self.of_taught) if self.of_taught else None
        parts = self.parts(m, observed, features, of_row)
        return Row(
            model=m.subject.entry.model,
            kind=kind,
            num_steps=m.subject.num_steps,
            guidance_scale=m.subject.guidance_scale,
            weights=m.subject.card.weights,
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
            compared_with=self.called,
            card=card,
            parts=parts,
            intervals=half_widths(parts),
        )

    def parts(
        self, m: Measured, observed: dict[str, np.ndarray], features: np.ndarray, of_row: Gaussian
    ) -> dict[str, np.ndarray]:
        """What each image, or each prompt, adds to a row's figures: see `Row.parts`.

        The reference's images are of the same prompts and noise, and vary with the row's.
        """

        def by_image(influences: np.ndarray) -> np.ndarray:
            return influences.reshape(m.subject.images.count, -1).mean(axis=1)

        found = {"frechet_distance_real": by_image(influence(features, of_row, self.of_real))}
        if self.of_taught and m is not self.reference:
            both = influence(features, of_row, self.of_taught) + influence(self.taught, self.of_taught, of_row)
            found["frechet_distance_teacher"] = by_image(both)
        found |= self.protocol.parts(observed)
        if len(m.pixel_gaps):
            found["pixel_gap"] = m.pixel_gaps
        if m.gaps is not None:
            found["perceptual_gap"] = m.gaps
        if m.own is not None:
            found["diversity"] = m.own.mean(axis=1)
        return found


def half_widths(parts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of the figures' 95 % intervals; of shares Wilson's, as if an image were right or wrong as a whole."""
    found = {
        name: intervals.of_share(min(float(own.mean()), 1.0), len(own))
        if name.startswith("prompt_accuracy")
        else intervals.of_mean(own)
        for name, own in parts.items()
    }
    return {name: half for name, half in found.items() if half is not None}


def subset_size(protocol: Judging, count: int) -> int:
    """How many samples are in one of the kernel distance's subsets, of `count` images."""
    return min(KERNEL_SUBSET, count * protocol.side**2, protocol.num_real)


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
        network = f"{looks.perception.words} ('{settings.perceptual.network}')" if own else str(looks.perception)
        looked = f"{network}; diversity of {looks}"
    unseen = int(protocol.unseen.sum())
    few = PRESETS[settings.protocol].told_of_samples(settings.count) if settings.of_images else ""
    return Protocol(
        samples=f"{settings.count:,} prompts"
        + (f", {few}" if few else "")
        + (f", drawn from COCO's captions by seed {settings.captions_seed}" if settings.draws_captions else "")
        + (f", {unseen:,} of them in words that no training stage saw together" if unseen else ""),
        noise=f"Philox, keyed by seed {stage.seed} and 'evaluate': no training stage saw it; the same for every model",
        features=protocol.features_in_words,
        reference_real=protocol.reference_in_words,
        reference_teacher=f"the images of {reference.subject.entry.model} in {steps(reference.subject.num_steps)}, "
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
