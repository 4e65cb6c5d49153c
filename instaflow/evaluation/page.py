"""The report as one self-contained HTML page, in the order of its story."""

import math
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from instaflow.evaluation import findings, sketch
from instaflow.evaluation.parts import figure, gallery_grid, gap_grid, legend, pairs_list, rows_table, stage_bars
from instaflow.evaluation.plots import Colours, gap_plot, loss_plot, path_plots, quality_plots, straightness_plot
from instaflow.evaluation.report import Report, Row
from instaflow.evaluation.style import LIGHT, STYLE
from instaflow.evaluation.wording import duration, is_number, joined, memory, number, percent, steps
from instaflow.files import write_file


def write_page(path: Path, report: Report) -> None:
    """Write `report` to `path`: one file that needs no network and no script, the same bytes for the same report."""
    write_file(path, page(report))


def page(report: Report) -> str:
    report = without_broken(report)
    colours = model_colours(report)
    sections = [
        _header(report),
        _gallery(report, colours),
        _idea(),
        _story(report, colours),
        _quality(report, colours),
        _gaps(report, colours),
        _cost(report, colours),
        _protocol(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def without_broken(report: Report) -> Report:
    """`report` with None for every figure of a row that is not finite: a broken measurement is a missing one."""

    def clean(row: Row) -> Row:
        figures = {key: value for key, value in vars(row).items() if isinstance(value, float)}
        missing: dict[str, Any] = {key: None for key, value in figures.items() if not math.isfinite(value)}
        return replace(row, **missing)

    return replace(report, rows=[clean(row) for row in report.rows])


def model_colours(report: Report) -> Colours:
    """A colour per model: teacher, flow, student and direct always the same ones, the others in turn."""
    kinds = {row.model: row.kind for row in report.rows}
    if report.gallery:
        kinds = {row.model: row.kind for row in report.gallery.rows} | kinds
    extra = [profile.model for profile in report.straightness] + [one.model for one in report.trajectories]
    extra += [curve.stage for curve in report.losses] + [stage.name for stage in report.stages]
    extra += list(report.gaps.distances) if report.gaps else []
    usual = {"teacher": 0, "flow": 1, "student": 2, "direct": 3}
    colours: Colours = {}
    for model, kind in kinds.items():
        slot = usual.get(kind)
        if slot is not None and slot not in colours.values():
            colours[model] = slot
    for model in [*kinds, *extra]:
        free = [slot for slot in range(len(LIGHT)) if slot not in colours.values()]
        if model not in colours:
            colours[model] = free[-1] if free and model not in kinds else free[0] if free else len(colours) % len(LIGHT)
    return colours


def _section(title: str, *parts: str) -> str:
    inside = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>" if inside else ""


def _paragraph(sentences: Sequence[str], style: str = "") -> str:
    attribute = f' class="{style}"' if style else ""
    return f"<p{attribute}>{escape(' '.join(sentences))}</p>" if sentences else ""


def _header(report: Report) -> str:
    best, teacher = findings.result(report), findings.reference(report)
    cards = []

    def card(value: str, label: str, beside: str) -> None:
        inside = f'<div class="value">{escape(value)}</div><div class="label">{escape(label)}</div>'
        cards.append(f'<div>{inside}<div class="small soft">{escape(beside)}</div></div>')

    def of_teacher(value: str) -> str:
        return f"{teacher.model}, {steps(teacher.num_steps)}: {value}" if teacher else ""

    if best and best.model != (teacher and teacher.model):
        at = f"{best.model}, {steps(best.num_steps)}"
        if best.frechet_distance_real is not None:
            beside = of_teacher(number(teacher.frechet_distance_real)) if teacher else ""
            card(number(best.frechet_distance_real), f"Fréchet distance, {at}", beside)
        if best.prompt_accuracy is not None:
            beside = of_teacher(percent(teacher.prompt_accuracy)) if teacher else ""
            card(percent(best.prompt_accuracy), "of prompts drawn right", beside)
        if best.seconds_per_image is not None:
            beside = of_teacher(duration(teacher.seconds_per_image)) if teacher else ""
            card(duration(best.seconds_per_image), "per image", beside)
    seconds = findings.total_seconds(report)
    if is_number(seconds):
        peak = f"peak memory {memory(report.peak_memory)}" if is_number(report.peak_memory) else ""
        card(duration(seconds), "the whole experiment", peak)
    about = [f"Config {report.config}", f"seed {report.seed}", report.hardware]
    return (
        f"<header>\n<h1>{escape(report.title)}</h1>\n"
        f'<div class="soft">{escape(" · ".join(text for text in about if text))}</div>\n'
        f"{_paragraph(findings.headline(report), 'lead')}\n"
        + (f'<div class="cards">{"".join(cards)}</div>\n' if cards else "")
        + "</header>"
    )


def _gallery(report: Report, colours: Colours) -> str:
    if not report.gallery or not report.gallery.rows or not report.gallery.prompts:
        return ""
    caption = (
        "Each column starts from one noise and one prompt; each row is a model and its number of steps. Not selected."
    )
    return _section("The same prompts and the same noise", figure(gallery_grid(report.gallery, colours), caption))


def _idea() -> str:
    drawings = "".join(
        f'<figure class="panel"><h3>{escape(title)}</h3>{svg}<figcaption>{escape(caption)}</figcaption></figure>'
        for title, svg, caption in sketch.panels()
    )
    return _section(
        "Why one step can be enough",
        _paragraph(
            [
                "A diffusion model makes an image by following a path from noise to data. At every moment the network "
                "gives the direction, the velocity, and the sampler goes a little way along it: one step, one pass of "
                "the network. Where the path bends, the steps must be small. Where it is straight, the first direction "
                "is already the right one, and a single step covers the whole way. Reflow straightens the paths.",
            ]
        ),
        f'<div class="three">{drawings}</div>',
        _paragraph(
            ["The sketch is computed from the exact flow of a one-dimensional example. What follows is measured."],
            "small soft",
        ),
    )


def _story(report: Report, colours: Colours) -> str:
    """What each stage does, in the field's terms, and what it did here."""
    couplings = [stage for stage in report.stages if stage.kind == "couple"]
    counts = [f"{stage.name}: {stage.samples:,}" for stage in couplings if stage.samples]
    parts = [
        (
            "teacher",
            "Teacher",
            "The diffusion model to be made faster. With many steps it follows its curved paths well; with few it "
            "leaves them. One step lands near the average of all images that the noise could still become.",
            findings.few_steps(report),
        ),
        (
            "couple",
            "Couplings",
            "A coupling is a noise together with the image that a model makes of it, step by step, without further "
            "randomness. No image of the original data set is needed from here on.",
            [f"Made here: {joined(counts)}."] if counts else [],
        ),
        (
            "flow",
            "Reflow",
            "A new network is trained on the straight lines between coupled noise and image: at "
            "x_t = (1 − t)·noise + t·image it is to answer image − noise. Since coupled lines hardly cross, what it "
            "learns is nearly the lines themselves: a 2-rectified flow, with the same images and straighter paths.",
            findings.reflow(report),
        ),
        (
            "student",
            "Distillation",
            "No path is perfectly straight after one reflow. The student is trained for the one step only: from the "
            "noise, straight to the image of its coupling. Straighter paths leave it less to make up for.",
            findings.distillation(report),
        ),
        (
            "direct",
            "The control: distillation without reflow",
            "The same distillation, but straight from the teacher’s couplings. If it does as well, the student owes "
            "its quality to distillation alone; if it does worse, reflow is what made the difference.",
            findings.control(report),
        ),
    ]
    kinds = {row.kind for row in report.rows} | ({"couple"} if couplings else set())
    slots = {row.kind: colours[row.model] for row in reversed(report.rows)}
    items = [
        f"<li><div><h3>{escape(title)}</h3><p>{escape(text)}</p>"
        + (f'<p class="found c{slots[kind]}">' if kind in slots else '<p class="found">')
        + f"{escape(' '.join(found))}</p></div></li>"
        for kind, title, text, found in parts
        if kind in kinds and (found or kind in ("teacher", "couple"))
    ]
    items = [item.replace('<p class="found"></p>', "") for item in items]
    return _section(
        "What each stage contributes",
        f'<ol class="story">{"".join(items)}</ol>' if items else "",
        _paths(report, colours),
    )


def _paths(report: Report, colours: Colours) -> str:
    """The measured paths and their departure from a straight line."""
    panels = [
        f'<figure class="panel"><h3>{escape(model)}</h3>{svg}</figure>'
        for model, svg in path_plots(report.trajectories, colours)
    ]
    caption = (
        "The paths of a handful of noises (open circles) to their images (filled), the same noises in each drawing, "
        "projected onto the same plane; dashed, the straight line from end to end. A projection keeps straight lines "
        "straight: what bends here, bends."
    )
    paths = f'<div class="two">{"".join(panels)}</div><p class="small soft">{caption}</p>' if panels else ""
    plot = straightness_plot(report.straightness, colours)
    if not plot:
        return paths
    names = [profile.model for profile in report.straightness]
    caption = (
        "E‖(Z₁ − Z₀) − v(Z_t, t)‖² / E‖Z₁ − Z₀‖² on simulated paths: how much the velocity at each time differs from "
        "the straight way. Its mean over time is the relative straightness; 0 means that one step is exact."
    )
    protocol = f" {report.protocol.straightness}." if report.protocol.straightness else ""
    return paths + figure(legend(names, colours) + plot, caption + protocol, narrow=True)


def _quality(report: Report, colours: Colours) -> str:
    if not report.rows:
        return ""
    card = report.protocol
    against = [text for text in (card.samples, card.features, card.weights and f"weights: {card.weights}") if text]
    protocol = f"Protocol: {'; '.join(against)}." if against else ""
    caption = (
        "A Fréchet distance compares the mean and covariance of two sets of images; 0 is equality. It shrinks as the "
        "samples grow, so compare within this page only. Dashed: what even a perfect model would show. " + protocol
    )
    plots = "".join(
        f'<figure class="panel">{plot}</figure>' for plot in quality_plots(report.rows, report.floors, colours)
    )
    names = list(dict.fromkeys(row.model for row in report.rows))
    best = " Marked: the best of the one-step rows." if sum(row.num_steps == 1 for row in report.rows) > 1 else ""
    return _section(
        "Quality against steps",
        f'{legend(names, colours)}<div class="two">{plots}</div><p class="small soft">{escape(caption)}</p>'
        if plots
        else "",
        figure(f'<div class="scroll">{rows_table(report, colours)}</div>', protocol + best),
        _paragraph(findings.accuracy(report)),
    )


def _gaps(report: Report, colours: Colours) -> str:
    gaps = report.gaps
    if not gaps:
        return ""
    plot = gap_plot(gaps, colours)
    caption = (
        f"Distances of each one-step image from the image of {gaps.teacher} with the same prompt and noise. A student "
        "that was distilled from a flow follows the flow’s images, which are not quite the teacher’s."
    )
    return _section(
        "Where it falls short",
        _paragraph(["These are the worst results, not typical ones.", *findings.gaps(report)]),
        figure(legend(list(gaps.distances), colours) + plot, caption, narrow=True) if plot else "",
        figure(gap_grid(gaps), f"Left {gaps.teacher}, right {gaps.student}; below, what the reader sees in each.")
        if gaps.worst
        else "",
    )


def _cost(report: Report, colours: Colours) -> str:
    plots = [(curve.stage, loss_plot(curve, colours[curve.stage])) for curve in report.losses]
    losses = "".join(f'<figure class="panel"><h3>{escape(name)}</h3>{plot}</figure>' for name, plot in plots if plot)
    caption = "Losses as logged (thin) and averaged over neighbours (bold). Those of different stages do not compare."
    checks = [(f"{c.stage}: {c.what}", _check(c.value, c.expected)) for c in report.checks]
    return _section(
        "How it was made",
        figure(stage_bars(report.stages, colours), "One line a stage, in order; the bar is its share of the time.")
        if report.stages
        else "",
        f'<div class="two">{losses}</div><p class="small soft">{caption}</p>' if losses else "",
        f'<h3>Checks before the first update</h3><div class="panel">{pairs_list(checks)}</div>' if checks else "",
    )


def _check(value: float | str, expected: str) -> str:
    shown = value if isinstance(value, str) else number(value)
    return f"{shown} (expected: {expected})" if expected else shown


def _protocol(report: Report) -> str:
    card, floors = report.protocol, report.floors
    entries = [
        ("Samples", card.samples),
        ("Noise", card.noise),
        ("Features", card.features),
        ("Reference: real", card.reference_real),
        ("Reference: teacher", card.reference_teacher),
        ("Prompt accuracy", card.reader),
        ("Straightness", card.straightness),
        ("Time per image", card.timing),
        ("Weights", card.weights),
        *card.notes.items(),
        ("Floor: real, half against half", number(floors.real_halves) if floors.real_halves is not None else ""),
        ("Floor: autoencoder’s round trip", number(floors.autoencoder) if floors.autoencoder is not None else ""),
        ("Floor: teacher, other noise", number(floors.teacher_again) if floors.teacher_again is not None else ""),
        ("Hardware", report.hardware),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    shown = [(label, text) for label, text in entries if text]
    return _section("How it was measured", f'<div class="panel">{pairs_list(shown)}</div>')
