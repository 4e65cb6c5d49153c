"""The comparison of several seeds as one self-contained HTML page: the ranking, each seed's value, what holds."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from instaflow.evaluation.aims import Outcome, summary
from instaflow.evaluation.comparison import BETTER, ComparedRow, Comparison, Pair, Spread
from instaflow.evaluation.comparison_plot import dot_plot
from instaflow.evaluation.comparison_words import (
    TITLES,
    UNITS,
    caution,
    headline,
    notes,
    said,
    title,
    verdict,
)
from instaflow.evaluation.page import aimed, document, protocol_entries
from instaflow.evaluation.parts import figure, legend, pairs_list, paragraph, section, sign
from instaflow.evaluation.plots import Colours
from instaflow.evaluation.style import LIGHT, STYLE
from instaflow.evaluation.wording import number, plus_minus
from instaflow.files import write_file

OWN_STYLE = """
main { max-width: 1280px; }
.group td { color: var(--soft); border-top: 1px solid var(--line); font-size: 0.82rem; padding-top: 10px; }
.rank { color: var(--soft); display: inline-block; min-width: 1.7em; }
svg text.name { fill: var(--ink); }
.seed { fill: var(--c); fill-opacity: 0.55; stroke: var(--panel); stroke-width: 0.6; }
.band { stroke: var(--c); stroke-width: 1.6; stroke-linecap: round; }
.matrix table { width: auto; font-size: 0.78rem; line-height: 1.25; }
.matrix th, .matrix td { padding: 3px 6px; text-align: center; }
.matrix th:first-child, .matrix td:first-child { text-align: left; font-size: 0.86rem; }
.matrix .apart, .matrix .same { display: block; border-radius: 5px; padding: 1px 4px; }
.matrix .apart { font-weight: 600; } .matrix .same { color: var(--soft); background: var(--grid); }
.ranking table { font-size: 0.82rem; } .ranking th, .ranking td { padding: 5px; }
.ranking th { font-size: 0.78rem; } .ranking th.wrap { min-width: 62px; }
details ul { margin: 8px 0; padding-left: 20px; } details p { margin: 0; }
.matrix small { display: block; font-size: 0.9em; font-weight: 400; color: var(--soft); }
@media (max-width: 720px) {
  .ranking table { font-size: 0.78rem; }
}
"""


def write_comparison_page(path: Path, comparison: Comparison, aims: Sequence[Outcome] = ()) -> None:
    """Write `comparison` to `path`: one file that needs no network and no script. aims: what became of them."""
    write_file(path, comparison_page(comparison, aims))


def comparison_page(comparison: Comparison, aims: Sequence[Outcome] = ()) -> str:
    colours = kind_colours(comparison)
    sections = [
        _header(comparison, aims),
        _ranking(comparison, colours),
        aimed(aims),
        _seeds(comparison, colours),
        _pairs(comparison),
        _compared(comparison),
        _protocol(comparison),
    ]
    return document(title(comparison), STYLE + OWN_STYLE, sections)


def kind_colours(comparison: Comparison) -> Colours:
    """A colour per kind, here of models: too many stand on this page for one each."""
    usual = {"teacher": 0, "flow": 1, "student": 2, "direct": 3}
    others = [kind for kind in dict.fromkeys(row.kind for row in comparison.rows) if kind not in usual]
    free = len(LIGHT) - len(usual)
    return usual | {kind: len(usual) + place % free for place, kind in enumerate(others)}


def _header(comparison: Comparison, aims: Sequence[Outcome]) -> str:
    seeds = ", ".join(str(seed) for seed in comparison.runs)
    about = [f"Config {comparison.config}", f"seeds {seeds}", *dict.fromkeys(comparison.hardware.values())]
    return (
        '<header>\n<div class="soft">InstaFlow: the same experiment with several seeds</div>\n'
        f"<h1>{escape(title(comparison))}</h1>\n"
        f'<div class="soft">{escape(" · ".join(text for text in about if text))}</div>\n'
        f"{paragraph([*headline(comparison), *summary(aims)], 'lead')}\n"
        + paragraph([*caution(comparison), *notes(comparison)], "small soft")
        + "</header>"
    )


def _ranking(comparison: Comparison, colours: Colours) -> str:
    marks = "Marked, in bold, the best of the one-step rows, and those not told apart from it in the same column. "
    caption = (
        (marks if len(comparison.one_step) > 1 else "")
        + "Deviation: the standard deviation over the seeds, with n − 1. Training samples: seen after the teacher, on "
        "the whole way to the model. The rows of more steps are there for scale. A Fréchet distance shrinks as the "
        "samples grow: compare within this page only."
    )
    if 0 < sum(not row.figures["straightness_relative"].count for row in comparison.rows) < len(comparison.rows):
        caption += (
            " Straightness is measured of models that are sampled in several steps as well; of the others a dash."
        )
    kinds = [row.kind for row in comparison.rows]
    table = f'<div class="scroll ranking">{ranking_table(comparison, colours)}</div>'
    return section(f"Ranked by {_by(comparison)}", legend(kinds, colours), figure(table, caption))


def _by(comparison: Comparison) -> str:
    title = TITLES[comparison.figure]
    return title[0].lower() + title[1:] if comparison.by == "accuracy" else title


def ranking_table(comparison: Comparison, colours: Colours) -> str:
    """All rows, the one-step ones first. A column without a figure is left out."""
    by, single = comparison.figure, len(comparison.one_step)
    found = [name for name in TITLES if any(row.figures[name].count for row in comparison.rows)]
    shown = sorted(found, key=lambda name: name != by)
    heads = [title for name in shown for title in (TITLES[name], *(["its deviation"] if name == by else []))]
    columns = "".join(f'<th scope="col" class="wrap">{escape(title)}</th>' for title in (*heads, "Training samples"))
    lines = [_ranking_line(comparison, row, shown, colours) for row in comparison.rows]
    if 0 < single < len(lines):
        lines.insert(single, f'<tr class="group"><td colspan="{len(heads) + 3}">More steps, for scale</td></tr>')
    head = f'<tr><th scope="col">Model</th><th scope="col">Steps</th>{columns}</tr>'
    return f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"


def _ranking_line(comparison: Comparison, row: ComparedRow, shown: Sequence[str], colours: Colours) -> str:
    """One row of the table: each figure's mean, of the one that ranks also the deviation; marked if none is better."""
    cells = []
    for name in shown:
        spread, text = row.figures[name], said(name, row.figures[name])
        if name in BETTER and len(comparison.one_step) > 1:
            style = "best" if row is comparison.best(name) else "near" if row in comparison.not_told_apart(name) else ""
            text = f'<span class="{style}">{text}</span>' if style else text
        few = f" ({spread.count} of {len(comparison.runs)} seeds)" if 0 < spread.count < len(comparison.runs) else ""
        cells.append(f'<td title="{_each_seed(name, spread)}">{text}{few}</td>')
        if name == comparison.figure:
            scale, _ = UNITS.get(name, (1, ""))
            deviation = math.nan if spread.standard_deviation is None else spread.standard_deviation
            cells.append(f"<td>{number(scale * deviation)}</td>")
    rank = f'<span class="rank">{row.rank or "–"}</span>'
    model = f'<td title="{escape(row.description)}">{rank}{sign(colours[row.kind])}{escape(row.label)}</td>'
    seen = f"{row.training_samples:,}" if row.training_samples else "–"
    return f"<tr>{model}<td>{row.num_steps}</td>{''.join(cells)}<td>{seen}</td></tr>"


