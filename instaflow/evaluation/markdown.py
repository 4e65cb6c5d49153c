"""The report as Markdown: for a model card, an issue, a terminal."""

from collections.abc import Callable, Sequence

from instaflow.evaluation import aims, findings
from instaflow.evaluation.card import PROTOCOL
from instaflow.evaluation.report import Report, Row
from instaflow.evaluation.wording import duration, number, percent

COLUMNS: Sequence[tuple[str, Callable[[Row], str]]] = (
    ("model", lambda row: row.label),
    ("steps", lambda row: str(row.num_steps)),
    ("guidance", lambda row: "–" if row.guidance_scale is None else f"{row.guidance_scale:g}"),
    ("Fréchet distance to real", lambda row: number(row.frechet_distance_real)),
    ("to teacher", lambda row: number(row.frechet_distance_teacher)),
    ("drawn right", lambda row: percent(row.prompt_accuracy)),
    ("KID × 1,000", lambda row: number(None if row.kernel_distance is None else 1000 * row.kernel_distance)),
    ("precision", lambda row: percent(row.precision)),
    ("recall", lambda row: percent(row.recall)),
    ("CLIP score", lambda row: number(row.clip_score)),
    ("gap to teacher, pixels", lambda row: number(row.pixel_gap)),
    ("gap to teacher, perceptual", lambda row: number(row.perceptual_gap)),
    ("diversity", lambda row: number(row.diversity)),
    ("S(Z), relative", lambda row: number(row.straightness_relative)),
    ("time an image", lambda row: duration(row.seconds_per_image)),
)


def markdown(report: Report) -> str:
    """A table of the rows, what they say, and the protocol card."""
    columns = [(title, [told(row) for row in report.rows]) for title, told in COLUMNS]
    columns = [(title, cells) for title, cells in columns if set(cells) != {"–"}]
    said = " ".join(findings.headline(report)).replace("\N{NO-BREAK SPACE}", " ")
    lines = [f"# {report.title}", "", said, ""]
    lines += [table_row([title for title, _ in columns]), table_row(["---"] * len(columns))]
    lines += [table_row(list(cells)) for cells in zip(*(cells for _, cells in columns), strict=True)]
    found = aims.outcomes({report.seed: report})
    lines += ["", "Aims:", "", *(f"- {one.asked}: {one.verdict} ({one.found})" for one in found)] if found else []
    if report.rows and (card := report.rows[0].card):
        lines += ["", "Protocol:", ""]
        lines += [f"- {name.replace('_', ' ')}: {card[name]}" for name in PROTOCOL if card.get(name) not in (None, "")]
    return "\n".join(lines) + "\n"


def table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
