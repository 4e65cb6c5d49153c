"""The demonstration as panels: samples and paths over the mixture, in the colours of the report pages."""

import io
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image

from instaflow.evaluation import style
from instaflow.evaluation.wording import number
from instaflow.toy.demonstration import FAIR, REFLOWED, START, TEACHER, Demonstration
from instaflow.toy.matching import CASES

AIR = 4.6  # around the outermost modes
SAMPLES, PATHS = 800, 110  # drawn of each
COLOURS = {START: 0, CASES[0]: 6, CASES[1]: 2, CASES[2]: 3, TEACHER: 0, REFLOWED: 1}
"""The palette's slot of each model."""


@dataclass(frozen=True)
class Look:
    """The colours of a page, light or dark."""

    panel: str
    ink: str
    soft: str
    bell: str
    models: tuple[str, ...]


LIGHT = Look("#ffffff", "#1c2024", "#5c646d", "#e4e7ea", style.LIGHT)
DARK = Look("#1d2125", "#e8eaec", "#a3abb3", "#31373d", style.DARK)


@dataclass(frozen=True)
class Panel:
    """One picture of a model: its samples, its paths from noise, or one step from noise."""

    title: str
    model: str
    kind: Literal["samples", "paths", "one step"] = "samples"


MATCHING = (
    Panel("The start", START),
    Panel("(a) Real score", CASES[0]),
    Panel("(b) Real and fake score", CASES[1]),
    Panel("(c) With regression", CASES[2]),
)
REFLOW = (
    Panel("Paths before reflow", TEACHER, "paths"),
    Panel("One step before", START, "one step"),
    Panel("Paths after reflow", REFLOWED, "paths"),
    Panel("One step after", REFLOWED, "one step"),
)


def poster(shown: Demonstration) -> bytes:
    """All panels in one PNG."""
    figure = Figure(figsize=(16, 5.75), facecolor=LIGHT.panel)
    for panel, axes in zip((*MATCHING, *REFLOW), figure.subplots(2, 4).flat, strict=True):
        draw(axes, panel, shown, LIGHT)
        axes.set_title(panel.title, fontsize=13, fontweight="bold", color=LIGHT.ink, loc="left", pad=6)
        axes.set_title(said(panel, shown), fontsize=11.5, color=LIGHT.soft, loc="right", pad=6)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.945, bottom=0.015, wspace=0.04, hspace=0.14)
    return png(figure, 120)


def picture(panel: Panel, shown: Demonstration, look: Look) -> bytes:
    """One panel as a PNG, without its title."""
    figure = Figure(figsize=(4.6, 2.7), facecolor=look.panel)
    axes = figure.add_axes((0, 0, 1, 1))
    draw(axes, panel, shown, look)
    axes.set_axis_off()
    return png(figure, 170)


def png(figure: Figure, resolution: int) -> bytes:
    """The same bytes for the same figure, without version and date; 96 colours, which keeps it small."""
    drawn, content = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=resolution)
    image = Image.open(drawn).convert("RGB").quantize(96, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    image.save(content, "png", optimize=True)
    return content.getvalue()


def said(panel: Panel, shown: Demonstration) -> str:
    """What was measured of a panel, in a few words."""
    if panel.kind == "paths":
        return f"S(Z) = {number(shown.straightness[panel.model][0].value)}"
    measures = shown.measures[panel.model][0]
    if panel.kind == "one step":
        return f"{number(measures.energy_distance)} from the data"
    return f"{measures.covered} of {len(shown.mixture.means)} modes"


def draw(axes: Axes, panel: Panel, shown: Demonstration, look: Look) -> None:
    """The modes, the farther from each the paler, and what `panel` shows over them."""
    means, std = shown.mixture.means.numpy(), shown.mixture.std
    shares = shown.measures[panel.model][0].shares
    colour = look.models[COLOURS[panel.model]]
    for mean in means:
        for reach in (3, 2, 1):
            axes.add_patch(Circle(mean, reach * std, facecolor=look.bell, alpha=0.6, linewidth=0, zorder=0))
    if panel.kind != "samples":
        path = shown.paths[TEACHER if panel.model == START else panel.model].states[:, :PATHS, :, 0, 0].numpy()
        lines = path.transpose(1, 0, 2)
        if panel.kind == "one step":
            lines = lines[:, :1].repeat(2, 1)
            lines[:, 1] = shown.samples[panel.model][:PATHS].numpy()
        axes.add_collection(LineCollection(list(lines), colors=colour, linewidths=0.8, alpha=0.55, zorder=2))
        axes.scatter(
            lines[:, 0, 0], lines[:, 0, 1], s=7, facecolor=look.panel, edgecolor=look.soft, linewidth=0.7, zorder=3
        )
        axes.scatter(lines[:, -1, 0], lines[:, -1, 1], s=7, color=colour, linewidth=0, zorder=4)
    else:
        points = shown.samples[panel.model][:SAMPLES].numpy()
        axes.scatter(points[:, 0], points[:, 1], s=5, color=colour, alpha=0.6, linewidth=0, zorder=2)
        for mean, share, fair in zip(means, shares, shown.mixture.weights.tolist(), strict=True):
            missed = share < FAIR * fair
            ring = Circle(mean, 3.2 * std, fill=False, edgecolor=look.soft, linewidth=1, zorder=3)
            ring.set_linestyle((0, (3, 3)) if missed else "solid")
            axes.add_patch(ring)
            side = 1 if mean[1] > -1 else -1  # above, or below
            axes.text(
                mean[0],
                mean[1] + side * 4.3 * std,
                f"{100 * share:.0f}%",
                fontsize=10,
                color=look.soft if missed else look.ink,
                fontweight="normal" if missed else "bold",
                ha="center",
                va="center",
                zorder=5,
            )
    low, high = means.min(0) - AIR, means.max(0) + AIR
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal", xticks=(), yticks=())
    axes.set_facecolor(look.panel)
    for spine in axes.spines.values():
        spine.set(color=look.bell)
