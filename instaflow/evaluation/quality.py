"""The page's section on quality: the rows ranked, and what quality costs, in steps, in time and in training."""

from instaflow.evaluation import findings
from instaflow.evaluation.costs import device_hours, devices, training_samples
from instaflow.evaluation.parts import beside, charts, figure, heading, legend, paragraph, section
from instaflow.evaluation.plots import Colours, cost_plot, quality_plots, sweep_plots, time_plot
from instaflow.evaluation.ranking import ranking
from instaflow.evaluation.report import Floors, Report
from instaflow.evaluation.table import caption, rows_table


def quality(report: Report, colours: Colours) -> str:
    if not report.rows:
        return ""
    card, ranked = report.protocol, ranking(report.rows)
    against = [text for text in (card.samples, card.features, card.weights and f"weights: {card.weights}") if text]
    table = figure(f'<div class="scroll">{rows_table(report, ranked, colours)}</div>', caption(ranked))
    drawn = [_steps(report, colours), _time(report, colours), _training(report, colours)]
    names = legend([row.label for row in report.rows], colours)
    return section(
        "Quality",
        paragraph([f"Protocol: {'; '.join(against)}."] if against else [], "small soft"),
        heading(ranked.explained, table) if ranked.figure else table,
        paragraph(findings.accuracy(report)),
        paragraph(findings.diversity(report)),
        paragraph(findings.averaging(report)),
        names if any(drawn) else "",
        *drawn,
        _guidance(report, colours),
    )


def _steps(report: Report, colours: Colours) -> str:
    plots = quality_plots(report.rows, report.floors, colours, report.protocol.judged)
    caption = (
        "Axes are logarithmic; lower is better; models with a single number of steps are set apart sideways. A Fréchet "
        "distance shrinks as the samples grow: compare within this page only."
    )
    if report.floors != Floors():
        caption += (
            " Dashed, for scale: what real images show when they are halved, or encoded and decoded, and how often the "
            "reader errs on them."
        )
    if any(row.prompt_accuracy == 1 for row in report.rows):
        caption += " No error among all samples is drawn as half an error."
    return heading("Against steps", charts(plots, caption))


def _time(report: Report, colours: Colours) -> str:
    plot, card = time_plot(report.rows, report.floors, colours), report.protocol
    caption = ["What an image takes, from text to pixels, in the batches of this evaluation; to the left is faster."]
    measured = [f"Measured: {card.timing}."] if card.timing else []
    return heading("Against time", beside(plot, paragraph(caption + measured, "small soft")) if plot else "")


def _training(report: Report, colours: Colours) -> str:
    costs = {unit: cost_plot(report.rows, spent, unit, colours) for unit, spent in _costs(report).items()}
    caption = (
        "What a model cost after the teacher, or a model from elsewhere that it began with; each at its fewest steps."
    )
    if any(plot for unit, plot in costs.items() if unit.startswith("device")):
        caption += (
            " Device-hours, or minutes: of all stages on the way to a model, those that make its couplings too; a "
            f"device is a GPU or, without one, the processor: here {' and '.join(devices(report))}."
        )
    return heading("Against training", charts([plot for plot in costs.values() if plot], caption))


def _guidance(report: Report, colours: Colours) -> str:
    plots = sweep_plots(report.rows, colours, report.protocol.judged)
    caption = (
        "A line for each model and number of steps, a mark for each guidance scale, the ends dashed and named. To the "
        "right images are nearer to their prompts, lower is nearer to the real images."
    )
    return heading("What guidance trades", charts([heading(name, plot) for name, plot in plots], caption))


def _costs(report: Report) -> dict[str, dict[str, float | None]]:
    """What each model cost after the teacher, by unit: training samples, then time."""
    rows = {row.model: row for row in report.rows}
    hours = {model: device_hours(report, row) for model, row in rows.items()}
    short = max((spent for spent in hours.values() if spent), default=0.0) < 1
    time = {model: spent and spent * (60 if short else 1) for model, spent in hours.items()}
    samples: dict[str, float | None] = {model: training_samples(report, row) for model, row in rows.items()}
    return {"training samples": samples, f"device-{'minutes' if short else 'hours'}": time}
