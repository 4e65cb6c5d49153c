"""The demonstration as a page for somebody who has heard of neither method: what is seen, and what was measured."""

import base64
from collections import Counter
from collections.abc import Sequence
from html import escape
from statistics import mean

import torch

from instaflow.evaluation.page import document
from instaflow.evaluation.parts import figure, pairs_list, paragraph, section, sign
from instaflow.evaluation.style import STYLE
from instaflow.evaluation.wording import number, percent
from instaflow.toy import demonstration as settings
from instaflow.toy.demonstration import FAIR, REFLOWED, START, TEACHER, Demonstration, Measures
from instaflow.toy.figure import COLOURS, DARK, LIGHT, MATCHING, REFLOW, Panel, picture, said
from instaflow.toy.matching import CASES, CLEAREST, NOISIEST, REGRESSION
from instaflow.toy.nets import BATCH

ALONE, BOTH, FULL = CASES
NAMES = {
    START: "the start",
    ALONE: "(a) real score",
    BOTH: "(b) real and fake score",
    FULL: "(c) with regression",
    REFLOWED: "one step after reflow",
    TEACHER: f"the teacher, {settings.TEACHER_STEPS} steps",
}
OWN_STYLE = """
.two img { display: block; width: 100%; height: auto; border-radius: 6px; }
.two h3 { display: flex; justify-content: space-between; gap: 10px; margin-bottom: 8px; }
.two h3 span { font-weight: 400; color: var(--soft); white-space: nowrap; }
.formula { text-align: center; font-size: 1.1rem; margin: 16px 0; max-width: none; }
"""


def page(shown: Demonstration, hardware: str) -> str:
    """One file that needs no network and no script."""
    sections = [_header(shown, hardware), _matching(shown), _figures(shown), _reflow(shown), _protocol(shown)]
    return document("Distribution matching, on five modes", STYLE + OWN_STYLE, sections)


def covered(shown: Demonstration, model: str) -> str:
    """How many modes, by seed: "4 of 5", or "4 of 5 in 7 seeds, 5 of 5 in 1 seed"."""
    modes, counts = len(shown.mixture.means), Counter(shown.covered(model))
    if len(counts) == 1:
        return f"{next(iter(counts))} of {modes}"
    return ", ".join(f"{many} of {modes} in {n} seed{'s' * (n > 1)}" for many, n in sorted(counts.items()))


def average(shown: Demonstration, model: str) -> Measures:
    """The means over the seeds; of the modes covered, the fewest."""
    every = shown.measures[model]
    return Measures(
        shares=[mean(shares) for shares in zip(*(one.shares for one in every), strict=True)],
        covered=min(one.covered for one in every),
        off_modes=mean(one.off_modes for one in every),
        energy_distance=mean(one.energy_distance for one in every),
        teacher_distance=mean(one.teacher_distance for one in every),
    )


def bend(shown: Demonstration, model: str) -> str:
    """A flow's S(Z) and how much that is of its squared speed, over the seeds."""
    every = shown.straightness[model]
    return f"{number(mean(one.value for one in every))} ({percent(mean(one.relative for one in every))})"


def _header(shown: Demonstration, hardware: str) -> str:
    seeds = f"seed {shown.seeds[0]}" if len(shown.seeds) == 1 else f"seeds {shown.seeds[0]} to {shown.seeds[-1]}"
    sentences = [
        f"A generator that follows the real score alone ends on {covered(shown, ALONE)} modes; with a fake score "
        f"beside it, on {covered(shown, BOTH)}; with regression as well, on {covered(shown, FULL)}."
    ]
    return (
        '<header>\n<div class="soft">InstaFlow: two ways to a one-step generator, on a toy</div>\n'
        "<h1>Distribution matching, on five modes</h1>\n"
        f'<div class="soft">{escape(f"instaflow toy · {seeds} · {hardware}")}</div>\n'
        f"{paragraph(sentences, 'lead')}\n</header>"
    )


def _matching(shown: Demonstration) -> str:
    captions = {
        START: "All begin as a copy of the teacher’s network, one step of which lands near the mean of the data.",
        ALONE: "Without a fake score the sample itself stands in its place. Every sample climbs to where the data are "
        "densest around it, and nothing keeps two of them apart.",
        BOTH: "The fake score drives samples apart, and they fill the modes nearby. A mode far from every sample is "
        "hardly felt.",
        FULL: "Pairs of noise and the teacher’s sample bring samples to every mode. From there the scores do the rest.",
    }
    fair = float(shown.mixture.weights[0])
    return section(
        "Three cases of one gradient",
        paragraph(
            [
                "The data are five Gaussian modes, and their score, the direction in which the data become denser, is "
                "known exactly. A one-step generator turns noise into samples x. Distribution matching distillation "
                "(DMD, arXiv 2311.18828) adds noise to x and asks two models which data they see behind it: the "
                "teacher, who knows the real data (the real score), and a network that is trained on the generator’s "
                "samples all along (the fake score). The sample is moved from what the second sees to what the first "
                "sees:",
            ]
        ),
        '<p class="formula">x ← x − (μ<sub>fake</sub> − μ<sub>real</sub>) / mean |x − μ<sub>real</sub>|</p>',
        _panels(shown, MATCHING, captions),
        paragraph(
            [
                f"Percentages: the share of the samples on each mode, of seed {shown.seeds[0]}. A mode is covered if "
                f"it holds at least {FAIR:.0%} of what it has of the data, thus {FAIR * fair:.0%} of the samples; a "
                "dashed ring marks one that is not."
            ],
            "small soft",
        ),
    )


