"""The map of where reflow pays: who is ahead in a setting, and a page with a row for each."""

import html
from typing import Any

METHODS = ("direct", "reflow", "2rf")
MEASURES = ("energy distance", "off modes", "distance to teacher", "spread")


def verdict(row: dict[str, Any], other: str = "reflow", measure: str = MEASURES[0]) -> str:
    """Which is better by a measure of distance, where the interval excludes 0; else "even"."""
    mean, half = row["direct less"][other][measure]
    if not abs(mean) > half:
        return "even"
    return other if mean > 0 else "direct"


def useful(row: dict[str, Any]) -> bool:
    """Reflow's student is nearer to the data than a Gaussian is, by two standard errors."""
    mean, error = row["measures"]["reflow"][MEASURES[0]]
    return mean + 2 * error < row["gaussian"]


def line(row: dict[str, Any]) -> str:
    """Energy distances at one step, and who is ahead."""
    values = ", ".join(f"{method} {plus_minus(row['measures'][method][MEASURES[0]])}" for method in METHODS)
    return f"{values}, a Gaussian {row['gaussian']:.3f}: {verdict(row)}"


def plus_minus(value: tuple[float, float]) -> str:
    return "{:.3f} ± {:.3f}".format(*value)


STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
@media (max-width: 40rem) { th:first-child, td:first-child { white-space: normal; } }
.reflow { background: #3b82f655; }
.direct { background: #f59e0b55; }
"""


def as_page(result: dict[str, Any]) -> str:
    """The map: a table for each part, a row for each setting, colours where an interval excludes 0."""
    rows = {row["name"]: row for part in result["parts"].values() for row in part}.values()
    counts = {name: sum(verdict(row) == name for row in rows) for name in ("reflow", "direct", "even")}
    near = sum(verdict(row) == "reflow" and useful(row) for row in rows)
    tables = [f"<h2>{html.escape(name)}</h2>{table(part)}" for name, part in result["parts"].items()]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Where reflow pays</title><style>{STYLE}</style>
<h1>Where reflow pays</h1>
<p>One step, from one teacher, with equal couplings and training samples: <b>direct</b> distillation, <b>reflow</b> and
distillation, and one step of the 2-rectified flow (<b>2rf</b>). Energy distance to the data (of guided settings, to the
teacher's samples): mean over {result["effort"]["seeds"]} seeds ± standard error. By it,
<span class="reflow">reflow is ahead in {counts["reflow"]}</span> of {len(rows)} settings (in {near} of
them it is also nearer than a Gaussian with the data's mean and covariance, which a linear map would reach),
<span class="direct">direct in {counts["direct"]}</span>, and {counts["even"]} are even: the 95% t-interval of the
paired difference includes 0. Of the differences, ± is half of that interval. The last columns are direct / reflow: the
distance to the teacher's sample from the same noise, the share off the modes, the spread (variance relative to the
teacher's). {html.escape(result["hardware"])}:
<code>python -m benchmarks.where_reflow_pays</code></p>
{"".join(tables)}
</html>
"""


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["measures"])
    heads = [
        "setting",
        "direct − reflow",
        "direct − 2rf",
        *names,
        "a Gaussian",
        *MEASURES[2:3],
        *MEASURES[1:2],
        *MEASURES[3:],
    ]
    lines = ["<tr>" + "".join(f"<th>{html.escape(head)}</th>" for head in heads) + "</tr>"]
    for row in rows:
        cells = [(html.escape(row["name"]), "")]
        for other in ("reflow", "2rf"):
            ahead = verdict(row, other)
            colour = {"direct": "direct", "even": ""}.get(ahead, "reflow")
            cells.append(("{:+.3f} ± {:.3f}".format(*row["direct less"][other][MEASURES[0]]), colour))
        cells += [(plus_minus(row["measures"][name][MEASURES[0]]), "") for name in names]
        cells.append((f"{row['gaussian']:.3f}", ""))
        for measure in (MEASURES[2], MEASURES[1], MEASURES[3]):
            both = [row["measures"][method][measure][0] for method in ("direct", "reflow")]
            colour = "" if measure == "spread" else verdict(row, measure=measure).replace("even", "")
            cells.append(("{:.3f} / {:.3f}".format(*both), colour))
        lines.append("<tr>" + "".join(f'<td class="{colour}">{text}</td>' for text, colour in cells) + "</tr>")
    return f"<div><table>{''.join(lines)}</table></div>"
