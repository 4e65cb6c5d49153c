"""Several seeds of one experiment in one report: read what each run measured, compare, write and tell."""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import wrap
from typing import Any

from instaflow.config import find_config
from instaflow.errors import ConfigError, DataError, InstaFlowError
from instaflow.evaluation.aims import Outcome, outcome_json, outcomes
from instaflow.evaluation.card import PROTOCOL, SINCE
from instaflow.evaluation.comparison import Comparison, compare, comparison_json, seedless
from instaflow.evaluation.comparison_page import write_comparison_page
from instaflow.evaluation.comparison_words import TITLES, caution, headline, notes, said, title
from instaflow.evaluation.report import Report
from instaflow.evaluation.saved import read_report
from instaflow.evaluation.short_names import with_short_names
from instaflow.files import write_json
from instaflow.rundir import flat, read_json
from instaflow.rundir import said as shown

SEEDS_OWN = ("seed", "noise", "features", "perceptual")
"""What seeds may differ in, of a protocol card: some networks that measure are trained anew with each."""
SAID = 4  # so many differences between runs are told
COLUMNS = {
    "frechet_distance_real": "Fréchet to real",
    "frechet_distance_teacher": "to teacher",
    "prompt_accuracy": "prompts drawn right",
    "seconds_per_image": "ms an image",
}
"""The figures that a terminal has room for."""


def run(runs: Sequence[Path], *, by: str, output: Path | None) -> list[str]:
    """Write compare.json and compare.html; returns the lines that tell the ranking.

    runs: a run's folder each, or that of its evaluate stage. output: by default the first run's parent and "-report".
    Raises InstaFlowError if they are not one experiment with several seeds, or a report is missing or damaged.
    """
    if len(runs) < 2:
        raise InstaFlowError(
            f"Only one run was given: '{runs[0]}'", "A spread wants at least two seeds; three or more are better"
        )
    folders = {str(place): report_folder(place, runs) for place in runs}
    reports = {place: read_report(folder / "report.json") for place, folder in folders.items()}
    check_seeds(list(zip(map(str, runs), (reports[str(place)].seed for place in runs), strict=True)))
    check_same(folders, reports)
    comparison = compare(reports, by)
    if not any(row.figures[comparison.figure].count for row in comparison.rows):
        raise InstaFlowError(
            f"No run has a '{comparison.figure}', which --by {by} ranks by",
            "Rank by another: --by real|teacher|accuracy",
        )
    folder = output or beside(folders[str(runs[0])].parent)
    folder.mkdir(parents=True, exist_ok=True)
    aims = outcomes({report.seed: report for report in sorted(reports.values(), key=lambda report: report.seed)})
    write_json(folder / "compare.json", {**comparison_json(comparison), "aims": [outcome_json(one) for one in aims]})
    short = {place: with_short_names(report) for place, report in reports.items()}
    shown = outcomes({report.seed: report for report in sorted(short.values(), key=lambda report: report.seed)})
    write_comparison_page(folder / "compare.html", compare(short, by), shown)
    return [*told(comparison, aims), "", f"The page: {folder / 'compare.html'}"]


def beside(run: Path) -> Path:
    """Where the comparison goes by default: runs/digits-report for runs/digits/0, so that runs/digits/* stays runs."""
    place = Path(f"{run.parent.resolve()}-report")
    return place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place


# --- what the runs are ------------------------------------------------------------------------------------------------


def report_folder(place: Path, runs: Sequence[Path]) -> Path:
    """The evaluate stage's folder of a run, or that folder itself. Raises DataError, with the command to run."""
    if not place.is_dir():
        raise DataError(f"'{place}' is no folder of a run", "Give runs: instaflow compare runs/digits/0 runs/digits/1")
    own = (place / "report.json").is_file()
    found = [place] if own else sorted(file.parent for file in place.glob("*/report.json"))
    if not found:
        raise DataError(f"'{place}' has no report", f"Run first: {command(place, runs)}")
    if len(found) > 1:
        raise ConfigError(
            f"'{place}' has several reports: {', '.join(folder.name for folder in found)}",
            f"Name that of each run to compare, say {found[0]}",
        )
    if not (found[0] / "done.json").is_file():
        run = found[0].parent
        raise DataError(f"The report in '{found[0]}' is not done", f"Run first: {command(run, runs)}")
    return found[0]


def command(run: Path, runs: Sequence[Path]) -> str:
    """What to type to bring a run to its report, as far as it tells, or else the other runs."""
    config, seed = "CONFIG", None
    for place in (*runs, run):  # what its own report says is the last word
        for file in (place / "report.json", *place.glob("*/report.json")):
            with suppress(InstaFlowError, OSError):
                config = read_report(file).config
    with suppress(ConfigError):
        find_config(Path(config).stem)
        config = Path(config).stem  # a packaged one
    for file in run.glob("*/stage.json"):
        with suppress(InstaFlowError, KeyError, TypeError):
            seed = read_json(file)["identity"]["seed"]
    changes = ["--set", f"seed={seed}"] if seed is not None else []
    return shlex.join(["instaflow", "run", config, "--run-dir", str(run), *changes])


def check_seeds(seeds: Sequence[tuple[str, int]]) -> None:
    """Refuse two runs of one seed: they would count as two draws, and are one."""
    first: dict[int, str] = {}
    for place, seed in seeds:
        if seed in first:
            both = f"'{first[seed]}' and '{place}'" if place != first[seed] else f"'{place}', given twice,"
            raise ConfigError(
                f"{both} have the same seed {seed}",
                "Each run must have a seed of its own: instaflow run ... --set seed=1 --run-dir runs/digits/1",
            )
        first[seed] = place


