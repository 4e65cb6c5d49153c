"""The report as one self-contained HTML page, in the order of its story."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from instaflow.evaluation import aims, findings
from instaflow.evaluation.card import PROTOCOL
from instaflow.evaluation.chance import whose
from instaflow.evaluation.parts import (
    beside,
    card_table,
    figure,
    folded,
    gallery_grid,
    gap_grid,
    legend,
    marked,
    neighbour_grid,
    pairs_list,
    paragraph,
    section,
    stage_bars,
    strip_grid,
)
from instaflow.evaluation.plots import (
    Colours,
    gap_plot,
    loss_plot,
    preview_plots,
    score_plots,
)
from instaflow.evaluation.quality import quality
from instaflow.evaluation.report import Floors, Protocol, Report, Row
from instaflow.evaluation.short_names import with_short_names
from instaflow.evaluation.story import contributions, idea
from instaflow.evaluation.style import LIGHT, SLOTS, STYLE
from instaflow.evaluation.wording import duration, is_number, memory, number, percent, steps
from instaflow.files import write_file

Part = TypeVar("Part", Row, Floors)


def write_page(path: Path, report: Report) -> None:
    """Write `report` to `path`: one file that needs no network and no script, the same bytes for the same report."""
    write_file(path, page(report))


def page(report: Report) -> str:
    report = with_short_names(without_broken(report))
    colours = model_colours(report)
    sections = [
        _header(report),
        _gallery(report, colours),
        idea(report, colours),
        contributions(report, colours),
        quality(report, colours),
        aimed(aims.outcomes({report.seed: report})),
        _gaps(report, colours),
        _between(report),
        _memory(report),
        _cost(report, colours),
        protocol(report),
    ]
    return document(report.title, STYLE, sections)


def document(title: str, style: str, sections: Sequence[str]) -> str:
    """A whole page of its own; an empty section is left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def without_broken(report: Report) -> Report:
    """`report` with None for a row's or floor's figure that is not finite: a broken measurement is a missing one."""
    return replace(report, rows=[_finite(row) for row in report.rows], floors=_finite(report.floors))


def _finite(part: Part) -> Part:
    figures = {key: value for key, value in vars(part).items() if isinstance(value, float | np.floating)}
    missing: dict[str, Any] = {key: None for key, value in figures.items() if not math.isfinite(value)}
    return replace(part, **missing)


def model_colours(report: Report) -> Colours:
    """A colour per label: teacher, flow, student and direct always the same ones, the others and raw ones in turn."""
    averaged_first = sorted(report.rows, key=lambda row: row.weights == "raw")
    kinds = {row.label: row.kind for row in averaged_first}
    if report.gallery:
        kinds |= {row.model: row.kind for row in report.gallery.rows if row.model not in kinds}
    kinds |= {curve.label: curve.rows[0].kind for curve in report.scores if curve.label not in kinds}
    extra = [profile.model for profile in report.straightness] + [one.model for one in report.trajectories]
    extra += [curve.stage for curve in report.losses] + [curve.stage for curve in report.previews]
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
            colours[model] = free[-1] if free and model not in kinds else free[0] if free else len(colours) % SLOTS
    return colours


def _header(report: Report) -> str:
    best, teacher = findings.result(report), findings.reference(report)
    cards = []

    def card(value: str, label: str, beside: str) -> None:
        inside = f'<div class="value">{escape(value)}</div><div class="label">{escape(label)}</div>'
        cards.append(f'<div>{inside}<div class="small soft">{escape(beside)}</div></div>')

    def of_teacher(value: str) -> str:
        return f"{teacher.label}, {steps(teacher.num_steps)}: {value}" if teacher else ""

    if best and best.model != (teacher and teacher.model):
        at = f"{best.label}, {steps(best.num_steps)}"
        if best.frechet_distance_real is not None:
            beside = of_teacher(number(teacher.frechet_distance_real)) if teacher else ""
            card(number(best.frechet_distance_real), f"Fréchet distance, {at}", beside)
        if best.prompt_accuracy is not None:
            beside = of_teacher(percent(teacher.prompt_accuracy)) if teacher else ""
            card(percent(best.prompt_accuracy), f"of {report.protocol.judged} drawn right", beside)
        if best.seconds_per_image is not None:
            beside = of_teacher(duration(teacher.seconds_per_image)) if teacher else ""
            card(duration(best.seconds_per_image), "per image", beside)
    seconds = report.total_seconds
    if is_number(seconds):
        peak = f"peak memory {memory(report.peak_memory)}" if is_number(report.peak_memory) else ""
        is_alone = all(stage.kind == "evaluate" for stage in report.stages)  # its models were made elsewhere
        card(duration(seconds), "this evaluation" if is_alone else "the whole experiment", peak)
    about = [f"Config {report.config}", f"seed {report.seed}", report.hardware]
    return (
        '<header>\n<div class="soft">InstaFlow: a text-to-image diffusion model becomes a one-step generator</div>\n'
        f"<h1>{escape(report.title)}</h1>\n"
        f'<div class="soft">{escape(" · ".join(text for text in about if text))}</div>\n'
        f"{paragraph([*findings.headline(report), *aims.summary(aims.outcomes({report.seed: report}))], 'lead')}\n"
        + (f'<div class="cards">{"".join(cards)}</div>\n' if cards else "")
        + paragraph(findings.scale(report), "small soft after")
        + "</header>"
    )


