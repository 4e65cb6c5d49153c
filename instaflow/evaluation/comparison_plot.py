"""Each seed's value as a dot, with the rows' means and intervals: a horizontal plot in the order of the ranks."""

from html import escape

import numpy as np

from instaflow.evaluation.comparison import BETTER, ComparedRow, Comparison, order
from instaflow.evaluation.comparison_words import TITLES, UNITS, ends, said
from instaflow.evaluation.plots import Colours
from instaflow.evaluation.svg import Axis, axis_over, marker
from instaflow.evaluation.wording import number

FAR = 5  # a row this many times as far from the best as the middle one is drawn off the axis
ROW, WIDTH = 22, 440  # pixels of the dot plot
LETTER = 6.4  # pixels, about the mean width of a letter in a row's name


def dot_plot(comparison: Comparison, figure: str, colours: Colours) -> str:
    """An SVG with a line a one-step row, in rank's order: seeds, mean, interval. Empty where nothing was measured."""
    rows = [row for row in comparison.one_step if row.figures[figure].count]
    if not rows:
        return ""
    scale, unit = UNITS.get(figure, (1, ""))
    means = [BETTER[figure] * (row.figures[figure].mean or 0) for row in rows]
    limit = min(means) + FAR * (float(np.median(means)) - min(means))
    drawn = [row for row, mean in zip(rows, means, strict=True) if mean <= limit]
    beyond = [row for row in comparison.rows if row.num_steps > 1 and row.figures[figure].count]
    for_scale = min(beyond, key=lambda row: order(row, figure), default=None)
    values = [scale * value for row in drawn for value in row.figures[figure].values]
    reference = None if for_scale is None else scale * (for_scale.figures[figure].mean or 0)
    x = axis_over(
        [*values, *([reference] if reference is not None else [])], TITLES[figure] + (f",{unit}" if unit else "")
    )
    left = min(max(len(row.label) for row in rows) * LETTER + 14, 0.45 * WIDTH)
    right, top = WIDTH - 14, 34
    bottom = top + ROW * len(rows)
    parts = [f'<text class="axis" x="0" y="12">{escape(x.label)}</text>']
    for value in x.tick_values():
        at = x.place(value, left, right)
        parts.append(f'<path class="grid" d="M{at:.1f} {top}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>')
    if for_scale and reference is not None:
        at = x.place(reference, left, right)
        parts.append(f'<path class="rule" d="M{at:.1f} {top - 4}V{bottom}"/>')
        anchor = "start" if at < (left + right) / 2 else "end"
        parts.append(
            f'<text class="note" x="{at:.1f}" y="{top - 8}" text-anchor="{anchor}">{escape(for_scale.name)}</text>'
        )
    for place, row in enumerate(rows):
        y = top + ROW * (place + 0.5)
        parts.append(_name(row.label, left, y))
        parts.append(
            _dots(row, figure, x, (left, right), y, colours[row.kind])
            if row in drawn
            else _arrow(row, figure, (left, right), y, colours[row.kind])
        )
    head = f'<svg viewBox="0 0 {WIDTH} {bottom + 24}" role="img" aria-label="{escape(TITLES[figure])}, seed by seed">'
    return f"{head}{''.join(parts)}</svg>"


def _name(label: str, left: float, y: float) -> str:
    room = int((left - 14) / LETTER)
    short = label if len(label) <= room else f"{label[: room - 1]}…"
    return f'<text class="name" x="0" y="{y + 4:.1f}">{escape(short)}<title>{escape(label)}</title></text>'


def _dots(row: ComparedRow, figure: str, x: Axis, sides: tuple[float, float], y: float, colour: int) -> str:
    """A row's seeds, mean and interval; an interval that leaves the axis ends at its edge, in a head."""
    scale, unit = UNITS.get(figure, (1, ""))
    spread = row.figures[figure]
    mean = scale * (spread.mean or 0)
    parts = []
    if interval := ends(figure, spread):
        low, high = interval
        left, right = (x.place(min(max(end, x.low), x.high), *sides) for end in interval)
        parts.append(f'<path class="band c{colour}" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        parts += [_head(sides[0], 1, y, colour)] if low < x.low else []
        parts += [_head(sides[1], -1, y, colour)] if high > x.high else []
    for seed, value in spread.by_seed.items():
        if value is not None:
            told = f"{row.label}, seed {seed}: {number(scale * value)}{unit}"
            at = x.place(scale * value, *sides)
            circle = f'<circle class="seed c{colour}" cx="{at:.1f}" cy="{y:.1f}" r="3.2">'
            parts.append(f"{circle}<title>{escape(told)}</title></circle>")
    told = f"{row.label}, mean: {said(figure, spread)}"
    return "".join([*parts, marker(colour, x.place(mean, *sides), y, told)])


def _arrow(row: ComparedRow, figure: str, sides: tuple[float, float], y: float, colour: int) -> str:
    """A row far off the axis, on its worse side."""
    text = said(figure, row.figures[figure])
    worse_is_right = BETTER[figure] > 0
    edge, step, anchor = (sides[1], -1, "end") if worse_is_right else (sides[0], 1, "start")
    shown = f'<text class="note" x="{edge + 13 * step:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{text}</text>'
    return f"{_head(edge, step, y, colour)}{shown}"


def _head(edge: float, step: int, y: float, colour: int) -> str:
    """An arrow's head at an edge of the axis. step: 1 at its left, -1 at its right."""
    drawn = f"M{edge + 8 * step:.1f} {y - 4:.1f}L{edge:.1f} {y:.1f}L{edge + 8 * step:.1f} {y + 4:.1f}"
    return f'<path class="line c{colour}" d="{drawn}"/>'