def check_same(folders: Mapping[str, Path], reports: Mapping[str, Report]) -> None:
    """Refuse runs that differ in more than their seed. Raises ConfigError, which names the keys and the runs."""
    settings = {place: about(report) for place, report in reports.items()}
    names = {stage.name for report in reports.values() for stage in report.stages}
    for name in sorted(names):
        files = {place: folder.parent / name / "stage.json" for place, folder in folders.items()}
        if all(file.is_file() for file in files.values()):
            for place, file in files.items():
                settings[place] |= of_stage(name, file, names)
        else:  # a report that was copied without its run
            for place, report in reports.items():
                settings[place] |= of_report(name, report)
    keys = dict.fromkeys(name for own in settings.values() for name in own)
    since = {f"card.{name}" for name in SINCE}  # untold by earlier versions, empty here
    found = {
        name: {shown(own, name) for own in settings.values() if own.get(name) or name not in since} for name in keys
    }
    different = [name for name in keys if len(found[name]) > 1]
    if different:
        lines = [f"'{name}' is {values(name, settings)}" for name in different[:SAID]]
        lines += [f"and {len(different) - SAID} more"] if len(different) > SAID else []
        raise ConfigError(
            "The runs are not of the same experiment: " + "; ".join(lines),
            "Compare runs that differ in their seed alone",
        )


def about(report: Report) -> dict[str, Any]:
    """What a report tells of its experiment, less what the seed changes."""
    rows = {
        f"rows.{row.label}.{row.num_steps}": f"guidance {row.guidance_scale}, {row.num_samples} samples"
        for row in report.rows
    }
    cards = {name: {str(row.card.get(name, "")) for row in report.rows} for name in PROTOCOL if name not in SEEDS_OWN}
    aims = {f"aims.{i}": ", ".join(f"{k} {v}" for k, v in aim if v) for i, aim in enumerate(report.aims)}
    return {
        "stages": [stage.name for stage in report.stages],
        **{f"protocol.{name}": text for name, text in vars(seedless(report)).items()},
        **{f"card.{name}": ", ".join(sorted(found)) for name, found in cards.items()},
        **rows,
        **aims,
    }


def of_stage(name: str, file: Path, stages: set[str]) -> dict[str, Any]:
    """A stage's identity, less its seed and the content of what other stages made of it."""
    record = read_json(file)
    try:
        identity, settings = dict(record["identity"]), flat(record["settings"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"'{file}' is damaged: it holds no stage", f"Delete '{file.parent}' to make it anew") from error
    made = {f"{setting} (content)" for setting, value in settings.items() if isinstance(value, str) and value in stages}
    kept = {setting: value for setting, value in identity.items() if setting not in {"seed", *made}}
    return {f"stages.{name}.{setting}": value for setting, value in flat(kept).items()}


def of_report(name: str, report: Report) -> dict[str, Any]:
    """What a report tells of one stage."""
    stages = [stage for stage in report.stages if stage.name == name]
    keys = ("kind", "description", "parents", "samples")
    return {f"stages.{name}.{key}": getattr(stage, key) for stage in stages for key in keys}


def values(name: str, settings: Mapping[str, Mapping[str, Any]]) -> str:
    """A key's values, each with the runs that have it."""
    holders: dict[str, list[str]] = {}
    for place, own in settings.items():
        holders.setdefault(shown(dict(own), name), []).append(f"'{place}'")
    return ", but ".join(f"{value} in {', '.join(places)}" for value, places in holders.items())


# --- the terminal -----------------------------------------------------------------------------------------------------


def told(comparison: Comparison, aims: Sequence[Outcome] = ()) -> list[str]:
    """The ranking and what it means, for a terminal."""
    by = comparison.figure
    found = [name for name in COLUMNS if any(row.figures[name].count for row in comparison.rows)]
    columns = sorted(found, key=lambda name: name != by)
    near = [comparison.best(by), *comparison.not_told_apart(by)]  # [None] where nothing is to be compared
    table = [("", "model", "steps", *(COLUMNS[name] for name in columns))]
    for row in comparison.rows:
        rank = f"{row.rank or '–'}{'*' if row in near else ' '}"
        table.append((rank, row.label, str(row.num_steps), *(said(name, row.figures[name]) for name in columns)))
    lines = aligned(table)
    single = 1 + len(comparison.one_step)
    lines[single:single] = ["", "More steps, for scale:"] if 1 < single < len(table) else []
    star = (
        f"* the best of the one-step rows by {TITLES[by]}, or not told apart from it: the 95% interval of their paired"
    )
    star += " difference holds 0, without correction for the many pairs."
    texts = [star, " ".join(headline(comparison)), " ".join([*caution(comparison), *notes(comparison)])]
    words = [line for text in texts[0 if near[0] else 1 :] if text for line in wrap(text, 110)]
    words += [line for one in aims for line in wrap(f"{one.verdict}: {one.asked}: {one.found}", 110)]
    text = [f"{title(comparison)} ({', '.join(map(str, comparison.runs))})", "", *lines, "", *words]
    return [line.replace("\N{NO-BREAK SPACE}", " ").replace("`", "'") for line in text]


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of a table; the model's name stands left, all else right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [
            text.ljust(w) if place == 1 else text.rjust(w)
            for place, (text, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in cells]