def _figures(shown: Demonstration) -> str:
    heads = ("Modes covered", "Share off the modes", "Energy distance to the data", "Distance to the teacher’s sample")
    lines = []
    for model in (START, *CASES, REFLOWED, TEACHER):
        own = average(shown, model)
        cells = [
            covered(shown, model),
            percent(own.off_modes),
            number(own.energy_distance),
            "itself" if model == TEACHER else number(own.teacher_distance),
        ]
        name = f"{sign(COLOURS[model])}{escape(NAMES[model])}"
        lines.append(f"<tr><td>{name}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    head = '<th scope="col">Model</th>' + "".join(f'<th scope="col" class="wrap">{escape(text)}</th>' for text in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    between = torch.pdist(shown.mixture.means).tolist()
    many = f"Means over {len(shown.seeds)} seeds. " if len(shown.seeds) > 1 else ""
    caption = (
        f"{many}Distances are in units of the noise’s deviation; the modes lie {min(between):.0f} to "
        f"{max(between):.0f} apart. The teacher’s sample is where its flow leads from the same noise: only regression "
        "and reflow ask for it."
    )
    return section("What was measured", figure(f'<div class="scroll">{table}</div>', caption))


def _reflow(shown: Demonstration) -> str:
    captions = {
        "Paths before reflow": "The teacher’s flow from noise (circles) to data. All head for the mean first, and turn "
        "to their mode late.",
        "One step before": "One step along the first direction therefore ends near the mean.",
        "Paths after reflow": "A network trained on the straight lines between the ends of those paths.",
        "One step after": "The first direction is nearly the whole way. Samples between the modes come from noise on "
        "the border between two of them: a small network turns there gradually.",
    }
    return section(
        "Reflow on the same mixture",
        paragraph(
            [
                "InstaFlow’s way matches no distributions. It pairs each noise with the teacher’s sample of it, and "
                "trains a flow on the straight lines between them. Straightness S(Z) is the mean squared deviation of "
                f"the velocity from the straight way, 0 if all paths are straight. Here it falls from "
                f"{bend(shown, TEACHER)} to {bend(shown, REFLOWED)}; in brackets, relative to the squared length of "
                "the way.",
            ]
        ),
        _panels(shown, REFLOW, captions),
    )


def _panels(shown: Demonstration, panels: Sequence[Panel], captions: dict[str, str]) -> str:
    inside = ""
    for panel in panels:
        text = captions.get(panel.title) or captions[panel.model]
        inside += (
            f'<figure class="panel"><h3>{escape(panel.title)} <span>{escape(said(panel, shown))}</span></h3>'
            f"{_image(panel, shown)}<figcaption>{escape(text)}</figcaption></figure>"
        )
    return f'<div class="two">{inside}</div>'


def _image(panel: Panel, shown: Demonstration) -> str:
    """The panel in the colours of the page that the reader sees."""
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(picture(panel, shown, look)).decode()}" for look in (LIGHT, DARK)
    )
    media = "screen and (prefers-color-scheme: dark)"
    return (
        f'<picture><source media="{media}" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(f"{panel.title}: {said(panel, shown)}")}"></picture>'
    )


def _protocol(shown: Demonstration) -> str:
    return section(
        "How it was done",
        pairs_list(
            [
                (
                    "Data",
                    f"{len(shown.mixture.means)} equal modes of deviation {shown.mixture.std:g}; noise of deviation 1",
                ),
                (
                    "Networks",
                    f"three hidden layers of {settings.WIDTH}, all started as one 1-rectified flow of the data",
                ),
                (
                    "Distribution matching",
                    f"{settings.MATCHING_STEPS} steps of {BATCH} samples, one of the fake score after each; "
                    f"times {NOISIEST:g} to {CLEAREST:g}, of 0 noise and 1 data; weight of the regression "
                    f"{REGRESSION:g}",
                ),
                ("Pairs", f"{settings.PAIRS:,} of the teacher’s exact flow in {settings.TEACHER_STEPS} steps"),
                ("Reflow", f"{settings.REFLOW_SAMPLES // BATCH:,} steps of {BATCH} pairs"),
                ("Measured on", f"{settings.EVALUATED:,} fresh noises a seed"),
            ]
        ),
    )
