"""Reflow in one dimension, where it can be drawn: noise from one bell curve, data from two narrow ones.

The flow is the exact one, so that the drawing shows what happens and not what an artist thinks happens.
"""

import math
from collections.abc import Callable
from html import escape
from statistics import NormalDist

import numpy as np

from instaflow.evaluation.svg import Point, polyline

MODES = np.array([-1.5, 1.5])  # centres of the two kinds of data
SPREAD = 0.16  # standard deviation of each
NOISES = np.array([NormalDist().inv_cdf((i + 0.5) / 14) for i in range(14)])  # an even sample of the noise
WIDTH, HEIGHT = 300, 210
TIMES = np.linspace(0, 1, 101)


def velocity(x: np.ndarray, t: float) -> np.ndarray:
    """E[data - noise | x_t = x] for x_t = (1-t) noise + t data: the mean direction of all lines through x."""
    mode = MODES[:, None]
    variance = (1 - t) ** 2 + (t * SPREAD) ** 2  # of x_t, given the mode
    logits = -((x - t * mode) ** 2) / (2 * variance)
    weight = np.exp(logits - logits.max(axis=0))
    weight /= weight.sum(axis=0)
    slope = (t * SPREAD**2 - (1 - t)) / variance  # of E[data - noise | x_t, mode] in x_t
    return (weight * (mode + slope * (x - t * mode))).sum(axis=0)


def flow_paths() -> np.ndarray:
    """The paths from NOISES, [time, noise]: Euler steps of the exact velocity."""
    path = [NOISES]
    for t, step in zip(TIMES[:-1], np.diff(TIMES), strict=True):
        path.append(path[-1] + step * velocity(path[-1], float(t)))
    return np.stack(path)


def panels() -> list[tuple[str, str, str]]:
    """(title, SVG, caption) of the three drawings: pairs at random, the flow between them, the pairs of reflow."""
    curved = flow_paths()
    ends = curved[-1]
    shuffled = ends[[9, 2, 11, 5, 13, 0, 7, 3, 12, 6, 1, 10, 4, 8]]
    one_step = NOISES + velocity(NOISES, 0.0)
    return [
        (
            "Pairs at random cross",
            _panel("random pairs cross", [[(0, a), (1, b)] for a, b in zip(NOISES, shuffled, strict=True)], shuffled),
            "Training a diffusion model joins every noise to any data point. The lines cross. Where they cross, a "
            "network that is asked for the direction can only answer with the average of them.",
        ),
        (
            "So the flow’s paths bend",
            _panel("the paths bend", [list(zip(TIMES, path, strict=True)) for path in curved.T], ends, one_step),
            "Following the averages gives paths that bend, and many small steps are needed to stay on them. One big "
            "step along the first direction (dashed) ends between the two kinds of data: a blur.",
        ),
        (
            "Pairs of reflow run straight",
            _panel("straight lines", [[(0, a), (1, b)] for a, b in zip(NOISES, ends, strict=True)], ends, ends),
            "Now each noise is paired with the end of its own path. Paths of a flow never cross, so these lines "
            "hardly do; the average is a single direction, and one step along it reaches the data.",
        ),
    ]


def _panel(title: str, paths: list[list[Point]], ends: np.ndarray, one_step: np.ndarray | None = None) -> str:
    """Time runs to the right, the one dimension upwards; coloured by the kind of data where a path ends."""
    left, right, middle, scale = 46, WIDTH - 46, HEIGHT / 2, HEIGHT / 5.2

    def at(t: float, x: float) -> Point:
        return left + (right - left) * t, middle - scale * x

    parts = [_bell(left, -1, at, lambda x: NormalDist().pdf(x) / 0.4), _bell(right, 1, at, _data_density)]
    for path, end in zip(paths, ends, strict=True):
        colour = 4 if end > 0 else 5
        start, stop = at(*path[0]), at(*path[-1])
        parts.append(f'<path class="thin c{colour}" d="{polyline([at(*point) for point in path])}"/>')
        parts.append(f'<circle class="start" cx="{start[0]:.1f}" cy="{start[1]:.1f}" r="2.6"/>')
        parts.append(f'<circle class="end c{colour}" cx="{stop[0]:.1f}" cy="{stop[1]:.1f}" r="2.6"/>')
    if one_step is not None and not np.array_equal(one_step, ends):
        for noise, landing in zip(NOISES[::3], one_step[::3], strict=True):
            parts.append(f'<path class="step" d="{polyline([at(0, noise), at(1, landing)])}"/>')
            x, y = at(1, landing)
            parts.append(f'<path class="cross" d="M{x - 3.5:.1f} {y - 3.5:.1f}l7 7m0 -7l-7 7"/>')
    parts.append(f'<text class="tick" x="{left}" y="{HEIGHT - 2}" text-anchor="middle">noise</text>')
    parts.append(f'<text class="tick" x="{right}" y="{HEIGHT - 2}" text-anchor="middle">data</text>')
    label = escape(f"Sketch in one dimension: {title}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _data_density(x: float) -> float:
    return max(math.exp(-(((x - mode) / SPREAD) ** 2) / 2) for mode in MODES)


def _bell(edge: float, side: int, at: Callable[[float, float], Point], density: Callable[[float], float]) -> str:
    """A density drawn sideways at the left (side -1) or right (1) edge; `density` is 1 at its peak."""
    heights = np.linspace(-2.25, 2.25, 91)
    outline = [(edge + side * (6 + 26 * density(float(x))), at(0, float(x))[1]) for x in heights]
    foot = edge + side * 6
    return f'<path class="bell" d="{polyline([(foot, outline[0][1]), *outline, (foot, outline[-1][1])])}z"/>'
