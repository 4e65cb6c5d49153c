"""The report as Markdown: for a model card, an issue, a terminal."""

from collections.abc import Callable, Sequence

from instaflow.evaluation import aims, findings
from instaflow.evaluation.card import PROTOCOL
from instaflow.evaluation.ranking import ranking
from instaflow.evaluation.report import Report, Row
from instaflow.evaluation.row_words import CARD_HEADS, card_told, circumstances, spread, told
from instaflow.evaluation.short_names import with_short_names

COLUMNS: Sequence[tuple[str, Callable[[Row], str]]] = (
    ("model", lambda row: row.label),
    ("steps", lambda row: str(row.num_steps)),
    ("guidance", lambda row: "–" if row.guidance_scale is None else f"{row.guidance_scale:g}"),
    ("Fréchet distance to real", lambda row: told(row, "frechet_distance_real")),
    ("to teacher", lambda row: told(row, "frechet_distance_teacher")),
    ("drawn right", lambda row: told(row, "prompt_accuracy")),
    ("KID × 1,000", lambda row: told(row, "kernel_distance")),
    ("precision", lambda row: told(row, "precision")),
    ("recall", lambda row: told(row, "recall")),
    ("CLIP score", lambda row: told(row, "clip_score")),
    ("gap to teacher, pixels", lambda row: told(row, "pixel_gap")),
    ("gap to teacher, perceptual", lambda row: told(row, "perceptual_gap")),
    ("diversity", lambda row: told(row, "diversity")),
    ("S(Z), relative", lambda row: told(row, "straightness_relative")),
    ("time an image", lambda row: told(row, "seconds_per_image")),
)


def markdown(report: Report) -> str:
    """A table of the rows by rank, what they say, and the protocol card."""
    report = with_short_names(report)
    ranked = ranking(report.rows)
    rows = [one.row for one in ranked.rows]
    columns = [("rank", [str(one.rank or "–") for one in ranked.rows])]
    columns += [(title, [said(row) for row in rows]) for title, said in COLUMNS]
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
    lines += protocol(rows)
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ") + "\n"


def protocol(rows: Sequence[Row]) -> list[str]:
    """What all rows have in common, then what each one was; nothing where the first has no card."""
    if not rows or not rows[0].card:
        return []
    card = rows[0].card
    lines = ["", "Protocol:", ""]
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
