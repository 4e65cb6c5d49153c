"""What the figures say, in sentences that follow them: every claim is chosen by a comparison made here."""

import math
from collections.abc import Sequence

from instaflow.evaluation.report import Report, Row, Stage, distance_summary
from instaflow.evaluation.wording import duration, is_number, named, number, percent, steps, times

TIE = 0.05  # two Fréchet distances within 5 % of one another are called the same


def distance(row: Row) -> float:
    """The Fréchet distance that the sentences speak of: to the real images, else to the teacher's; nan without."""
    for value in (row.frechet_distance_real, row.frechet_distance_teacher):
        if value is not None and math.isfinite(value):
            return value
    return math.nan


def rows_of(report: Report, kind: str) -> list[Row]:
    """The rows of one kind, fewest steps first, the nearer to its target first among equals; EMA where there is any."""
    rows = [row for row in report.rows if row.kind == kind]
    rows = [row for row in rows if row.weights == "ema"] or rows
    return sorted(rows, key=lambda row: (row.num_steps, distance(row) if is_number(distance(row)) else math.inf))


def reference(report: Report) -> Row | None:
    """The teacher's row that the others are measured against: no distance to itself, most steps."""
    teachers = rows_of(report, "teacher")
    return max(teachers, key=lambda row: (row.frechet_distance_teacher is None, row.num_steps), default=None)


def result(report: Report) -> Row | None:
    """The row that the experiment is about: the student at its fewest steps, else another that was distilled."""
    others = [row for row in report.rows if row.kind not in ("teacher", "flow", "student")]
    for kind in ("student", *dict.fromkeys(row.kind for row in others), "flow"):
        if rows := rows_of(report, kind):
            return rows[0]
    return None


def one_step(report: Report, kind: str) -> Row | None:
    rows = rows_of(report, kind)
    return rows[0] if rows and rows[0].num_steps == 1 else None


def comparison(a: float, b: float) -> int:
    """-1 if `a` is the smaller, 1 if the larger, 0 if they are the same within TIE."""
    return 0 if abs(a - b) <= TIE * max(abs(a), abs(b)) else (-1 if a < b else 1)


def headline(report: Report) -> list[str]:
    """What was reached: quality, accuracy, speed. One sentence each."""
    best, teacher = result(report), reference(report)
    if best is None:
        return [] if teacher is None else [f"This report shows {named(teacher.model)} alone."]
    found = []
    if is_number(distance(best)):
        target = "the real images" if is_number(best.frechet_distance_real) else "the teacher’s images"
        passes = "one step" if best.num_steps == 1 else steps(best.num_steps)
        text = f"{named(best.model)} draws an image in {passes}, at a Fréchet distance of {number(distance(best))} from {target}"
        if teacher and is_number(distance(teacher)):
            text += f"; {named(teacher.model)} reaches {number(distance(teacher))} in {steps(teacher.num_steps)}"
            as_few = [row for row in rows_of(report, "teacher") if row.num_steps == best.num_steps < teacher.num_steps]
            text += "".join(f" and {number(distance(row))} in {passes}" for row in as_few if is_number(distance(row)))
        found.append(f"{text}.")
    if best.prompt_accuracy is not None:
        compared = teacher and teacher.prompt_accuracy is not None
        beside = f" ({named(teacher.model)}: {percent(teacher.prompt_accuracy)})" if teacher and compared else ""
        found.append(f"{percent(best.prompt_accuracy)} of its images show what the prompt asks for{beside}.")
    if best.seconds_per_image and teacher and teacher.seconds_per_image:
        ratio = teacher.seconds_per_image / best.seconds_per_image
        than = f"{named(teacher.model)} at {steps(teacher.num_steps)}"
        each = f"An image takes {duration(best.seconds_per_image)}"
        found.append(f"{each}: {than} is {times(ratio)} slower." if ratio > 1.05 else f"{each}; {than} is no slower.")
    return found


