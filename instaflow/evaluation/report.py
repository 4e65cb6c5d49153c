"""What an experiment found, as plain data: the rows, floors, stages, curves and images that a report shows."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from instaflow.sections import Aim

# [H, W, 3] or [H, W] uint8, or a PIL image
Picture = np.ndarray | Image.Image


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model at one number of steps.

    kind: "teacher", "flow" (after reflow), "student" (distilled after reflow), "direct" (distilled from the teacher
    without reflow, the control), "progressive" (its steps halved, another control), "dmd" (distributions matched) or
    any other word, which is shown as it is; `model_kind` derives it from the stages.
    frechet_distance_teacher is 0 for the reference itself: the row all others are measured against, most often a
    teacher's. compared_with: what its model is called for that, "teacher", or "reference" of any other kind.
    prompt_accuracy_unseen is that of the caption template that no training stage saw.
    straightness: S(Z) = ∫ E||(Z1 - Z0) - v(Z_t, t)||² dt; straightness_relative is S(Z) / E||Z1 - Z0||².
    intervals: of the figures whose spread over prompts and noise is known, for model and reference as they are.
    cost: what its model cost after the teacher, in whatever runs (`training_samples`, `seconds`, `device_hours`,
    `devices`); empty where that is not known, None where the report's stages alone tell it.
    parts: what each prompt and its noise add to such a figure [N], up to a constant: two rows' are subtracted to know
    how far apart the rows are; in memory alone, no file holds them.
    """

    model: str
    kind: str
    num_steps: int
    guidance_scale: float | None
    weights: str  # "ema" or "raw"
    num_samples: int
    frechet_distance_real: float | None
    frechet_distance_teacher: float | None
    prompt_accuracy: float | None = None
    seconds_per_image: float | None
    straightness: float | None = None
    straightness_relative: float | None = None
    prompt_accuracy_unseen: float | None = None
    kernel_distance: float | None = None  # KID, to the real images
    precision: float | None = None
    recall: float | None = None
    clip_score: float | None = None
    pixel_gap: float | None = None  # to the reference's images of the same noise, the mean RMS difference of pixels
    perceptual_gap: float | None = None  # the same by a perceptual network
    diversity: float | None = None  # the mean perceptual distance of two images of one prompt from different noise
    swept: bool = False  # one of several guidance scales of its model
    compared_with: str = "teacher"
    beside: bool = False  # of an earlier report: shown beside this one's rows, and what is said is not of it
    intervals: Mapping[str, float] = field(default_factory=dict)  # figure -> half the width of its 95% interval
    cost: Mapping[str, Any] | None = None
    parts: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    card: Mapping[str, Any] = field(default_factory=dict)  # its protocol card: see `card.Card`

    def plain(self) -> dict[str, Any]:
        """All that a file holds of it."""
        told = dataclasses.asdict(dataclasses.replace(self, parts={}))
        return {name: value for name, value in told.items() if name != "parts"}

    @property
    def label(self) -> str:
        return labelled(self.model, self.weights, self.guidance_scale if self.swept else None)


@dataclass(frozen=True, kw_only=True)
class Floors:
    """What a perfect model could reach. Fréchet distances, except `reader_accuracy`."""

    real_halves: float | None = None  # one half of the real images against the other half
    autoencoder: float | None = None  # real images, encoded and decoded, against the real images
    teacher_again: float | None = None  # the reference's images against its images from other noise
    reader_accuracy: float | None = None  # the reader of prompts, on real images it was not trained on


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the experiment. description: one line, e.g. "25-step couplings of teacher, guidance 2"."""

    name: str
    kind: str  # the config's word: teacher, couple, reflow, distill, ...
    method: str = "instaflow"  # of distillation, the config's word
    description: str = ""
    parents: Sequence[str] = ()
    seconds: float | None = None
    samples: int | None = None  # couplings made, training samples seen, or images evaluated
    processes: int | None = None  # each with a device of its own: a GPU or, without one, the processor
    hardware: str = ""  # which device
    of_real_images: bool = False  # couplings that were not sampled, but inverted from data


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """A training stage's loss over samples seen; `phases` names each point's phase, e.g. "l2" then "lpips"."""

    stage: str
    samples_seen: Sequence[float]
    loss: Sequence[float]
    phases: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class PreviewCurve:
    """How near the moving average's samples came to the couplings on the way: in latents, for the same few noises."""

    stage: str
    samples_seen: Sequence[float]
    distance: Sequence[float]  # root mean square difference of a latent and the coupled one
    frechet_distance: Sequence[float]  # of the two sets, in latents averaged over 4×4 cells


