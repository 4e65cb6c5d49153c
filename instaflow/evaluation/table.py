"""The report's table: its rows ranked, their figures with their intervals, the best of one step marked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from instaflow.evaluation.chance import is_chance, whose
from instaflow.evaluation.findings import reference
from instaflow.evaluation.parts import below, sign
from instaflow.evaluation.plots import Colours
from instaflow.evaluation.ranking import WAYS, Ranked, Ranking, order, shown
from instaflow.evaluation.report import Report, Row
from instaflow.evaluation.row_words import TO_TEACHER, parted, spread, told

MANY = 9  # columns; a table of more is set smaller
NOTHING = ("", "–")
FIGURES = {
    "frechet_distance_real": "Fréchet distance to real",
    "frechet_distance_teacher": "Fréchet distance to {}",
    "prompt_accuracy": "Prompt accuracy",
    "prompt_accuracy_unseen": "on an unseen template",
    "kernel_distance": "KID × 1,000",
    "precision": "Precision",
    "recall": "Recall",
    "clip_score": "CLIP score",
    "pixel_gap": "Gap to {}, pixels",
    "perceptual_gap": "Gap to {}, perceptual",
    "diversity": "Diversity",
    "straightness": "S(Z)",
    "straightness_relative": "S(Z), relative",
    "seconds_per_image": "Time per image",
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """texts: a row's each, in the table's order. figure: which of the rows', where it is one."""

    title: str
    texts: Sequence[str]
    figure: str = ""


def rows_table(report: Report, ranking: Ranking, colours: Colours) -> str:
    """All rows, those of one step first. A column that says nothing is left out."""
    columns = columns_of([one.row for one in ranking.rows])
    ranks = '<th scope="col">Rank</th>' if ranking.figure else ""
    heads = "".join(f'<th scope="col" class="wrap">{escape(column.title)}</th>' for column in columns)
    lines = [
        _line(one, [_cell(column, place, ranking, report) for column in columns], ranking, colours)
        for place, one in enumerate(ranking.rows)
    ]
    width, cut = len(columns) + 2, len(ranking.one_step)
    groups = [("In one step", lines[:cut]), ("In several steps, for scale", lines[cut:])]
    body = "".join(_group(title, group, width, both=0 < cut < len(lines)) for title, group in groups if group)
    many = " many" if len(columns) > MANY else ""
    head = f'<thead><tr>{ranks}<th scope="col" class="left">Model</th>{heads}</tr></thead>'
    return f'<table class="ranked{many}">{head}{body}</table>'


def columns_of(rows: Sequence[Row]) -> list[Column]:
    several_counts = len({row.num_samples for row in rows}) > 1
    scales = ["" if row.guidance_scale is None else f"{row.guidance_scale:g}" for row in rows]
    columns = [
        Column(title="Steps", texts=[str(row.num_steps) for row in rows]),
        Column(title="Guidance", texts=scales),
        Column(title="Samples", texts=[f"{row.num_samples:,}" if several_counts else "" for row in rows]),
        *(
            Column(title=FIGURES[name].format(whose(rows)), texts=[told(row, name) for row in rows], figure=name)
            for name in FIGURES
        ),
    ]
    return [column for column in columns if any(text not in NOTHING for text in column.texts)]


def _group(title: str, lines: Sequence[str], width: int, *, both: bool) -> str:
    """Rows of one step, or of several, under a heading where there are both."""
    head = f'<tr class="group"><th scope="rowgroup" colspan="{width}"><span>{title}</span></th></tr>' if both else ""
    return f"<tbody>{head}{''.join(lines)}</tbody>"


def _line(one: Ranked, cells: Sequence[str], ranking: Ranking, colours: Colours) -> str:
    rank = f"<td>{one.rank or '–'}</td>" if ranking.figure else ""
    name = f'<td class="name">{sign(colours[one.row.label])}{escape(one.row.label)}</td>'
    return f"<tr>{rank}{name}{''.join(cells)}</tr>"


def _cell(column: Column, place: int, ranking: Ranking, report: Report) -> str:
    row, (value, half) = ranking.rows[place].row, parted(column.texts[place])
    if value in NOTHING and column.figure in TO_TEACHER and row is reference(report):
        value, half = "itself", ""
    mark = _mark(row, column.figure, ranking) if column.figure in WAYS else ""
    marked = f'<span class="{mark}">{value}</span>' if mark else value
    return f"<td>{marked}{below(half)}</td>"


def _mark(row: Row, figure: str, ranking: Ranking) -> str:
    """ "best" of the rows of one step, by the figure as it reads, or "near", not told apart from that."""
    single = [one.row for one in ranking.one_step if math.isfinite(order(one.row, figure))]
    if len(single) < 2 or not any(row is other for other in single):
        return ""
    best = min(single, key=lambda other: order(other, figure))
    if shown(row, figure) == shown(best, figure):
        return "best"
    return "near" if is_chance(row, best, figure, same=0.0) else ""


def caption(ranking: Ranking) -> str:
    """What the table's marks and ± are."""
    told_of_spread, marks = spread([one.row for one in ranking.rows]), ""
    if len(ranking.one_step) > 1:
        near = (
            " Where figures have a ±, those not told apart from it are marked too: other prompts and noise might turn "
            "the order."
        )
        marks = f"Marked, in bold, the best of the one-step rows.{near if told_of_spread else ''}"
    earlier = ""
    if any(one.row.beside for one in ranking.rows):
        earlier = "Rows of earlier reports bear those reports’ names; what was measured otherwise is left out."
    return " ".join(text for text in (marks, told_of_spread, earlier) if text)