def _each_seed(figure: str, spread: Spread) -> str:
    """Each seed's value, for who points at the mean."""
    scale, unit = UNITS.get(figure, (1, ""))
    values = [(seed, value) for seed, value in spread.by_seed.items() if value is not None]
    return ", ".join(f"seed {seed}: {number(scale * value)}{unit}" for seed, value in values)


def _seeds(comparison: Comparison, colours: Colours) -> str:
    second = "prompt_accuracy" if comparison.by != "accuracy" else "frechet_distance_real"
    plots = [dot_plot(comparison, name, colours) for name in (comparison.figure, second)]
    panels = "".join(f'<figure class="panel">{plot}</figure>' for plot in plots if plot)
    caption = (
        "The one-step rows by rank. Faint, each seed’s value; bold, their mean, and a line over its 95 % interval, "
        "with a head where that goes on beyond the axis. A head and a figure: the mean itself is off the axis. Dashed, "
        "for scale: the best row of more steps."
    )
    return section(
        "Seed by seed", f'<div class="two">{panels}</div><p class="small soft">{caption}</p>' if panels else ""
    )


def _pairs(comparison: Comparison) -> str:
    rows = [row for row in comparison.one_step if row.figures[comparison.figure].count]
    if len(rows) < 2:
        return ""
    unit = ", in percentage points" if comparison.by == "accuracy" else ""
    explained = [
        f"How far each row is behind those of better rank by {_by(comparison)}{unit}. The rows of one seed share "
        "its teacher and its noise, so the difference is taken seed by seed, and its mean has an interval of its own: "
        "it may be told apart from 0 where the intervals of the two means overlap.",
    ]
    caption = (
        "Told apart (bold): the 95 % interval of the mean difference leaves out 0, without correction for the many "
        f"pairs: of {len(rows) * (len(rows) - 1) // 2} equal pairs, one in twenty would look different by chance."
    )
    best = rows[0]
    found = [verdict(pair) for row in rows[1:] if (pair := comparison.pair(comparison.figure, best, row))]
    items = "".join(f"<li>{paragraph([text])}</li>" for text in found)
    listed = f"<details><summary>In words, for {escape(best.label)}</summary><ul>{items}</ul></details>"
    return section(
        "Which differences hold",
        paragraph(explained),
        figure(f'<div class="scroll matrix">{matrix(comparison, rows)}</div>', caption),
        listed,
    )


