"""Line charts as inline SVG: colours and fonts come from the page's style, so that they follow light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from instaflow.evaluation.wording import number

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 26, 40  # margins around the plotted area
LETTER = 5.6  # pixels, about the mean width of a letter in a label
LONGEST = 48  # letters of a line's label, which must fit in on a phone too, where letters are drawn larger

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a chart. ticks: chosen from the range where none are given."""

    label: str
    low: float
    high: float
    log: bool = False
    ticks: Sequence[float] = ()
    percent: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        """Where `value` lies between the pixels `start` (low) and `end` (high)."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return start + (end - start) * (at - low) / (high - low)

    def tick_values(self) -> list[float]:
        if self.ticks:
            return list(self.ticks)
        return _log_ticks(self.low, self.high) if self.log else _even_ticks(self.low, self.high)

    def tick_text(self, value: float) -> str:
        scaled = 100 * value if self.percent else value
        if abs(scaled) >= 1e6:
            text = f"{scaled / 1e6:g}M"
        elif abs(scaled) >= 1e4:
            text = f"{scaled / 1e3:g}k"
        else:
            text = f"{scaled:.6g}" if abs(scaled) >= 1e-4 or scaled == 0 else f"{scaled:.0e}"
        return text + (" %" if self.percent else "")


@dataclass(frozen=True, kw_only=True)
class Series:
    """colour: index of the page's palette. look: "line", "marked" (with a marker per point) or "faint"."""

    name: str
    colour: int
    points: Sequence[Point]
    look: str = "line"
    titles: Sequence[str] = ()  # what a point says when pointed at
    shift: float = 0.0  # pixels to the right, so that points at one place can be told apart