def scale(report: Report) -> list[str]:
    """What a Fréchet distance is, and how large it is where nothing is wrong."""
    if not any(is_number(distance(row)) for row in report.rows):
        return []
    found = [
        "Fréchet distance: how far two sets of images are apart, by the mean and the covariance of their features; "
        "lower is better, 0 is equality."
    ]
    if is_number(report.floors.real_halves):
        found.append(f"For scale: one half of the real images is {number(report.floors.real_halves)} from the other.")
    return found


def few_steps(report: Report) -> list[str]:
    """How the teacher fares when it takes fewer steps."""
    teacher, single = reference(report), one_step(report, "teacher")
    if not teacher or not single or single is teacher or not _numbers(distance(teacher), distance(single)):
        return []
    full, one = distance(teacher), distance(single)
    sides = f"Fréchet distance: {number(full)} at {steps(teacher.num_steps)}, {number(one)} at 1 step"
    if comparison(one, full) <= 0:
        return [f"{sides}. Here one step of the teacher already suffices."]
    return [f"{sides}, {times(one / full)} as much."] if full else [f"{sides}."]


def reflow(report: Report) -> list[str]:
    """Whether reflow straightened the paths, what one step gains by it, and what it costs at many steps."""
    flows, teacher = rows_of(report, "flow"), reference(report)
    if not flows or not teacher:
        return []
    name, found = flows[0].model, []
    bent, straight = (_straightness(report, model) for model in (teacher.model, name))
    if _numbers(bent, straight):
        values = f"{number(bent)} for {named(teacher.model)}, {number(straight)} for {named(name)}"
        changes = ("straighter", "as straight as before", "no straighter: reflow missed its aim here")
        change = changes[1 + comparison(straight, bent)]
        found.append(f"Straightness, relative (0 is straight): {values}; the paths are {change}.")
    single, teacher_single = one_step(report, "flow"), one_step(report, "teacher")
    if single and teacher_single and _numbers(distance(single), distance(teacher_single)):
        after, before = distance(single), distance(teacher_single)
        changes = (f"{times(before / after)} nearer" if after else "nearer", "about the same", "further away")
        values = f"{number(before)} for {named(teacher.model)}, {number(after)} for {named(name)}"
        found.append(f"Fréchet distance of one step: {values}; {changes[1 + comparison(after, before)]}.")
    most = flows[-1]
    if most.num_steps > 1 and _numbers(distance(most), distance(teacher)):
        flow_at = f"{number(distance(most))} for {named(name)} at {steps(most.num_steps)}"
        verdicts = (
            "the flow is even the nearer one.",
            "reflow cost nothing there.",
            "the price of learning from the teacher’s images, not from real ones.",
        )
        verdict = verdicts[1 + comparison(distance(most), distance(teacher))]
        found.append(f"With many steps: {flow_at}, {number(distance(teacher))} for {named(teacher.model)}; {verdict}")
    return found


def distillation(report: Report) -> list[str]:
    """What distillation adds to one step of the flow."""
    student, flow = one_step(report, "student"), one_step(report, "flow")
    if not student or not flow or not _numbers(distance(student), distance(flow)):
        return []
    values = f"{number(distance(flow))} for {named(flow.model)}, {number(distance(student))} for {named(student.model)}"
    ratio = distance(flow) / distance(student) if distance(student) else math.inf
    verdict = (
        f"distillation brings it {times(ratio)} nearer" if math.isfinite(ratio) else "distillation brings it nearer",
        "distillation adds little here",
        "distillation made it worse here",
    )
    return [f"Fréchet distance of one step: {values}; {verdict[1 + comparison(distance(student), distance(flow))]}."]


