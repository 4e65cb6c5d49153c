"""A report with every part, small enough to read, and of plausible figures."""

from dataclasses import replace

import numpy as np

from instaflow.evaluation.intervals import of_share
from instaflow.evaluation.report import (
    Floors,
    Gallery,
    GalleryRow,
    Gap,
    Gaps,
    LossCurve,
    Neighbour,
    Neighbours,
    PreviewCurve,
    Protocol,
    Report,
    Row,
    ScoreCurve,
    Stage,
    StartCheck,
    StraightnessProfile,
    Strip,
)
from instaflow.evaluation.trajectories import project

KINDS = {"teacher": "teacher", "2rf": "flow", "student": "student", "direct": "direct"}


CARD = {
    "model_content": "0123456789abcdef0123",
    "weights": "ema",
    "sampler": "DPMSolverMultistepScheduler",
    "dtype": "float32",
    "protocol": "digits",
    "num_samples": 2000,
    "prompts": "2,000 prompts, SHA-256 76543210",
    "batch_size": 100,
    "processes": 1,
    "hardware": "2 CPU cores",
    "versions": {"torch": "2.15.0"},
}
SPREAD = {
    "frechet_distance_real": 0.04,
    "frechet_distance_teacher": 0.1,
    "pixel_gap": 0.02,
    "perceptual_gap": 0.02,
    "diversity": 0.015,
}
"""Half of a figure's interval, as a share of it."""


def row(model: str, num_steps: int, real: float | None, teacher: float | None, accuracy: float | None) -> Row:
    straight = {"teacher": 0.284, "2rf": 0.031}.get(model)
    return Row(
        model=model,
        kind=KINDS[model],
        num_steps=num_steps,
        guidance_scale=2.0 if model == "teacher" else 1.0,
        weights="ema",
        num_samples=2000,
        frechet_distance_real=real,
        frechet_distance_teacher=teacher,
        prompt_accuracy=accuracy,
        seconds_per_image=0.0027 * num_steps,
        straightness=None if straight is None else 130 * straight,
        straightness_relative=straight,
        prompt_accuracy_unseen=accuracy,
        pixel_gap=None if teacher is None else 0.3 * teacher,
        perceptual_gap=None if teacher is None else 0.7 * teacher,
        diversity={"teacher": 0.36, "student": 0.3}.get(model, 0.35),
        card={**CARD, "model": model, "num_steps": num_steps},
    )


ROWS = [
    row("teacher", 25, 0.271, None, 0.9955),
    row("teacher", 4, 0.912, 0.521, 0.985),
    row("teacher", 1, 6.41, 5.93, 0.713),
    row("2rf", 25, 0.341, 0.061, 0.9945),
    row("2rf", 1, 0.523, 0.272, 0.9865),
    row("student", 1, 0.312, 0.071, 0.9925),
    row("direct", 1, 0.378, 0.084, 0.991),
]
ON_TWO = {"processes": 2, "hardware": "a GPU"}
STAGES = [
    Stage(name="teacher", kind="teacher", seconds=158.0, samples=640_000),
    Stage(
        name="pairs", kind="couple", description="25 steps", parents=["teacher"], seconds=41.0, **ON_TWO, samples=4096
    ),
    Stage(name="2rf", kind="reflow", parents=["teacher", "pairs"], seconds=78.0, **ON_TWO, samples=320_000),
    Stage(name="pairs2", kind="couple", parents=["2rf"], seconds=22.0, **ON_TWO, samples=4096),
    Stage(name="student", kind="distill", parents=["2rf", "pairs2"], seconds=66.0, **ON_TWO, samples=260_000),
    Stage(name="direct", kind="distill", parents=["teacher", "pairs"], seconds=139.0, **ON_TWO, samples=580_000),
    Stage(name="report", kind="evaluate", parents=["teacher", "2rf", "student", "direct"], seconds=47.0),
]


def image(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, dtype=np.uint8)