def matrix(comparison: Comparison, rows: Sequence[ComparedRow]) -> str:
    """How far each row (a line) is behind each better one (a column), by rank."""
    head = '<th scope="col">behind</th>' + "".join(
        f'<th scope="col" title="{escape(row.label)}">{row.rank}</th>' for row in rows[:-1]
    )
    lines = []
    for place, row in enumerate(rows):
        cells = []
        for other in rows[:place]:
            pair = comparison.pair(comparison.figure, row, other)
            cells.append(_cell(pair) if pair else "<td>–</td>")
        cells += ["<td></td>"] * (len(rows) - 1 - place)
        name = f'<td><span class="rank">{row.rank}</span>{escape(row.label)}</td>'
        lines.append(f"<tr>{name}{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _cell(pair: Pair) -> str:
    scale, _ = UNITS.get(pair.figure, (1, ""))
    text = plus_minus(pair.difference.mean, pair.difference.interval, scale=scale)
    mean, _, half = text.partition("±")
    below = f"<small>± {half.strip()}</small>" if half else ""
    style = "apart" if pair.difference.is_told_apart else "same"
    told = verdict(pair).replace("`", "")
    return f'<td title="{escape(told)}"><span class="{style}">{mean.strip()}{below}</span></td>'


def _compared(comparison: Comparison) -> str:
    """What each model is."""
    models = {row.label: row for row in comparison.rows[::-1]}
    entries = []
    for label, row in list(models.items())[::-1]:
        seen = f"{row.training_samples:,} training samples after the teacher" if row.training_samples else ""
        entries.append((label, "; ".join(text for text in (row.kind, row.description, seen) if text)))
    return section("What is compared", f'<div class="panel">{pairs_list(entries)}</div>')


def _protocol(comparison: Comparison) -> str:
    card, floors = comparison.protocol, comparison.floors
    shares = {"reader_accuracy"}
    texts = {
        name: said("prompt_accuracy" if name in shares else name, found) if found.count else ""
        for name, found in floors.items()
    }
    runs = ", ".join(f"{run} (seed {seed})" for seed, run in comparison.runs.items())
    hardware = "; ".join(dict.fromkeys(comparison.hardware.values()))
    first = next(iter(comparison.versions.values()))
    entries = [
        *protocol_entries(card, texts),
        ("The reader on real images", texts["reader_accuracy"]),
        ("Hardware", hardware),
        ("Versions", ", ".join(f"{name} {version}" for name, version in first.items())),
        ("Runs", runs),
    ]
    shown = [(label, text) for label, text in entries if text]
    return section("How it was measured", f'<div class="panel">{pairs_list(shown)}</div>')