def control(report: Report) -> list[str]:
    """The student against direct distillation, at one step: which is the better, and at what cost."""
    student, direct = one_step(report, "student"), one_step(report, "direct")
    if not student or not direct:
        return []
    found = []
    if _numbers(distance(student), distance(direct)):
        values = f"{number(distance(student))} for {named(student.model)}, {number(distance(direct))} for {named(direct.model)}"
        verdicts = (
            f"{named(student.model)} is the better, so reflow earns its cost on this data.",
            f"the same within {TIE:.0%}, so reflow was not needed for one step on this data.",
            f"{named(direct.model)} is the better: on this data, reflow before distillation did not help.",
        )
        verdict = verdicts[1 + comparison(distance(student), distance(direct))]
        found.append(f"Fréchet distance: {values}; {verdict}")
    if student.prompt_accuracy is not None and direct.prompt_accuracy is not None:
        values = f"{percent(student.prompt_accuracy)} and {percent(direct.prompt_accuracy)}"
        difference = student.prompt_accuracy - direct.prompt_accuracy
        if abs(difference) <= 2 * _standard_error(student, direct):
            verdict = f"a difference that {student.num_samples:,} samples cannot tell from chance."
        else:
            verdict = f"{named((student if difference > 0 else direct).model)} is the better."
        found.append(f"Prompt accuracy: {values}; {verdict}")
    roads = [_road(report, row.model) for row in (student, direct)]
    seconds = [sum(stage.seconds or 0 for stage in road) for road in roads]
    samples = [sum(s.samples or 0 for s in road if s.kind in ("reflow", "distill")) for road in roads]
    if all(seconds):
        found.append(
            f"After the teacher, {named(student.model)} took {duration(seconds[0])}, {named(direct.model)} {duration(seconds[1])}."
        )
    if all(samples):
        found.append(f"Training samples seen on the way: {samples[0]:,} and {samples[1]:,}.")
    return found


def accuracy(report: Report) -> list[str]:
    """How to read the accuracies: the reader's own limit, and the captions never trained on."""
    found = []
    if report.floors.reader_accuracy is not None:
        own = percent(report.floors.reader_accuracy)
        found.append(f"The reader itself is right on {own} of real images that it was not trained on.")
    best = result(report)
    if best and best.prompt_accuracy is not None and best.prompt_accuracy_unseen is not None:
        unseen, overall = percent(best.prompt_accuracy_unseen), percent(best.prompt_accuracy)
        found.append(
            f"On the caption template that no stage trained on, {named(best.model)} is right on {unseen} ({overall} overall)."
        )
    return found


def gaps(report: Report) -> list[str]:
    """How typical the worst gaps are."""
    shown = report.gaps
    if not shown:
        return []
    summary = distance_summary(shown.distances.get(shown.student, []))
    found = []
    if summary["count"]:
        share = len(shown.worst) / summary["count"]
        found.append(
            f"Of {summary['count']:,} images of {named(shown.student)}, half lie within {number(summary['median'])} of the "
            f"teacher’s and 95 % within {number(summary['percentile_95'])}. The {len(shown.worst)} shown are the "
            f"worst {percent(share)}, up to {number(summary['largest'])}."
        )
    if shown.unrelated is not None and math.isfinite(shown.unrelated):
        apart = f"{number(shown.unrelated)} apart (median)"
        found.append(f"For scale: two teacher images of one prompt from different noise lie {apart}.")
    read = [gap for gap in shown.worst if gap.teacher_reading and gap.student_reading]
    if read:
        changed = sum(gap.teacher_reading != gap.student_reading for gap in read)
        found.append(f"In {changed} of these {len(read)} the reader sees something else than in the teacher’s image.")
    return found


def total_seconds(report: Report) -> float | None:
    known = [stage.seconds for stage in report.stages if stage.seconds is not None]
    return report.seconds if report.seconds is not None else (sum(known) if known else None)


def _road(report: Report, model: str) -> Sequence[Stage]:
    """The stages that made `model`, itself included, without those that made a teacher."""
    by_name = {stage.name: stage for stage in report.stages}
    found: dict[str, Stage] = {}
    waiting = [model]
    while waiting:
        stage = by_name.get(waiting.pop())
        if stage and stage.kind != "teacher" and stage.name not in found:
            found[stage.name] = stage
            waiting += stage.parents
    return list(found.values())


def _straightness(report: Report, model: str) -> float:
    for row in report.rows:
        if row.model == model and row.straightness_relative is not None:
            return row.straightness_relative
    return math.nan


def _standard_error(a: Row, b: Row) -> float:
    """Of the difference of two accuracies, as if the samples were independent."""
    variances = [(r.prompt_accuracy or 0) * (1 - (r.prompt_accuracy or 0)) / max(r.num_samples, 1) for r in (a, b)]
    return math.sqrt(sum(variances))


def _numbers(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)
