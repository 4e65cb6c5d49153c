"""The page's building blocks that are not charts: table, galleries, bars, cards."""

import base64
import io
import math
import re
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from instaflow.evaluation.findings import reference
from instaflow.evaluation.plots import Colours
from instaflow.evaluation.report import Gallery, Gaps, Neighbours, Picture, Report, Row, Stage, Strip
from instaflow.evaluation.svg import marker
from instaflow.evaluation.wording import duration, number, percent, steps

MANY = 9  # columns; a table of more is set smaller
LARGEST = 256  # pixels; larger images are reduced to it, and stored as JPEG
COUNTED = {"couple": "couplings", "evaluate": "images"}  # what a stage's samples are; of others, training samples


def section(title: str, *parts: str) -> str:
    inside = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>" if inside else ""


def paragraph(sentences: Sequence[str], style: str = "") -> str:
    """A <p> of the sentences, in which `name` marks a model's name; nothing where there are none."""
    attribute = f' class="{style}"' if style else ""
    return f"<p{attribute}>{marked(' '.join(sentences))}</p>" if sentences else ""


def marked(text: str) -> str:
    """A text with `name` in bold."""
    return re.sub("`([^`]+)`", r"<b>\1</b>", escape(text))


def figure(inside: str, caption: str) -> str:
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="panel">{inside}</div>{text}</figure>'


def beside(inside: str, text: str) -> str:
    """A panel with a text to its right, or below it on a narrow screen."""
    return f'<div class="two"><div class="panel">{inside}</div><div>{text}</div></div>'