def axis_over(values: Sequence[float], label: str, *, log: bool = False, zero: bool = False) -> Axis:
    """An axis with some air around `values`; with `zero`, one that starts there."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if log:
        air = max((high / low) ** 0.06, 1.15)
        return Axis(label=label, low=low / air, high=high * air, log=True)
    air = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return Axis(label=label, low=0.0 if zero else low - air, high=high + air)


def chart(
    series: Sequence[Series],
    *,
    x: Axis,
    y: Axis,
    title: str,
    rules: Sequence[tuple[float, str]] = (),
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """An SVG element. rules: horizontal dashed lines (value, label); marks: vertical ones, a label a row."""
    x0, x1, y0, y1 = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP
    inset = 14 if x.ticks else 0  # keeps points at the outermost ticks off the frame

    def at(point: Point) -> Point:
        return x.place(point[0], x0 + inset, x1 - inset), y.place(point[1], y0, y1)

    parts = [f'<text class="axis" x="0" y="12">{escape(y.label)}</text>']
    for value in y.tick_values():
        py = y.place(value, y0, y1)
        parts.append(f'<path class="grid" d="M{x0} {py:.1f}H{x1}"/>')
        parts.append(f'<text class="tick" x="{x0 - 6}" y="{py + 4:.1f}" text-anchor="end">{y.tick_text(value)}</text>')
    for value in x.tick_values():
        px = x.place(value, x0 + inset, x1 - inset)
        parts.append(f'<path class="grid" d="M{px:.1f} {y0}v4"/>')
        parts.append(f'<text class="tick" x="{px:.1f}" y="{y0 + 17}" text-anchor="middle">{x.tick_text(value)}</text>')
    parts.append(f'<path class="frame" d="M{x0} {y0}H{x1}"/>')
    parts.append(f'<text class="axis" x="{x1}" y="{HEIGHT - 4}" text-anchor="end">{escape(x.label)}</text>')
    for row, (value, label) in enumerate(marks):
        px = at((value, y.low))[0]
        room = px + 5 + len(label) * LETTER < x1
        parts.append(f'<path class="rule" d="M{px:.1f} {y0}V{y1}"/>' if px > x0 + 2 else "")
        at_text = f'x="{px + 5:.1f}"' if room else f'x="{px - 5:.1f}" text-anchor="end"'
        parts.append(f'<text class="note" {at_text} y="{y1 + 9 + 14 * row}">{escape(label)}</text>')
    pixels = [[(px + one.shift, py) for px, py in map(at, one.points)] for one in series]
    taken = [point for line in pixels for point in _dense(line)]
    for value, whole in rules:
        label = whole if len(whole) <= LONGEST else f"…{whole[1 - LONGEST :]}"  # of a folder's path its end says more
        line = y.place(value, y0, y1)
        parts.append(f'<path class="rule" d="M{x0} {line:.1f}H{x1}"/>')
        others = [(px, y.place(v, y0, y1)) for v, _ in rules if v != value for px in range(x0, x1, 6)]
        text, box = _rule_label(line, label, [*taken, *others], (x0, x1))
        parts.append(text)
        taken += box
    parts += [_drawn(one, line) for one, line in zip(series, pixels, strict=True)]
    return _svg(WIDTH, HEIGHT, title, "".join(parts))


def marker(colour: int, x: float, y: float, title: str = "") -> str:
    """The shape of a slot: circle, square, triangle, diamond in turn, so that colour is not needed.

    Where the palette's seven colours begin again, each has another shape than before.
    """
    shape = (
        f"M{x - 4.5:.1f} {y:.1f}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
        f"M{x - 4:.1f} {y - 4:.1f}h8v8h-8z",
        f"M{x:.1f} {y - 5.5:.1f}l5.2 9.4h-10.4z",
        f"M{x:.1f} {y - 5.8:.1f}l5.6 5.8l-5.6 5.8l-5.6 -5.8z",
    )[colour % 4]
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<path class="dot c{colour}" d="{shape}">{inside}</path>'


def polyline(points: Sequence[Point]) -> str:
    """The `d` of a path through `points`, in pixels."""
    return "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points) if points else ""


def _svg(width: int, height: int, title: str, inside: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{inside}</svg>'


def _drawn(series: Series, pixels: Sequence[Point]) -> str:
    look = "line faint" if series.look == "faint" else "line"
    line = f'<path class="{look} c{series.colour}" d="{polyline(pixels)}"/>' if len(pixels) > 1 else ""
    if series.look != "marked":
        return line
    titles = series.titles or [f"{series.name}: {number(value)}" for _, value in series.points]
    return line + "".join(marker(series.colour, *p, title) for p, title in zip(pixels, titles, strict=True))


def _dense(line: Sequence[Point]) -> list[Point]:
    """Points along a drawn line, close enough to find out whether a label would cover it."""
    between = [
        (a[0] + (b[0] - a[0]) * i / 24, a[1] + (b[1] - a[1]) * i / 24) for a, b in pairwise(line) for i in range(24)
    ]
    return [*between, *line]


def _rule_label(line: float, label: str, taken: Sequence[Point], sides: tuple[int, int]) -> tuple[str, list[Point]]:
    """The label of a horizontal line, below or above it, right or left, where it covers least; and its own points."""
    width = len(label) * LETTER
    best, least, text = [], math.inf, ""
    for side, height in ((1, 12), (1, -4), (0, 12), (0, -4)):
        start = sides[1] - width if side else sides[0]
        box = [(start + width * i / 8, line + height - dy) for i in range(9) for dy in (0, 8)]
        top, bottom = line + height - 12, line + height + 4
        hidden = sum(start - 6 <= px <= start + width + 6 and top <= py <= bottom for px, py in taken)
        if hidden < least:
            best, least, anchor = box, hidden, "end" if side else "start"
            at = f'x="{sides[side]}" y="{line + height:.1f}" text-anchor="{anchor}"'
            text = f'<text class="note" {at}>{escape(label)}</text>'
    return text, best


def _even_ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.99)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten and as many of their simple multiples as make at least three; even ticks over a narrow range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
        ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks
    return _even_ticks(low, high)
