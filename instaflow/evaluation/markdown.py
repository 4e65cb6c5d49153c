"""The report as Markdown: for a model card, an issue, a terminal."""

from collections.abc import Sequence

from instaflow.evaluation import aims, findings
from instaflow.evaluation.card import PROTOCOL
from instaflow.evaluation.chance import whose
from instaflow.evaluation.ranking import ranking
from instaflow.evaluation.report import Report, Row
from instaflow.evaluation.row_words import CARD_HEADS, card_told, circumstances, spread, told
from instaflow.evaluation.short_names import with_short_names

FIGURES = {
    "frechet_distance_real": "Fréchet distance to real",
    "frechet_distance_teacher": "to {}",
    "prompt_accuracy": "drawn right",
    "kernel_distance": "KID × 1,000",
    "precision": "precision",
    "recall": "recall",
    "clip_score": "CLIP score",
    "pixel_gap": "gap to {}, pixels",
    "perceptual_gap": "gap to {}, perceptual",
    "diversity": "diversity",
    "straightness_relative": "S(Z), relative",
    "seconds_per_image": "time an image",
}


def markdown(report: Report) -> str:
    """A table of the rows by rank, what they say, and the protocol card."""
    report = with_short_names(report)
    ranked = ranking(report.rows)
    rows = [one.row for one in ranked.rows]
    columns = [("rank", [str(one.rank or "–") for one in ranked.rows])]
    columns += [("model", [row.label for row in rows]), *columns_of(rows)]
    columns = [(title, cells) for title, cells in columns if set(cells) != {"–"}]
    lines = [f"# {report.title}", "", " ".join(findings.headline(report)), ""]
    lines += [table_row([title for title, _ in columns]), table_row(["---"] * len(columns))]
    lines += [table_row(list(cells)) for cells in zip(*(cells for _, cells in columns), strict=True)]
    groups = "; the rows of one step first, then the others, with ranks of their own"
    order = f"{ranked.explained}{groups if ranked.one_step and ranked.several else ''}." if ranked.figure else ""
    if notes := [text for text in (order, spread(rows)) if text]:
        lines += ["", " ".join(notes)]
    found = aims.outcomes({report.seed: report})
    lines += ["", "Aims:", "", *(f"- {one.asked}: {one.verdict} ({one.found})" for one in found)] if found else []
    lines += protocol(report, rows)
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ") + "\n"


def columns_of(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """(title, a cell for each row): steps, guidance and figures."""
    scales = ["–" if row.guidance_scale is None else f"{row.guidance_scale:g}" for row in rows]
    figures = [(title.format(whose(rows)), [told(row, figure) for row in rows]) for figure, title in FIGURES.items()]
    return [("steps", [str(row.num_steps) for row in rows]), ("guidance", scales), *figures]


def protocol(report: Report, rows: Sequence[Row]) -> list[str]:
    """What all rows have in common, then what each one was; nothing where the first has no card."""
    words = report.protocol
    if not rows or not rows[0].card:
        return []
    card = rows[0].card
    said = {"samples": words.samples, f"the {whose(rows)}’s images": words.reference_teacher}
    lines = ["", "Protocol:", "", *(f"- {name}: {text}" for name, text in said.items() if text)]
    lines += [f"- {name.replace('_', ' ')}: {card[name]}" for name in PROTOCOL if card.get(name) not in (None, "")]
    lines += [f"- {whose}: {text}" for whose, text in circumstances(rows)]
    lines += ["", "Rows:", ""]
    for row in rows:
        told_of = [f"{head.lower()} {text}" for head, text in zip(CARD_HEADS, card_told(row), strict=True)]
        whole = str(row.card.get("model", ""))
        name = row.label if whole in row.label else f"{row.label} ({whole})"
        lines.append(f"- {name}: {', '.join(told_of)}")
    return lines


def table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split("\n")).replace("|", "\\|") for cell in cells) + " |"