def picture(image: Picture, alt: str) -> str:
    """An <img> that carries its own pixels."""
    drawn = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    drawn = drawn if drawn.mode in ("L", "RGB") else drawn.convert("RGB")
    kind = "png"
    if max(drawn.size) > LARGEST:
        drawn, kind = drawn.convert("RGB"), "jpeg"
        drawn.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    drawn.save(buffer, kind, quality=90) if kind == "jpeg" else drawn.save(buffer, kind, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    smooth = ' style="image-rendering: auto"' if max(drawn.size) > 96 else ""
    return f'<img src="data:image/{kind};base64,{data}" alt="{escape(alt)}"{smooth}>'


def sign(colour: int) -> str:
    """A model's marker, for legends and tables."""
    return f'<svg viewBox="0 0 14 14" aria-hidden="true">{marker(colour, 7, 7)}</svg>'


def legend(models: Sequence[str], colours: Colours) -> str:
    items = "".join(f"<li>{sign(colours[model])}{escape(model)}</li>" for model in dict.fromkeys(models))
    return f'<ul class="legend">{items}</ul>'


def gallery_grid(gallery: Gallery, colours: Colours) -> str:
    columns = len(gallery.prompts)
    cells = ['<div class="corner"></div>']
    for place, prompt in enumerate(gallery.prompts, start=1):
        text = escape(prompt) or "(empty)"
        label = f'<span class="number">{place}</span><span class="text" title="{text}">{text}</span>'
        cells.append(f'<div class="head">{label}</div>')
    before = None
    for row in gallery.rows:
        if before is not None and row.model != before:
            cells.append('<div class="gap"></div>')
        before = row.model
        count = f'<span class="soft small">{steps(row.num_steps)}</span>'
        cells.append(f'<div class="name">{sign(colours[row.model])}{escape(row.model)} {count}</div>')
        for prompt, image in zip(gallery.prompts, row.images, strict=True):
            cells.append(picture(image, f"{prompt}: {row.model}, {steps(row.num_steps)}"))
    prompts = "".join(f"<li>{escape(prompt) or '(empty)'}</li>" for prompt in gallery.prompts)
    return f'<div class="gallery" style="--n: {columns}">{"".join(cells)}</div><ol class="prompts">{prompts}</ol>'


def gap_grid(gaps: Gaps) -> str:
    cells = []
    for gap in gaps.worst:
        images = picture(gap.teacher_image, f"{gaps.teacher}: {gap.prompt}")
        images += picture(gap.student_image, f"{gaps.student}: {gap.prompt}")
        lines = [escape(gap.prompt) or "(empty)"]
        if gap.teacher_reading and gap.student_reading:
            read = escape(f"{gap.teacher_reading} → {gap.student_reading}")
            lines.append(read if gap.teacher_reading == gap.student_reading else f"<b>{read}</b>")
        text = "<br>".join([*lines, f"{number(gap.distance)} apart"])
        cells.append(f'<figure><div class="pair">{images}</div><figcaption>{text}</figcaption></figure>')
    return f'<div class="gaps">{"".join(cells)}</div>'


def strip_grid(strips: Sequence[Strip], model: str) -> str:
    """A line of images for each strip."""
    lines = []
    for strip in strips:
        images = "".join(picture(image, f"{strip.prompt}: {model}, on the way") for image in strip.images)
        lines.append(
            f'<figure class="strip"><div style="--n: {len(strip.images)}">{images}</div>'
            f"<figcaption>{escape(strip.prompt) or '(empty)'}</figcaption></figure>"
        )
    return "".join(lines)


def neighbour_grid(neighbours: Neighbours) -> str:
    cells = []
    for one in neighbours.shown:
        images = picture(one.image, f"{neighbours.model}: {one.prompt}") + picture(one.real, "the nearest real image")
        text = f"{escape(one.prompt) or '(empty)'}<br>{number(one.distance)} apart"
        cells.append(f'<figure><div class="pair">{images}</div><figcaption>{text}</figcaption></figure>')
    return f'<div class="gaps">{"".join(cells)}</div>'


def card_table(rows: Sequence[Row]) -> str:
    """What each row was, from its protocol card: its model's content, how it was sampled, and on what."""
    lines = []
    for row in rows:
        card = row.card
        told = [
            " ".join(word[:16] for word in str(card.get("model_content", "–")).split()),
            row.weights,
            str(row.num_steps),
            "–" if row.guidance_scale is None else f"{row.guidance_scale:g}",
            str(card.get("sampler", "–")),
            str(card.get("dtype", "–")),
        ]
        cells = "".join(f"<td>{escape(text)}</td>" for text in told)
        lines.append(f"<tr><td>{escape(row.label)}</td>{cells}</tr>")
    heads = ("Content", "Weights", "Steps", "Guidance", "Scheduler", "Precision")
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Model", *heads))
    table = f'<table class="many"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return f'<div class="scroll">{table}</div>{circumstances_list(rows)}'


def circumstances_list(rows: Sequence[Row]) -> str:
    """In which circumstances the rows were made, each once, with whose they are where they differ."""
    found: dict[str, list[str]] = {}
    for row in rows:
        card, told = row.card, []
        if "hardware" in card:
            told += [card["hardware"], f"batches of {card['batch_size']}", f"processes: {card['processes']}"]
        told.append(", ".join(f"{name} {version}" for name, version in card.get("versions", {}).items()))
        found.setdefault("; ".join(filter(None, told)), []).append(f"{row.label}, {steps(row.num_steps)}")
    whose = {text: "Made on" if len(found) == 1 else "; ".join(dict.fromkeys(names)) for text, names in found.items()}
    entries = [(whose[text], text) for text in found if text]
    return pairs_list(entries) if entries else ""


def folded(title: str, inside: str) -> str:
    """What is there on demand."""
    return f"<details><summary>{escape(title)}</summary>\n{inside}\n</details>"


def rows_table(report: Report, colours: Colours) -> str:
    """All rows; the best one-step value of each column is marked. A column that says nothing is left out."""
    rows = list(report.rows)
    several_counts = len({row.num_samples for row in rows}) > 1
    columns = [
        # heading, texts, values of which the smallest is best
        ("Steps", [str(row.num_steps) for row in rows], None),
        ("Guidance", ["" if row.guidance_scale is None else f"{row.guidance_scale:g}" for row in rows], None),
        ("Samples", [f"{row.num_samples:,}" if several_counts else "" for row in rows], None),
        _numbers("Fréchet distance to real", [row.frechet_distance_real for row in rows]),
        _numbers("Fréchet distance to teacher", [row.frechet_distance_teacher for row in rows]),
        _shares("Prompt accuracy", [row.prompt_accuracy for row in rows]),
        _shares("on an unseen template", [row.prompt_accuracy_unseen for row in rows]),
        _numbers("KID × 1,000", [None if row.kernel_distance is None else 1000 * row.kernel_distance for row in rows]),
        _shares("Precision", [row.precision for row in rows]),
        _shares("Recall", [row.recall for row in rows]),
        _highest("CLIP score", [row.clip_score for row in rows]),
        _numbers("Gap to teacher, pixels", [row.pixel_gap for row in rows]),
        _numbers("Gap to teacher, perceptual", [row.perceptual_gap for row in rows]),
        ("Diversity", [number(row.diversity) for row in rows], None),
        ("S(Z)", _once_a_model(rows, [row.straightness for row in rows]), None),
        ("S(Z), relative", _once_a_model(rows, [row.straightness_relative for row in rows]), None),
        ("Time per image", [duration(row.seconds_per_image) for row in rows], None),
    ]
    columns = [column for column in columns if any(text not in ("", "–") for text in column[1])]
    bold = {title: _best(rows, texts, values) for title, texts, values in columns}
    head = '<th scope="col">Model</th>' + "".join(
        f'<th scope="col" class="wrap">{escape(title)}</th>' for title, *_ in columns
    )
    own = reference(report)
    lines, before = [], None
    for i, row in enumerate(rows):
        cells = []
        for title, texts, _ in columns:
            text = "itself" if title.endswith("to teacher") and row is own and texts[i] == "–" else texts[i]
            cells.append(f'<td><span class="best">{text}</span></td>' if i in bold[title] else f"<td>{text}</td>")
        style = " ".join(name for name, on in (("new", row.label != before), ("one", row.num_steps == 1)) if on)
        name = f"{sign(colours[row.label])}{escape(row.label)}" if row.label != before else ""
        lines.append(f'<tr class="{style}"><td>{name}</td>{"".join(cells)}</tr>')
        before = row.label
    many = ' class="many"' if len(columns) > MANY else ""
    return f"<table{many}><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _once_a_model(rows: Sequence[Row], values: list[float | None]) -> list[str]:
    """The texts of a figure that belongs to the model, not to its number of steps."""
    named = [(row.label, value) for row, value in zip(rows, values, strict=True)]
    return ["" if one[1] is None or one in named[:i] else number(one[1]) for i, one in enumerate(named)]


def _numbers(title: str, values: list[float | None]) -> tuple:
    return title, [number(value) for value in values], [math.inf if value is None else value for value in values]


def _highest(title: str, values: list[float | None]) -> tuple:
    return title, [number(value) for value in values], [math.inf if value is None else -value for value in values]


def _shares(title: str, values: list[float | None]) -> tuple:
    return title, [percent(value) for value in values], [math.inf if value is None else -value for value in values]


def _best(rows: Sequence[Row], texts: list[str], values: list[float] | None) -> set[int]:
    """The one-step rows whose figure, as shown, is the best of them; none where there is nothing to compare."""
    single = [i for i, row in enumerate(rows) if row.num_steps == 1 and values and math.isfinite(values[i])]
    if len(single) < 2 or not values:
        return set()
    first = min(single, key=lambda i: values[i])
    return {i for i in single if texts[i] == texts[first]}


def stage_bars(stages: Sequence[Stage], colours: Colours) -> str:
    total = sum(stage.seconds or 0 for stage in stages) or 1.0
    lines, before = [], 0.0
    for stage in stages:
        took = stage.seconds or 0.0
        bar = f'<i style="left: {100 * before / total:.2f}%; width: {100 * took / total:.2f}%"></i>' if took else ""
        before += took
        notes = [stage.description, f"from {', '.join(stage.parents)}" if stage.parents else ""]
        notes.append(f"{stage.samples:,} {COUNTED.get(stage.kind, 'training samples')}" if stage.samples else "")
        text = " · ".join(escape(note) for note in notes if note)
        colour = f" c{colours[stage.name]}" if stage.name in colours else ""
        lines.append(
            f'<div class="stage{colour}"><div><b>{escape(stage.name)}</b> '
            f'<span class="soft small">{escape(stage.kind)}</span></div>'
            f'<div class="what"><div class="track">{bar}</div><div class="small soft">{text}</div></div>'
            f'<div class="took">{duration(stage.seconds)}</div></div>'
        )
    return "".join(lines)


def pairs_list(pairs: Sequence[tuple[str, str]]) -> str:
    inside = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in pairs)
    return f'<dl class="protocol">{inside}</dl>'
