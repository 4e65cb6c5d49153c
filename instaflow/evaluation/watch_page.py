"""The page of a watched training: its checkpoints' scores so far, as curves and as a table."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from instaflow.evaluation.markdown import columns_of
from instaflow.evaluation.page import document, model_colours, protocol, scores, without_broken
from instaflow.evaluation.parts import below, paragraph, section, sign
from instaflow.evaluation.plots import Colours
from instaflow.evaluation.report import Report, Row
from instaflow.evaluation.row_words import parted, spread
from instaflow.evaluation.short_names import with_short_names
from instaflow.evaluation.style import STYLE
from instaflow.files import write_file


def write_watch_page(path: Path, report: Report, said: Sequence[str], at: str) -> None:
    """Write `report`, whose rows are the reference and the finished models alone, with its curves.

    said: where each training stands. at: the time of day.
    """
    write_file(path, watch_page(report, said, at))


def watch_page(report: Report, said: Sequence[str], at: str) -> str:
    report = with_short_names(without_broken(report))
    colours = model_colours(report)
    about = " · ".join([f"Config {report.config}", f"seed {report.seed}", report.hardware, at])
    header = (
        '<header>\n<div class="soft">InstaFlow: a training, watched</div>\n'
        f'<h1>{escape(report.title)}</h1>\n<div class="soft after">{escape(about)}</div>\n</header>'
    )
    sections = [
        header,
        section("So far", *(paragraph([text]) for text in said)),
        section("Score over training", scores(report, colours)),
        section("Every score", _table(report, colours), paragraph(_explained(report), "small soft after")),
        protocol(report),
    ]
    return document(report.title, STYLE, sections)


def _table(report: Report, colours: Colours) -> str:
    """All checkpoints' rows, behind the row to compare with; a column that says nothing is left out."""
    watched = {curve.label for curve in report.scores}
    lines = [("", row) for row in report.rows if row.label not in watched]
    lines += [
        (f"{seen:,}", row) for curve in report.scores for seen, row in zip(curve.samples_seen, curve.rows, strict=True)
    ]
    columns = [("training samples", [seen for seen, _ in lines]), *columns_of([row for _, row in lines])]
    columns = [(title, texts) for title, texts in columns if set(texts) > {"–"} or "–" not in texts]
    head = '<th scope="col">model</th>' + "".join(
        f'<th scope="col" class="wrap">{escape(title)}</th>' for title, _ in columns
    )
    body, before = [], None
    for place, (_, row) in enumerate(lines):
        name = _name(row, colours) if row.label != before else ""
        cells = "".join(_cell(texts[place]) for _, texts in columns)
        body.append(f'<tr class="{"new" if name else ""}"><td>{name}</td>{cells}</tr>')
        before = row.label
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="panel scroll">{table}</div>' if lines else ""


def _cell(text: str) -> str:
    value, half = parted(text)
    return f"<td>{escape(value)}{below(half)}</td>"


def _explained(report: Report) -> list[str]:
    found = spread([*report.rows, *(row for curve in report.scores for row in curve.rows)])
    return [found] if found else []


def _name(row: Row, colours: Colours) -> str:
    return f"{sign(colours[row.label])}{escape(row.label)}"