@dataclass(frozen=True, kw_only=True)
class ScoreCurve:
    """A row as it was at checkpoints of its training: the same protocol, weights, steps and guidance."""

    samples_seen: Sequence[int]
    rows: Sequence[Row]

    @property
    def label(self) -> str:
        return self.rows[0].label

    @property
    def num_steps(self) -> int:
        return self.rows[0].num_steps


@dataclass(frozen=True, kw_only=True)
class StartCheck:
    """A check before a stage's first update: what was measured, its value, what it should be."""

    stage: str
    what: str
    value: float | str
    expected: str = ""


@dataclass(frozen=True, kw_only=True)
class GalleryRow:
    model: str
    kind: str
    num_steps: int
    images: Sequence[Picture]  # one per prompt of the gallery


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The same prompts and the same noise in every row; models by their label, as in all parts that follow."""

    prompts: Sequence[str]
    rows: Sequence[GalleryRow]
    choice: str = ""  # how they were chosen: "The first ten prompts of the evaluation."


@dataclass(frozen=True, kw_only=True)
class Gap:
    """One prompt and noise on which the student's image is far from its teacher's. reading: what the reader sees."""

    prompt: str
    teacher_image: Picture
    student_image: Picture
    distance: float
    teacher_reading: str = ""
    student_reading: str = ""


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """How far one-step images lie from the teacher's images of the same prompts and noise.

    distances: model's name -> one distance per prompt, the student's among them.
    worst: the student's largest, in falling order. measure: what the distance is, in words.
    unrelated: the median distance of two teacher images of the same prompt from different noise, for scale.
    """

    student: str
    teacher: str  # or what else the reference is
    measure: str
    distances: Mapping[str, Sequence[float]]
    worst: Sequence[Gap]
    unrelated: float | None = None


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A one-step model's images of one prompt while its noise turns from one into another, on the great circle."""

    prompt: str
    images: Sequence[Picture]


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """An image and the real one that is nearest to it in the features of the protocol."""

    prompt: str
    image: Picture
    real: Picture
    distance: float


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Whether a model draws real images from memory: then it lies nearer to one than they lie to one another.

    median: of the distances of its images to the real ones; real_median: of a real image to the nearest other.
    """

    model: str
    shown: Sequence[Neighbour]
    median: float
    real_median: float


@dataclass(frozen=True, kw_only=True)
class StraightnessProfile:
    """E||(Z1 - Z0) - v(Z_t, t)||² / E||Z1 - Z0||² at each time: 0 everywhere if and only if all paths are straight."""

    model: str
    times: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """The paths of a handful of noises, each a list of (x, y) from noise to data; see `trajectories.project`."""

    model: str
    paths: Sequence[Sequence[tuple[float, float]]]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How the figures were measured, in words; an empty entry is left out of the card."""

    samples: str = ""  # "2,000 prompts, 400 of them from a template no training stage saw"
    noise: str = ""  # "Philox, key of (seed 0, 'evaluate'), indices 0 to 1,999; no training stage saw it"
    features: str = ""  # "pixels of the image reduced to 8×8 grey levels, 64 dimensions"
    reference_real: str = ""  # "all 1,797 digits of scikit-learn's copy of the UCI set"
    reference_teacher: str = ""  # "2,000 images of teacher at 25 steps, guidance 2"
    reader: str = ""  # "an SVC trained on ... reads each image"
    judged: str = "prompts"  # what a prompt accuracy is the share of: "named cells"
    perceptual: str = ""  # "LPIPS 0.1 on AlexNet, weights 7be5be79; diversity of 4 images of each of 100 prompts"
    straightness: str = ""  # "256 noises, 100 Euler steps of the guided velocity"
    timing: str = ""  # "batch 100, float32, 2 CPU cores, text encoder and decoder included"
    weights: str = ""  # "EMA"
    notes: Mapping[str, str] = field(default_factory=dict)  # further entries, label -> text


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the page and the JSON file show; every part but the first six may be missing."""

    title: str
    config: str
    seed: int
    hardware: str
    protocol: Protocol
    rows: Sequence[Row]
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None  # the whole run; the sum of the stages where it is None
    peak_memory: float | None = None  # bytes
    floors: Floors = field(default_factory=Floors)
    stages: Sequence[Stage] = ()
    aims: Sequence[Aim] = ()
    losses: Sequence[LossCurve] = ()
    previews: Sequence[PreviewCurve] = ()
    scores: Sequence[ScoreCurve] = ()
    checks: Sequence[StartCheck] = ()
    gallery: Gallery | None = None
    gaps: Gaps | None = None
    strips: Sequence[Strip] = ()  # of the experiment's one-step model
    neighbours: Neighbours | None = None
    straightness: Sequence[StraightnessProfile] = ()
    trajectories: Sequence[Trajectories] = ()

    @property
    def total_seconds(self) -> float | None:
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return self.seconds if self.seconds is not None else (sum(known) if known else None)


def labelled(model: str, weights: str, guidance_scale: float | None = None) -> str:
    """A model's name as the page shows it: raw weights are said, the moving average goes without saying.

    guidance_scale: of a model that has several.
    """
    told = [
        *(["raw"] if weights == "raw" else []),
        *([] if guidance_scale is None else [f"guidance {guidance_scale:g}"]),
    ]
    return f"{model} ({', '.join(told)})" if told else model


def model_kind(name: str, stages: Sequence[Stage]) -> str:
    """The kind of the model that stage `name` makes, from its lineage.

    A distilled model is a "student" if reflow is among its ancestors, else "direct"; one of another method than
    InstaFlow's has that method's name. A model that no stage made is a "teacher".
    """
    by_name = {stage.name: stage for stage in stages}
    if name not in by_name:
        return "teacher"
    kind = by_name[name].kind
    if kind == "reflow":
        return "flow"
    if kind != "distill":
        return kind
    if (method := by_name[name].method) != "instaflow":
        return method
    return "student" if any(by_name[a].kind == "reflow" for a in _ancestors(name, by_name)) else "direct"


def _ancestors(name: str, by_name: Mapping[str, Stage]) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for parent in by_name[waiting.pop()].parents:
            if parent in by_name and parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found


def report_json(report: Report) -> dict[str, Any]:
    """`report` as values that strict JSON can hold: no images, and null for a number that is not finite."""
    content: dict[str, Any] = {
        "title": report.title,
        "config": report.config,
        "seed": report.seed,
        "hardware": report.hardware,
        "versions": dict(report.versions),
        "seconds": report.total_seconds,
        "peak_memory": report.peak_memory,
        "protocol": dataclasses.asdict(report.protocol),
        "floors": dataclasses.asdict(report.floors),
        "rows": [row.plain() for row in report.rows],
        "stages": [dataclasses.asdict(stage) for stage in report.stages],
        "aims": [aim.model_dump() for aim in report.aims],
        "scores": [
            {"samples_seen": curve.samples_seen, "rows": [row.plain() for row in curve.rows]} for curve in report.scores
        ],
        "checks": [dataclasses.asdict(check) for check in report.checks],
        "straightness_profiles": [dataclasses.asdict(profile) for profile in report.straightness],
        "gaps": _gaps_json(report.gaps) if report.gaps else None,
        "neighbours": _neighbours_json(report.neighbours) if report.neighbours else None,
    }
    return plain(content)


def _gaps_json(gaps: Gaps) -> dict[str, Any]:
    return {
        "student": gaps.student,
        "teacher": gaps.teacher,
        "measure": gaps.measure,
        "unrelated": gaps.unrelated,
        "distances": {model: distance_summary(values) for model, values in gaps.distances.items()},
        "worst": [
            {
                "prompt": gap.prompt,
                "distance": gap.distance,
                "teacher_reading": gap.teacher_reading,
                "student_reading": gap.student_reading,
            }
            for gap in gaps.worst
        ],
    }


def _neighbours_json(neighbours: Neighbours) -> dict[str, Any]:
    shown = [{"prompt": one.prompt, "distance": one.distance} for one in neighbours.shown]
    told = {key: getattr(neighbours, key) for key in ("model", "median", "real_median")}
    return {**told, "shown": shown}


def distance_summary(distances: Sequence[float]) -> dict[str, float]:
    """count, median, percentile_95 and largest of the finite ones among `distances`; nan where there is none."""
    values = np.asarray(distances, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return {"count": 0, "median": math.nan, "percentile_95": math.nan, "largest": math.nan}
    return {
        "count": len(values),
        "median": float(np.median(values)),
        "percentile_95": float(np.percentile(values, 95)),
        "largest": float(values.max()),
    }


def plain(value: Any) -> Any:
    """What JSON can hold of it; None in place of a figure that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