def full_report() -> Report:
    times = np.linspace(0, 1, 6)
    straight = np.linspace([0.0, 0.0, 1.0], [1.0, 2.0, 3.0], 6)
    bent = straight + np.sin(np.pi * times)[:, None] * [0.5, 0.0, 0.0]
    prompts = ["a handwritten seven", "an odd digit"]
    samples = [64.0 * i for i in range(1, 31)]
    distances = [0.01 * i for i in range(1, 101)]
    return Report(
        title="One-step digits",
        config="digits",
        seed=0,
        hardware="2 CPU cores",
        protocol=Protocol(samples="2,000 prompts", features="64 pixels", weights="EMA", notes={"Reader": "an SVC"}),
        rows=ROWS,
        versions={"torch": "2.15.0"},
        peak_memory=1.8e9,
        floors=Floors(real_halves=0.118, autoencoder=0.094, teacher_again=0.041, reader_accuracy=0.9889),
        stages=STAGES,
        losses=[LossCurve(stage="2rf", samples_seen=samples, loss=[1 / s for s in samples], phases=["l2"] * 30)],
        previews=[
            PreviewCurve(stage="2rf", samples_seen=[640, 1280], distance=[0.7, 0.4], frechet_distance=[0.2, 0.0]),
            PreviewCurve(stage="student", samples_seen=[640], distance=[0.33], frechet_distance=[0.011]),
        ],
        scores=[
            ScoreCurve(
                samples_seen=[640, 1280],
                rows=[row("student", 1, 0.702, 0.41, 0.951), row("student", 1, 0.466, 0.133, None)],
            )
        ],
        checks=[StartCheck(stage="2rf", what="distance to DDIM", value=3e-6, expected="below 0.0001")],
        gallery=Gallery(
            prompts=prompts,
            rows=[
                GalleryRow(model=r.model, kind=r.kind, num_steps=r.num_steps, images=[image(i), image(99)])
                for i, r in enumerate(ROWS)
            ],
            choice="The first two prompts of the evaluation.",
        ),
        gaps=Gaps(
            student="student",
            teacher="teacher",
            measure="mean difference of pixels",
            distances={"student": distances, "direct": [2 * d for d in distances]},
            worst=[Gap(prompt="an odd digit", teacher_image=image(5), student_image=image(6), distance=1.0)],
            unrelated=0.8,
        ),
        strips=[Strip(prompt="a handwritten seven", images=[image(i) for i in range(5)])],
        neighbours=Neighbours(
            model="student",
            shown=[Neighbour(prompt="a handwritten seven", image=image(3), real=image(4), distance=0.5)],
            median=1.2,
            real_median=1.1,
        ),
        straightness=[
            StraightnessProfile(model="teacher", times=list(times), values=[0.3] * 6),
            StraightnessProfile(model="2rf", times=list(times), values=[0.03] * 6),
        ],
        trajectories=project({"teacher": np.stack([bent, bent + 1]), "2rf": np.stack([straight, straight + 1])}),
    )


def with_distance(model: str, real: float | None) -> Report:
    """The full report, but for one model's distance to the real images at one step."""
    changed = [replace(r, frechet_distance_real=real) if (r.model, r.num_steps) == (model, 1) else r for r in ROWS]
    return replace(full_report(), rows=changed)


def spread(one: Row) -> Row:
    """A row with its figures' intervals."""
    values = {name: getattr(one, name) for name in SPREAD}
    intervals = {name: SPREAD[name] * value for name, value in values.items() if value is not None}
    if one.prompt_accuracy is not None:
        intervals["prompt_accuracy"] = of_share(one.prompt_accuracy, one.num_samples)
    return replace(one, intervals=intervals)


SPREAD_ROWS = [spread(one) for one in ROWS]


def spread_report() -> Report:
    """The full report with intervals."""
    return replace(full_report(), rows=SPREAD_ROWS)


FOLDER = "/data/experiments/2026/night/teacher/model"


def crowded_report() -> Report:
    """Twenty rows: two models swept over guidance, a teacher that is a folder, rows of another report, raw weights."""
    by_name = {(one.model, one.num_steps): one for one in ROWS}
    swept = [
        replace(
            by_name[model, 1],
            num_steps=num_steps,
            guidance_scale=scale,
            swept=True,
            frechet_distance_real=best + 0.02 * abs(scale - 2) + 0.01 * num_steps,
            clip_score=0.2 + 0.01 * scale,
            kernel_distance=0.0012 * scale,
            precision=0.8 - 0.01 * scale,
            recall=0.7,
        )
        for model, best in (("student", 0.3), ("direct", 0.35))
        for scale in (1.0, 2.0, 3.0)
        for num_steps in (1, 2)
    ]
    folder = [replace(one, model=FOLDER, card={**one.card, "model": FOLDER}) for one in ROWS[:3]]
    earlier = {"beside": True, "frechet_distance_teacher": None, "pixel_gap": None, "perceptual_gap": None}
    night = replace(by_name["student", 1], model="night/student", **earlier)
    other = replace(folder[1], model=f"night/{FOLDER}", seconds_per_image=None, **earlier)
    raw = replace(by_name["student", 1], weights="raw", frechet_distance_real=None)
    rows = [spread(one) for one in (*folder, *ROWS[3:5], *swept, raw, night, other)]
    return replace(full_report(), rows=rows, gallery=None, gaps=None, straightness=[], trajectories=[])
