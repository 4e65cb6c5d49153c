"""Why it works, told to somebody who has never heard of reflow; what was measured stands under each claim."""

from html import escape

from instaflow.evaluation import findings, sketch
from instaflow.evaluation.parts import beside, legend, paragraph, section
from instaflow.evaluation.plots import Colours, path_plots, straightness_plot
from instaflow.evaluation.report import Report, Stage, model_kind
from instaflow.evaluation.wording import joined, named

REFLOWED = ("flow", "student")
"""Kinds of models that reflow had a part in."""


def idea(report: Report, colours: Colours) -> str:
    """How few steps come about, by the ways that the report is about."""
    kinds = _kinds(report)
    reflowed, matched = not kinds.isdisjoint(REFLOWED), "dmd" in kinds
    panels = sketch.panels() if reflowed else sketch.panels()[:2]
    drawings = "".join(
        f'<figure class="panel"><h3>{escape(title)}</h3>{svg}<figcaption>{escape(caption)}</figcaption></figure>'
        for title, svg, caption in panels
    )
    ways = ["Reflow straightens the paths."] if reflowed else []
    if matched:
        ways.append(
            "Distribution matching follows no path: it asks of the images that they be, taken together, as the "
            "teacher’s are, and not which noise each of them comes from."
        )
    paths, sketched = _paths(report, colours), "A sketch, computed from the exact flow of a one-dimensional example."
    return section(
        "Why one step can be enough",
        paragraph(
            [
                "A diffusion model makes an image by following a path from noise to data. At every moment the network "
                "gives the direction, the velocity, and the sampler goes a little way along it: one step, one pass of "
                "the network. Where the path bends, the steps must be small. Where it is straight, the first direction "
                "is already the right one, and a single step covers the whole way.",
                *ways,
            ]
        ),
        f'<div class="{"three" if reflowed else "two"}">{drawings}</div>',
        paragraph(
            [sketched, *(["What follows was measured on the models of this experiment."] if paths else [])],
            "small soft",
        ),
        paths,
    )


def _couplings(stages: list[Stage]) -> str:
    """What couplings are, sampled ones and those of real images."""
    told = (
        "A coupling is a noise together with the image that a model makes of it, step by step, without further "
        "randomness."
    )
    if not all(stage.of_real_images for stage in stages):
        told += " Made so, they need no image of the original data set."
    if real := [named(stage.name) for stage in stages if stage.of_real_images]:
        told += f" Those in {joined(real)} are of real images, each followed back to the noise that leads to it."
    return told


def _counts(stages: list[Stage]) -> list[str]:
    counts = [f"{stage.samples:,} in {named(stage.name)}" for stage in stages if stage.samples]
    return [f"Couplings made: {joined(counts)}."] if counts else []


def _kinds(report: Report) -> set[str]:
    """The kinds of the models that are told of: of the rows, and those of the stages that no row shows."""
    made = {model_kind(stage.name, report.stages) for stage in report.stages if stage.kind in ("reflow", "distill")}
    return made | {row.kind for row in findings.own_rows(report)}


def contributions(report: Report, colours: Colours) -> str:
    """What each stage does, in the field's terms, and what it did here."""
    couplings = [stage for stage in report.stages if stage.kind == "couple"]
    kinds = _kinds(report) | ({"couple"} if couplings else set())
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
            _couplings(couplings),
            _counts(couplings),
        ),
        (
            "flow",
            "Reflow",
            "A network is trained on the straight lines between coupled noise and image: at every point of a line, "
            "(1 − t)·noise + t·image with t from 0 to 1, it is to answer with the line’s direction, image − noise. "
            "Since coupled lines hardly cross, what it learns is nearly the lines themselves: a 2-rectified flow, made "
            "to give the same images on straighter paths.",
            findings.reflow(report),
        ),
        (
            "student",
            "Distillation",
            "One reflow seldom makes the paths perfectly straight. The student is trained for the one step only: from "
            "the noise right to the image of its coupling. Straighter paths leave it less to make up for.",
            findings.distillation(report),
        ),
        (
            "direct",
            "The control: distillation without reflow",
            "The same distillation, but straight from the teacher’s couplings. If it does as well, the student owes "
            "its quality to distillation alone; if it does worse, reflow is what made the difference.",
            findings.control(report),
        ),
        (
            "progressive",
            "Another road: progressive distillation",
            "No paths are straightened here. A student learns to land in one step where its teacher lands in two, and "
            "is the next one’s teacher; so the steps are halved again and again, down to a single one.",
            findings.progressive(report),
        ),
        (
            "dmd",
            "Distribution matching" if kinds.isdisjoint(REFLOWED) else "Another road: distribution matching",
            "Images are matched as a whole, not one by one. Two diffusion models look at the student’s, noised again: "
            "the teacher, which knows what images should be like, and a copy of it that is kept learning what the "
            "student’s are like. Where they disagree, the student’s image is moved the teacher’s way. Beside that, a "
            "regression on couplings may hold it to the teacher’s modes.",
            findings.dmd(report),
        ),
    ]
    slots = {kind: colours[rows[0].label] for kind in kinds if (rows := findings.rows_of(report, kind))}
    items = []
    for kind, title, text, found in parts:
        if kind in kinds and (found or kind in ("teacher", "couple", "flow", "dmd")):
            colour = f" c{slots[kind]}" if kind in slots else ""
            measured = paragraph(found, f"found{colour}")
            items.append(f"<li><div><h3>{escape(title)}</h3>{paragraph([text])}{measured}</div></li>")
    return section("What each stage contributes", f'<ol class="story">{"".join(items)}</ol>' if items else "")


def _paths(report: Report, colours: Colours) -> str:
    """The measured paths and their departure from a straight line."""
    panels = [
        f'<figure class="panel"><h3>{escape(model)}</h3>{svg}</figure>'
        for model, svg in path_plots(report.trajectories, colours)
    ]
    caption = (
        "The paths of a handful of noises (open circles) to their images (filled), the same noises in each drawing, "
        "projected onto the same plane; dashed, the straight line from end to end. A projection keeps straight lines "
        "straight: what bends here, bends. Paths that seem to cross here pass one another in the dimensions left out."
    )
    paths = f'<div class="two">{"".join(panels)}</div><p class="small soft">{caption}</p>' if panels else ""
    plot = straightness_plot(report.straightness, colours)
    if not plot:
        return paths
    names = [profile.model for profile in report.straightness]
    explained = [
        "The same in figures: at each time, how far the velocity on the way departs from the straight direction, from "
        "the noise to the end of its path. 0 where they agree; the mean over time is the relative straightness. Where "
        "that is 0, one step is exact.",
        "E‖(Z₁ − Z₀) − v(Z(t), t)‖² / E‖Z₁ − Z₀‖², with Z₀ the noise, Z₁ the end of its path and v the velocity; the "
        "table’s S(Z) is the numerator alone, averaged over time. A diffusion model knows no time quite at 0 or 1: its "
        "curve ends a little inside.",
    ]
    texts = paragraph(explained[:1]) + "".join(
        paragraph([text], "small soft") for text in (explained[1], report.protocol.straightness) if text
    )
    return paths + beside(legend(names, colours) + plot, texts)