def _gallery(report: Report, colours: Colours) -> str:
    if not report.gallery or not report.gallery.rows or not report.gallery.prompts:
        return ""
    caption = "Each column starts from one noise and one prompt; each row is a model and its number of steps."
    caption += f" {report.gallery.choice}" if report.gallery.choice else ""
    return section("The same prompts and the same noise", figure(gallery_grid(report.gallery, colours), caption))


def aimed(found: Sequence[aims.Outcome]) -> str:
    """What the experiment aimed at and what it came to, a line each."""
    lines = [f"<dt>{marked(one.asked)}</dt><dd><b>{one.verdict}</b> · {escape(one.found)}</dd>" for one in found]
    inside = f'<div class="panel"><dl class="protocol aims">{"".join(lines)}</dl></div>'
    return section("What was aimed at", inside if found else "")


def _gaps(report: Report, colours: Colours) -> str:
    gaps = report.gaps
    if not gaps:
        return ""
    plot = gap_plot(gaps, colours)
    read = "; below, what the reader sees in each" if any(gap.student_reading for gap in gaps.worst) else ""
    found = paragraph(["These are the worst results, not typical ones.", *findings.gaps(report)])
    follows = "A student that was distilled from a flow follows the flow’s images, which are not quite the teacher’s. "
    follows = follows if whose(report.rows) == "teacher" else ""
    caption = (
        f"Each one-step image is compared with the image of {gaps.teacher} for the same prompt and noise. {follows}"
        f"Dashed: 95 % of the images of {gaps.student} lie to the left."
    )
    return section(
        "Where it falls short",
        beside(legend(list(gaps.distances), colours) + plot, found + paragraph([caption], "small soft"))
        if plot
        else found,
        figure(gap_grid(gaps), f"Left {gaps.teacher}, right {gaps.student}{read}.") if gaps.worst else "",
    )


def _between(report: Report) -> str:
    """Images between two noises."""
    best = findings.result(report)
    if not report.strips or not best:
        return ""
    caption = (
        f"Each line is one prompt, drawn by {best.label} in {steps(best.num_steps)} from noises on the great circle "
        "between two. Where a model has learned a map from noise to image, and not single images, what it draws "
        "changes gradually."
    )
    return section("From one noise to another", figure(strip_grid(report.strips, best.label), caption))


def _memory(report: Report) -> str:
    """The nearest real images."""
    found = report.neighbours
    if not found:
        return ""
    caption = (
        f"Left an image of {found.model}, right the real image that is nearest to it in the protocol’s features, for "
        "the prompts of the gallery."
    )
    return section(
        "Has it learned images by heart?",
        paragraph(findings.memory(report)),
        figure(neighbour_grid(found), caption),
    )


