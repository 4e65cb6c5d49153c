"""The page's building blocks that are not charts: galleries, bars, cards."""

import base64
import io
import re
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from instaflow.evaluation.plots import Colours
from instaflow.evaluation.report import Gallery, Gaps, Neighbours, Picture, Row, Stage, Strip
from instaflow.evaluation.row_words import CARD_HEADS, card_told, circumstances
from instaflow.evaluation.svg import marker
from instaflow.evaluation.wording import duration, number, steps

LARGEST = 256  # pixels; larger images are reduced to it, and stored as JPEG
COUNTED = {"couple": "couplings", "evaluate": "images"}  # what a stage's samples are; of others, training samples


def section(title: str, *parts: str) -> str:
    inside = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>" if inside else ""


def heading(title: str, inside: str) -> str:
    """A small heading over what belongs to it; nothing where that is nothing."""
    return f"<h3>{escape(title)}</h3>\n{inside}" if inside else ""


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


def charts(plots: Sequence[str], caption: str) -> str:
    """Panels by twos; the caption where a place beside the last one is free, else below. Nothing without plots."""
    if not plots:
        return ""
    panels = "".join(f'<figure class="panel">{plot}</figure>' for plot in plots)
    text = paragraph([caption], "small soft")
    return f'<div class="two">{panels}{text}</div>' if len(plots) % 2 else f'<div class="two">{panels}</div>{text}'


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


def below(half: str) -> str:
    """Half of a figure's interval, below the figure in its cell of a table."""
    return f"<small>± {half}</small>" if half else ""


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
    """What each row was, from its protocol card, with all of a model's name that is shown shortened elsewhere."""
    lines = []
    for row in rows:
        whole = str(row.card.get("model", ""))
        rest = "" if whole in row.label else f'<br><span class="soft">{escape(whole)}</span>'
        cells = "".join(f"<td>{escape(text)}</td>" for text in card_told(row))
        lines.append(f"<tr><td>{escape(row.label)}{rest}</td>{cells}</tr>")
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Model", *CARD_HEADS))
    table = f'<table class="many"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    entries = circumstances(rows)
    return f'<div class="scroll">{table}</div>{pairs_list(entries) if entries else ""}'


def folded(title: str, inside: str) -> str:
    """What is there on demand."""
    return f"<details><summary>{escape(title)}</summary>\n{inside}\n</details>"


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
