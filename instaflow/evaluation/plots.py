"""The report's plots: which figure goes on which axis."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from instaflow.evaluation.chance import whose
from instaflow.evaluation.report import (
    Floors,
    Gaps,
    LossCurve,
    PreviewCurve,
    Row,
    ScoreCurve,
    StraightnessProfile,
    Trajectories,
    distance_summary,
    labelled,
)
from instaflow.evaluation.row_words import said, told
from instaflow.evaluation.svg import Axis, Point, Series, axis_over, chart, polyline
from instaflow.evaluation.wording import number, percent, steps

Colours = dict[str, int]  # model's label -> index of the page's palette


ROUNDING = 1e-9  # a distance below this is 0, as that of a model from its copy
TO_REAL = "Fréchet distance to the real images"


def quality_plots(rows: Sequence[Row], floors: Floors, colours: Colours, judged: str = "prompts") -> list[str]:
    """Distances and errors against steps, all log-log, one line a model: lower is better.

    judged: what the errors are a share of.
    """
    wrong = f"{judged.capitalize()} not drawn right"
    again = _finite((floors.teacher_again, "its images against those of other noise"))
    error = 1 - floors.reader_accuracy if floors.reader_accuracy is not None else None
    to_real = [(row, row.frechet_distance_real) for row in rows]
    to_teacher = [(row, row.frechet_distance_teacher) for row in rows]
    errors = [(row, _error(row)) for row in rows]
    ticks = sorted({row.num_steps for row in rows})
    count = Axis(label="steps", low=ticks[0], high=max(ticks[-1], 2 * ticks[0]), log=True, ticks=ticks)
    plots = [
        _quality_plot(to_real, "frechet_distance_real", colours, TO_REAL, _real(floors), count),
        _quality_plot(
            to_teacher,
            "frechet_distance_teacher",
            colours,
            f"Fréchet distance to the {whose(rows)}’s images",
            again,
            count,
        ),
        _quality_plot(errors, "prompt_accuracy", colours, wrong, _finite((error, "the reader’s own errors")), count),
    ]
    return [plot for plot in plots if plot]


def time_plot(rows: Sequence[Row], floors: Floors, colours: Colours) -> str:
    """Fréchet distance against the time that an image takes."""
    to_real = [(row, row.frechet_distance_real) for row in rows]
    return _quality_plot(to_real, "frechet_distance_real", colours, TO_REAL, _real(floors), None)


def _real(floors: Floors) -> list[tuple[float, str]]:
    halves, coded = (
        (floors.real_halves, "real images, half against half"),
        (floors.autoencoder, "autoencoder’s round trip"),
    )
    return _finite(halves, coded)


def cost_plot(rows: Sequence[Row], costs: Mapping[str, float | None], unit: str, colours: Colours) -> str:
    """Fréchet distance against what a model cost after the teacher, in some unit, one point each: at its fewest steps.

    A model without a cost is left out.
    """
    fewest: dict[str, Row] = {}
    for row in rows:
        if costs.get(row.model) and row.frechet_distance_real and row.weights == "ema":
            before = fewest.get(row.label)
            fewest[row.label] = row if before is None or row.num_steps < before.num_steps else before
    if len(fewest) < 2:
        return ""
    series = [
        Series(
            name=label,
            colour=colours[label],
            points=[(costs[row.model] or 0.0, row.frechet_distance_real or 0.0)],
            look="marked",
            titles=[f"{label}, {steps(row.num_steps)}: {told(row, 'frechet_distance_real')}"],
        )
        for label, row in fewest.items()
    ]
    points = [point for one in series for point in one.points]
    x = axis_over([x for x, _ in points], f"{unit} after the teacher", zero=True)
    y = axis_over([y for _, y in points], TO_REAL, log=True)
    return chart(series, x=x, y=y, title=f"Quality against {unit}")


def sweep_plots(rows: Sequence[Row], colours: Colours, judged: str = "prompts") -> list[tuple[str, str]]:
    """(model and steps, SVG): what guidance trades, a mark for each scale.

    Fréchet distance against prompts drawn right or, where nobody reads them, against CLIP score, as InstaFlow draws it.
    """
    swept: dict[str, list[tuple[float, float, Row]]] = {}
    for row in rows:
        found = row.clip_score if row.prompt_accuracy is None else row.prompt_accuracy
        if row.swept and found is not None and row.frechet_distance_real is not None:
            name = f"{labelled(row.model, row.weights)}, {steps(row.num_steps)}"
            swept.setdefault(name, []).append((found, row.frechet_distance_real, row))
    plots = []
    for name, marks in swept.items():
        marks = sorted(marks, key=lambda mark: mark[2].guidance_scale or 0.0)
        read = marks[0][2].prompt_accuracy is not None
        points = [(x, y) for x, y, _ in marks]
        scales = [f"{row.guidance_scale:g}" for *_, row in marks]
        kind = "prompt_accuracy" if read else "clip_score"
        titles = [
            f"guidance {scale}: {told(row, 'frechet_distance_real')}, {told(row, kind)}"
            for scale, (*_, row) in zip(scales, marks, strict=True)
        ]
        series = [Series(name=name, colour=colours[marks[0][2].label], points=points, look="marked", titles=titles)]
        x = axis_over([x for x, _ in points], f"{judged.capitalize()} drawn right" if read else "CLIP score")
        y = axis_over([y for _, y in points], TO_REAL)
        ends = [(points[end][0], f"guidance {scales[end]}") for end in (0, -1)]
        title = f"Guidance from {scales[0]} to {scales[-1]}"
        plots.append((name, chart(series, x=replace(x, percent=read), y=y, title=title, marks=ends)))
    return plots


def _finite(*floors: tuple[float | None, str]) -> list[tuple[float, str]]:
    return [(float(v), text) for v, text in floors if v is not None and math.isfinite(v) and v > 0]


def _error(row: Row) -> float | None:
    """1 - prompt accuracy, for a log scale: no error among N samples is drawn as half an error."""
    return None if row.prompt_accuracy is None else max(1 - row.prompt_accuracy, 0.5 / max(row.num_samples, 1))


def _quality_plot(
    measured: Sequence[tuple[Row, float | None]],
    figure: str,
    colours: Colours,
    label: str,
    floors: Sequence[tuple[float, str]],
    x: Axis | None,
) -> str:
    """One quantity against steps or, without an `x`, against milliseconds per image.

    figure: the rows' figure that it is; of a prompt accuracy what it lacks.
    """
    found = [(row, float(value)) for row, value in measured if value is not None and value > ROUNDING]
    if x is None:
        found = [(row, value) for row, value in found if (row.seconds_per_image or 0) > 0]
    if not found:
        return ""
    share = figure == "prompt_accuracy"
    series = []
    single = [model for model in colours if sum(row.label == model for row, _ in found) == 1]
    for model in dict.fromkeys(row.label for row, _ in found):
        own = sorted((pair for pair in found if pair[0].label == model), key=lambda pair: pair[0].num_steps)
        series.append(
            Series(
                name=model,
                colour=colours[model],
                points=[(row.num_steps if x else 1000 * (row.seconds_per_image or 0), value) for row, value in own],
                look="marked",
                titles=[
                    f"{row.label}, {steps(row.num_steps)}: {said(v, row.intervals.get(figure), share=share)}"
                    for row, v in own
                ],
                shift=14 * (single.index(model) - (len(single) - 1) / 2) if model in single else 0,
            )
        )
    y = axis_over([value for _, value in found] + [value for value, _ in floors], label, log=True)
    y = replace(y, low=y.low / (y.high / y.low) ** 0.05, percent=share)  # room for the floors' names
    along = "steps" if x else "time per image"
    x = x or axis_over([px for one in series for px, _ in one.points], "milliseconds per image", log=True)
    return chart(series, x=x, y=y, title=f"{label} against {along}", rules=floors)


def loss_plot(curve: LossCurve, colour: int) -> str:
    """The loss as logged, thin, and its mean over neighbours, bold; phases apart."""
    phases = list(curve.phases) or [""] * len(curve.loss)
    logged = zip(curve.samples_seen, curve.loss, phases, strict=True)
    points = [(float(x), float(y), phase) for x, y, phase in logged if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return ""
    y_values = [y for _, y, _ in points]
    log = min(y_values) > 0 and max(y_values) > 4 * min(y_values)
    series, marks = [], []
    for phase in dict.fromkeys(phase for *_, phase in points):
        own = [(x, y) for x, y, p in points if p == phase]
        series.append(Series(name=curve.stage, colour=colour, points=_thinned(own, 600), look="faint"))
        series.append(Series(name=curve.stage, colour=colour, points=_smoothed(own)))
        if len(set(phases)) > 1:
            marks.append((own[0][0], phase))
    x = Axis(label="training samples seen", low=0, high=max(max(x for x, *_ in points), 1))
    y = axis_over(y_values, "Loss, log scale" if log else "Loss", log=log)
    return chart(series, x=x, y=y, title=f"Loss of {curve.stage}", marks=marks)


def preview_plots(curves: Sequence[PreviewCurve], colours: Colours) -> list[str]:
    """Distance and Fréchet distance to the couplings against samples seen, one line a stage."""
    labels = {"distance": "Distance to the coupled latents", "frechet_distance": "Fréchet distance to them"}
    plots = []
    for key, label in labels.items():
        series = []
        for curve in curves:
            pairs = zip(curve.samples_seen, getattr(curve, key), strict=True)
            points = [(float(x), float(y)) for x, y in pairs if y > 0]
            titles = [f"{curve.stage} at {x:,.0f} samples: {number(y)}" for x, y in points]
            series.append(
                Series(name=curve.stage, colour=colours[curve.stage], points=points, look="marked", titles=titles)
            )
        points = [point for one in series for point in one.points]
        if points:
            x = Axis(label="training samples seen", low=0, high=max(x for x, _ in points))
            y = axis_over([y for _, y in points], label, log=True)
            plots.append(chart([one for one in series if one.points], x=x, y=y, title=f"{label} over training"))
    return plots


def score_plots(curves: Sequence[ScoreCurve], rules: Sequence[tuple[str, Row]], colours: Colours) -> list[str]:
    """A row's figures against training samples seen, one line a curve; a set of plots for each number of steps.

    rules: rows to compare with, each with its name: dashed; those of a curve's own model beside its steps alone.
    """
    of = whose([row for curve in curves for row in curve.rows])
    kinds: dict[str, tuple[str, Callable[[Row], float | None]]] = {
        "Fréchet distance to the real images": ("log", lambda row: row.frechet_distance_real),
        f"Fréchet distance to the {of}’s images": ("log", lambda row: row.frechet_distance_teacher),
        "Drawn right": ("percent", lambda row: row.prompt_accuracy),
        "CLIP score": ("", lambda row: row.clip_score),
    }
    plots = []
    counts = sorted({curve.num_steps for curve in curves})
    for count, (label, (form, figure_of)) in product(counts, kinds.items()):
        series = []
        for curve in (curve for curve in curves if curve.num_steps == count):
            found = zip(curve.samples_seen, map(figure_of, curve.rows), strict=True)
            points = [(float(x), at) for x, value in found if (at := _drawable(value, form)) is not None]
            told = [percent(y) if form == "percent" else number(y) for _, y in points]
            titles = [f"{curve.label} at {x:,.0f} samples: {text}" for (x, _), text in zip(points, told, strict=True)]
            series.append(
                Series(name=curve.label, colour=colours[curve.label], points=points, look="marked", titles=titles)
            )
        points = [point for one in series for point in one.points]
        if not points:
            continue
        labels = {curve.label for curve in curves}
        beside = [(name, row) for name, row in rules if row.num_steps == count or row.label not in labels]
        lines = [(at, name) for name, row in beside if (at := _drawable(figure_of(row), form)) is not None]
        drawn, title = [one for one in series if one.points], f"{label}, {steps(count)}" if counts[1:] else label
        x = Axis(label="training samples seen", low=0, high=max(x for x, _ in points))
        y = axis_over([y for _, y in points] + [y for y, _ in lines], title, log=form == "log")
        y = replace(y, percent=form == "percent")
        plots.append(chart(drawn, x=x, y=y, title=f"{title} over training", rules=lines))
    return plots


def _drawable(value: float | None, form: str) -> float | None:
    return None if value is None or not math.isfinite(value) or (form == "log" and value <= 0) else float(value)


def _thinned(points: Sequence[Point], most: int) -> list[Point]:
    return list(points[:: max(1, math.ceil(len(points) / most))])


def _smoothed(points: Sequence[Point], bins: int = 40) -> list[Point]:
    groups = np.array_split(np.asarray(points), min(bins, max(1, len(points) // 3)))
    return [(float(x), float(y)) for x, y in (group.mean(axis=0) for group in groups)]


def straightness_plot(profiles: Sequence[StraightnessProfile], colours: Colours) -> str:
    series = []
    for profile in profiles:
        pairs = zip(profile.times, profile.values, strict=True)
        points = [(float(t), float(value)) for t, value in pairs if math.isfinite(value)]
        series.append(Series(name=profile.model, colour=colours[profile.model], points=points))
    values = [value for one in series for _, value in one.points]
    if not values:
        return ""
    x = Axis(label="time: noise at 0, data at 1", low=0, high=1)
    y = axis_over(values, "Squared departure from the straight line, relative", zero=True)
    return chart(series, x=x, y=y, title="Straightness over time")


def gap_plot(gaps: Gaps, colours: Colours) -> str:
    """Histograms of the distances to the teacher's images, with the student's 95th percentile."""
    finite = {m: [float(v) for v in values if math.isfinite(v)] for m, values in gaps.distances.items()}
    finite = {model: values for model, values in finite.items() if values}
    if gaps.student not in finite:
        return ""
    high = max(max(values) for values in finite.values()) or 1.0
    if gaps.unrelated is not None and math.isfinite(gaps.unrelated):
        high = max(high, gaps.unrelated)
    edges = np.linspace(0, 1.04 * high, 53)
    series, top = [], 0.0
    for model, values in finite.items():
        counts = np.histogram(values, edges)[0] / len(values)
        outline = [(float(e), float(c)) for i, c in enumerate(counts) for e in edges[i : i + 2]]
        series.append(Series(name=model, colour=colours[model], points=[(0.0, 0.0), *outline]))
        top = max(top, float(counts.max()))
    summary = distance_summary(finite[gaps.student])
    marks = [(summary["percentile_95"], "95 %")]
    if gaps.unrelated is not None and math.isfinite(gaps.unrelated):
        marks.append((gaps.unrelated, "other noise"))
    x = Axis(label=gaps.measure, low=0, high=float(edges[-1]))
    y = Axis(label="Share of images", low=0, high=1.12 * top, percent=True)
    return chart(series, x=x, y=y, title=f"How far the images lie from those of {gaps.teacher}", marks=marks)


def path_plots(trajectories: Sequence[Trajectories], colours: Colours) -> list[tuple[str, str]]:
    """(model, SVG): its paths on the same scale as the others', with the straight line from end to end beneath."""
    points = np.array([point for one in trajectories for path in one.paths for point in path])
    if not len(points) or not np.isfinite(points).all():
        return []
    low, high = points.min(axis=0), points.max(axis=0)
    width, margin = 420, 12
    scale = (width - 2 * margin) / max(high[0] - low[0], 1e-9)
    scale = min(scale, 300 / max(high[1] - low[1], 1e-9))
    height = round(scale * (high[1] - low[1])) + 2 * margin
    side = (width - scale * (high[0] - low[0])) / 2

    def at(point: Point) -> Point:
        return float(side + scale * (point[0] - low[0])), float(margin + scale * (high[1] - point[1]))

    drawn = []
    for one in trajectories:
        colour, parts = colours[one.model], []
        for path in one.paths:
            pixels = [at(point) for point in path]
            parts.append(f'<path class="chord" d="{polyline([pixels[0], pixels[-1]])}"/>')
            parts.append(f'<path class="line c{colour}" d="{polyline(pixels)}"/>')
            for name, (x, y) in (("start", pixels[0]), (f"end c{colour}", pixels[-1])):
                parts.append(f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Paths from noise to data">'
        drawn.append((one.model, f"{head}{''.join(parts)}</svg>"))
    return drawn