def _cost(report: Report, colours: Colours) -> str:
    plots = [(curve.stage, loss_plot(curve, colours[curve.stage])) for curve in report.losses]
    losses = "".join(f'<figure class="panel"><h3>{escape(name)}</h3>{plot}</figure>' for name, plot in plots if plot)
    caption = "Losses as logged (thin) and averaged over neighbours (bold). Those of different stages do not compare."
    previews = "".join(f'<figure class="panel">{plot}</figure>' for plot in preview_plots(report.previews, colours))
    seen = (
        "While a flow trains, its moving average draws the noises and prompts of the same few couplings again and "
        "again. Left, the root mean square difference of its latents and the coupled ones; right, the Fréchet distance "
        "of the two sets, in latents averaged over 4×4 cells; lower is nearer. This is progress within a stage, not "
        "quality: the couplings of different stages differ. The pictures are in the folder previews of each."
    )
    checks = [(f"{c.stage}: {c.what}", _check(c.value, c.expected)) for c in report.checks]
    return section(
        "How it was made",
        figure(stage_bars(report.stages, colours), "One line a stage, in order; the bar is its share of the time.")
        if report.stages
        else "",
        f'<div class="two">{losses}</div><p class="small soft">{caption}</p>' if losses else "",
        f"<h3>Progress</h3>{legend([curve.stage for curve in report.previews], colours)}"
        f'<div class="two">{previews}</div><p class="small soft">{seen}</p>'
        if previews
        else "",
        f"<h3>Score over training</h3>{curves}" if (curves := scores(report, colours)) else "",
        f'<h3>Checks before the first update</h3><div class="panel">{pairs_list(checks)}</div>' if checks else "",
    )


def scores(report: Report, colours: Colours) -> str:
    """The figures of checkpoints over the training, beside the reference's and those that the models came to."""
    drawn = score_plots(report.scores, score_rules(report), colours)
    if not drawn:
        return ""
    panels = "".join(f'<figure class="panel">{plot}</figure>' for plot in drawn)
    caption = (
        "Checkpoints of a training, each measured as the rows of the report are: by the same prompts, noise and real "
        "images. Dashed, to compare with: the reference, and what a finished training came to."
    )
    labels = [curve.label for curve in report.scores]
    rows = [row for curve in report.scores for row in curve.rows]
    cards = folded("The cards of these scores", card_table(rows)) if any(row.card for row in rows) else ""
    drawn_with = f'{legend(labels, colours)}<div class="two">{panels}</div><p class="small soft">{caption}</p>'
    return drawn_with + cards


def score_rules(report: Report) -> list[tuple[str, Row]]:
    """The rows that curves are compared with, and what they are called: the reference, and each curve's own row."""
    own = findings.target(report)
    curves = {(curve.label, curve.num_steps) for curve in report.scores}
    rules = [(f"{own.label}, {steps(own.num_steps)}", own)] if own else []
    ends = [row for row in report.rows if (row.label, row.num_steps) in curves and row is not own]
    return rules + [(f"{row.label} in the end", row) for row in ends]


def _check(value: float | str, expected: str) -> str:
    shown = value if isinstance(value, str) else number(value)
    return f"{shown} (expected: {expected})" if expected else shown


def protocol(report: Report) -> str:
    floors = {name: number(value) if value is not None else "" for name, value in vars(report.floors).items()}
    entries = [
        *protocol_entries(report.protocol, floors),
        ("Hardware", report.hardware),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    shown = [(label, text) for label, text in entries if text]
    return section(
        "How it was measured",
        f'<div class="panel">{pairs_list(shown)}</div>' if shown else "",
        _card(report.rows),
    )


def _card(rows: Sequence[Row]) -> str:
    """The protocol card that all rows share, and what each row was, on demand."""
    if not rows or not rows[0].card:
        return ""
    shared = [(name, told(rows[0].card[name])) for name in PROTOCOL if rows[0].card.get(name) not in (None, "")]
    words = "<p>What all rows have in common; figures of other protocols say nothing beside these.</p>"
    return folded("The protocol card", f"{words}{pairs_list(shared)}<h3>Each row</h3>{card_table(rows)}")


def told(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def protocol_entries(card: Protocol, floors: Mapping[str, str]) -> list[tuple[str, str]]:
    """How the figures were measured, label and text; `floors` as they are to be read."""
    return [
        ("Samples", card.samples),
        ("Noise", card.noise),
        ("Features", card.features),
        ("Reference: real", card.reference_real),
        ("Reference: of the same noise", card.reference_teacher),
        ("Prompt accuracy", card.reader),
        ("Perceptual distance", card.perceptual),
        ("Straightness", card.straightness),
        ("Time per image", card.timing),
        ("Weights", card.weights),
        *card.notes.items(),
        ("Floor: real, half against half", floors["real_halves"]),
        ("Floor: autoencoder’s round trip", floors["autoencoder"]),
        ("Floor: the reference, other noise", floors["teacher_again"]),
    ]
