"""What the figures say, in sentences that follow them: every claim is chosen by a comparison made here."""

import math
from collections.abc import Sequence

import numpy as np

from instaflow.evaluation.chance import TIE, by_chance, by_which, comparison, distances, is_chance, order, tie, whose
from instaflow.evaluation.costs import seconds, training_samples
from instaflow.evaluation.report import Report, Row, distance_summary
from instaflow.evaluation.wording import duration, is_number, joined, named, number, percent, steps, times


def own_rows(report: Report) -> list[Row]:
    """The rows of which something is said: those of this report's own models."""
    return [row for row in report.rows if not row.beside]


def rows_of(report: Report, kind: str) -> list[Row]:
    """The rows of one kind, fewest steps first, the nearer to its target first among equals; EMA where there is any."""
    rows = [row for row in own_rows(report) if row.kind == kind]
    rows = [row for row in rows if row.weights == "ema"] or rows
    return sorted(rows, key=lambda row: (row.num_steps, *(found[1] if (found := distances(row)) else [math.inf])))


def reference(report: Report) -> Row | None:
    """The teacher's row that the others are measured against: no distance to itself, most steps."""
    teachers = rows_of(report, "teacher")
    return max(teachers, key=lambda row: (not row.frechet_distance_teacher, row.num_steps), default=None)


def target(report: Report) -> Row | None:
    """The row that was set as the reference: its distance to the reference's images is 0."""
    return next((row for row in own_rows(report) if row.frechet_distance_teacher == 0), reference(report))


def rows_at(report: Report, model: str, num_steps: int) -> list[Row]:
    """The rows of a model at a number of steps, one for each guidance scale; EMA where there is any."""
    rows = [row for row in own_rows(report) if (row.model, row.num_steps) == (model, num_steps)]
    return [row for row in rows if row.weights == "ema"] or rows


def result(report: Report) -> Row | None:
    """The row that the experiment is about: of its first aim, else the student at its fewest steps.

    Without a student it is another that was distilled: one whose distribution was matched before its controls.
    """
    for aim in report.aims[:1]:
        if rows := rows_at(report, aim.model, aim.num_steps):
            return rows[0]
    others = [row for row in own_rows(report) if row.kind not in ("teacher", "flow", "student")]
    for kind in ("student", "dmd", *dict.fromkeys(row.kind for row in others), "flow"):
        if rows := rows_of(report, kind):
            return rows[0]
    return None


def one_step(report: Report, kind: str) -> Row | None:
    return _single(rows_of(report, kind))


def in_steps(report: Report, row: Row, num_steps: int) -> Row | None:
    """The same model at the same guidance, in another number of steps."""
    same = (row.model, row.weights, row.guidance_scale, num_steps)
    rows = own_rows(report)
    return next((one for one in rows if (one.model, one.weights, one.guidance_scale, one.num_steps) == same), None)


def the_student(report: Report) -> Row | None:
    """In one step: of several students, such as folders without a lineage, the one that the experiment is about."""
    best = result(report)
    return best if best and best.kind == "student" and best.num_steps == 1 else one_step(report, "student")


def best_in_one_step(report: Report) -> Row | None:
    """The nearest to its target of what was made for one step or few; None where nothing was measured."""
    rows = [row for row in own_rows(report) if row.num_steps == 1 and row.kind != "teacher" and distances(row)]
    measured = distances(*rows) if rows else None
    return rows[int(np.argmin(measured[1]))] if measured else None


def flow_rows(report: Report) -> list[Row]:
    """The rows of the flow that the result was distilled from, or of all flows where the stages do not tell."""
    flows, best = rows_of(report, "flow"), result(report)
    parents = [name for stage in report.stages if best and stage.name == best.model for name in stage.parents]
    return [row for row in flows if row.model in parents] or flows


def _single(rows: Sequence[Row]) -> Row | None:
    return rows[0] if rows and rows[0].num_steps == 1 else None


def headline(report: Report) -> list[str]:
    """What was reached: quality, accuracy, speed. One sentence each."""
    best, teacher = result(report), reference(report)
    if best is None:
        return [] if teacher is None else [f"This report shows {named(teacher.label)} alone."]
    found = []
    if measured := distances(best):
        target, (reached,) = measured
        taken = "one step" if best.num_steps == 1 else steps(best.num_steps)
        origin = f", made from the diffusion model {named(teacher.label)}," if teacher else ""
        text = f"{named(best.label)}{origin} draws an image in {taken}, at a Fréchet distance of {number(reached)} "
        text += f"from {target}"
        if teacher and (both := distances(best, teacher)) and both[0] == target:
            text += f"; {named(teacher.label)} reaches {number(both[1][1])} in {steps(teacher.num_steps)}"
            fewer = in_steps(report, teacher, best.num_steps) if best.num_steps < teacher.num_steps else None
            if fewer and (both := distances(best, fewer)):
                text += f" and {number(both[1][1])} in {taken}"
        found.append(f"{text}.")
        found += nearer(report, best)
    if best.prompt_accuracy is not None:
        compared = teacher and teacher.prompt_accuracy is not None
        beside = f" ({named(teacher.label)}: {percent(teacher.prompt_accuracy)})" if teacher and compared else ""
        found.append(f"{percent(best.prompt_accuracy)} of {report.protocol.judged} are drawn right{beside}.")
    if best.seconds_per_image and teacher and teacher.seconds_per_image:
        ratio = teacher.seconds_per_image / best.seconds_per_image
        than = f"{named(teacher.label)} at {steps(teacher.num_steps)}"
        each = f"An image takes {duration(best.seconds_per_image)}"
        slower = f"takes about {times(ratio)} as long" if ratio > 1.05 else "takes no longer"
        found.append(f"{each}; {than} {slower}.")
    return found


def nearer(report: Report, best: Row) -> list[str]:
    """Whether another one-step model comes nearer than the one that the experiment is about."""
    nearest = best_in_one_step(report)
    if not nearest or nearest is best or not (both := distances(nearest, best)) or order(nearest, best) >= 0:
        return []
    rows = [row for row in own_rows(report) if row.num_steps == 1 and row not in (nearest, best) and distances(row)]
    alike = joined([named(row.label) for row in rows if by_which(nearest, row) and is_chance(nearest, row)])
    doubt = f", not told apart from {alike}" if alike else ""
    reached = f"{named(nearest.label)} comes nearest in one step{doubt}: {number(both[1][0])}"
    return [f"Of the models made for few steps {reached}."]


def scale(report: Report) -> list[str]:
    """What a Fréchet distance is, and how large it is where nothing is wrong."""
    if not any(distances(row) for row in report.rows):
        return []
    found = [
        "Fréchet distance: how far two sets of images are apart, by the mean and the covariance of their features; "
        "lower is better, 0 is equality."
    ]
    if is_number(report.floors.real_halves):
        halves = f"one half of the real images is {number(report.floors.real_halves)} from the other"
        found.append(f"For scale: {halves}; a set of fewer images lies further away by chance alone.")
    return found


def few_steps(report: Report) -> list[str]:
    """How the teacher fares when it takes fewer steps."""
    teacher = reference(report)
    single = in_steps(report, teacher, 1) if teacher else None
    measured = distances(teacher, single) if teacher and single and single is not teacher else None
    if not teacher or not single or not measured:
        return []
    target, (full, one) = measured
    sides = f"Fréchet distance to {target}: {number(full)} at {steps(teacher.num_steps)}, {number(one)} at 1 step"
    if is_chance(single, teacher):
        return [f"{sides}; {by_chance(teacher)}."]
    if order(single, teacher) <= 0:
        return [f"{sides}. Here one step of the teacher already suffices."]
    return [f"{sides}, {times(one / full)} as much."] if full else [f"{sides}."]


def reflow(report: Report) -> list[str]:
    """Whether reflow straightened the paths, what one step gains by it, and what it costs at many steps."""
    flows, teacher, found = flow_rows(report), reference(report), []
    if not flows or not teacher:
        return []
    flow = named(flows[0].label)
    bent, straight = (_with_straightness(report, row) for row in (teacher, flows[0]))
    if bent and straight:
        before, after = bent.straightness_relative, straight.straightness_relative
        values = f"{number(before)} for {named(teacher.label)}, {number(after)} for {flow}"
        changes = ("straighter", "as straight as before", "no straighter: reflow missed its aim here")
        change = f"the paths are {changes[1 + order(straight, bent, 'straightness_relative')]}"
        if is_chance(straight, bent, "straightness_relative"):
            change = "a difference that so few paths cannot tell from chance"
        found.append(f"Straightness, relative (0 is straight): {values}; {change}.")
    found += _one_step_gain(in_steps(report, teacher, 1), _single(flows), "reflow")
    most = max((row for row in flows if row.label == flows[0].label), key=lambda row: row.num_steps)
    if most.num_steps > 1 and (measured := distances(most, teacher)):
        after, before = measured[1]
        verdicts = (
            "the flow is even the nearer one.",
            f"{by_chance(most)}." if is_chance(most, teacher) else "reflow cost nothing there.",
            "the flow falls short of its teacher there; longer training, or more couplings, may bring it nearer.",
        )
        values = f"{number(after)} for {flow} at {steps(most.num_steps)}, {number(before)} for {named(teacher.label)}"
        found.append(f"With many steps: {values}; {verdicts[1 + order(most, teacher)]}")
    return found


def distillation(report: Report) -> list[str]:
    """What distillation adds to one step of the flow."""
    return _one_step_gain(_single(flow_rows(report)), the_student(report), "distillation")


def _one_step_gain(before: Row | None, after: Row | None, what: str) -> list[str]:
    """What `what` changed in the distance of one step."""
    measured = distances(before, after) if before and after else None
    if not before or not after or not measured:
        return []
    target, (old, new) = measured
    verdicts = (
        f"{what} brings it {_by_how_much(old, new)} nearer" if old and new else f"{what} brings it there",
        by_chance(after) if is_chance(before, after) else f"{what} changes it by less than {TIE:.0%}",
        f"{what} makes it worse here",
    )
    values = f"{number(old)} for {named(before.label)}, {number(new)} for {named(after.label)}"
    return [f"Fréchet distance of one step to {target}: {values}; {verdicts[1 + order(after, before)]}."]


def _by_how_much(old: float, new: float) -> str:
    ratio = old / new
    return times(ratio) if ratio >= 1.5 else f"{100 * (1 - new / old):.0f}\N{NO-BREAK SPACE}%"


def control(report: Report) -> list[str]:
    """The student against direct distillation, at one step: which is the better, and at what cost."""
    verdicts = (
        "so here reflow helps the one-step model.",
        "so here reflow makes no difference to the one-step model.",
        "so here reflow before distillation does not help.",
    )
    return _against(report, "direct", verdicts)


def progressive(report: Report) -> list[str]:
    """The student against progressive distillation, at one step."""
    verdicts = (
        "so here training on couplings leads further.",
        "so here both roads lead as far.",
        "so here halving the steps leads further.",
    )
    return _against(report, "progressive", verdicts)


def dmd(report: Report) -> list[str]:
    """The student, or without one direct distillation, against distribution matching, at one step."""
    verdicts = (
        "so here training on couplings alone leads further.",
        "so here both roads lead as far.",
        "so here matching distributions leads further.",
    )
    return _against(report, "dmd", verdicts, "student" if one_step(report, "student") else "direct")


def _against(report: Report, kind: str, follows: tuple[str, str, str], mine: str = "student") -> list[str]:
    """The student against another model of one step; `follows` from it being the nearer, a tie, and the further.

    `mine`: the kind that stands for the student.
    """
    student = the_student(report) if mine == "student" else one_step(report, mine)
    other, found = one_step(report, kind), []
    if not student or not other:
        return []
    names = named(student.label), named(other.label)
    if measured := distances(student, other):
        target, (ours, theirs) = measured
        place = 1 + order(student, other)
        verdict = (f"{names[0]} is the nearer", tie(student, other), f"{names[1]} is the nearer")[place]
        values = f"{number(ours)} for {names[0]}, {number(theirs)} for {names[1]}"
        so = "." if is_chance(student, other) else f", {follows[place]}"
        found.append(f"Fréchet distance to {target}: {values}; {verdict}{so}")
    if student.prompt_accuracy is not None and other.prompt_accuracy is not None:
        difference = student.prompt_accuracy - other.prompt_accuracy
        if not difference:
            verdict = "the same."
        elif is_chance(student, other, "prompt_accuracy", same=0.0):
            verdict = f"{by_chance(student)}."
        else:
            verdict = f"{names[0] if difference > 0 else names[1]} is the better."
        values = f"{percent(student.prompt_accuracy)} and {percent(other.prompt_accuracy)}"
        found.append(f"Prompt accuracy: {values}; {verdict}")
    return found + _budgets(report, student, other)


def _budgets(report: Report, student: Row, other: Row) -> list[str]:
    """What the two roads cost after the teacher, and whether they are alike."""
    spent = [seconds(report, row) for row in (student, other)]
    samples = [training_samples(report, row) for row in (student, other)]
    found = []
    if all(samples):
        favoured = (other.model, "", student.model)[1 + comparison(samples[0], samples[1])]
        unequal = f", which favours {named(favoured)}" if favoured else ""
        found.append(f"Training samples seen on the way: {samples[0]:,} and {samples[1]:,}{unequal}.")
    if spent[0] and spent[1]:
        found.append(f"Time after the teacher: {duration(spent[0])} and {duration(spent[1])}.")
    return [*found, "Each was trained once, with one seed."]


def accuracy(report: Report) -> list[str]:
    """How to read the accuracies: the reader's own limit, and the captions never trained on."""
    found = []
    if report.floors.reader_accuracy is not None:
        own = percent(report.floors.reader_accuracy)
        found.append(f"The reader itself is right on {own} of real images that it was not trained on.")
    best = result(report)
    if best and best.prompt_accuracy is not None and best.prompt_accuracy_unseen is not None:
        unseen, overall = percent(best.prompt_accuracy_unseen), percent(best.prompt_accuracy)
        right = f"{named(best.label)} is right on {unseen} ({overall} overall)"
        found.append(f"On the caption template that no stage trained on, {right}.")
    return found


def averaging(report: Report) -> list[str]:
    """What the moving average of the weights changed, for each row that also has the raw ones."""
    found = []
    for raw in (row for row in own_rows(report) if row.weights == "raw"):
        averaged = (
            row for row in own_rows(report) if row.weights == "ema" and row.guidance_scale == raw.guidance_scale
        )
        own = next((row for row in averaged if (row.model, row.num_steps) == (raw.model, raw.num_steps)), None)
        measured = distances(own, raw) if own else None
        if own and measured:
            target, (average, as_left) = measured
            verdicts = ("the average is the nearer", tie(own, raw), "the raw weights are the nearer")
            verdict = verdicts[1 + order(own, raw)]
            values = f"{number(average)} with the moving average of its weights, {number(as_left)} with the raw ones"
            found.append(
                f"{named(raw.model)} at {steps(raw.num_steps)}, Fréchet distance to {target}: {values}; {verdict}."
            )
    return found


def diversity(report: Report) -> list[str]:
    """Whether the images of one prompt are as varied as the teacher's."""
    best, teacher = result(report), reference(report)
    if not best or not teacher or best is teacher or best.diversity is None or teacher.diversity is None:
        return []
    sides = (
        f"Two images of one prompt look {number(best.diversity)} apart as {named(best.label)} draws them, and "
        f"{number(teacher.diversity)} as {named(teacher.label)} does (mean, from different noise)"
    )
    if is_chance(best, teacher, "diversity"):
        return [f"{sides}; a difference that so few prompts cannot tell from chance."]
    verdicts = ("is less varied: look for what it no longer draws", "is as varied", "is more varied")
    return [f"{sides}; {named(best.label)} {verdicts[1 + order(best, teacher, 'diversity')]}."]


def gaps(report: Report) -> list[str]:
    """How typical the worst gaps are."""
    shown = report.gaps
    if not shown:
        return []
    summary = distance_summary(shown.distances.get(shown.student, []))
    found = []
    if summary["count"]:
        share = len(shown.worst) / summary["count"]
        within = f"half lie within {number(summary['median'])} of the {whose(report.rows)}’s"
        found.append(
            f"Of {summary['count']:,} images of {named(shown.student)}, {within} and 95\N{NO-BREAK SPACE}% within "
            f"{number(summary['percentile_95'])}, the furthest {number(summary['largest'])} away."
        )
        if shown.worst:
            found.append(f"The {len(shown.worst)} shown are the worst {percent(share)}.")
    if shown.unrelated is not None and math.isfinite(shown.unrelated):
        apart = f"{number(shown.unrelated)} apart (median)"
        found.append(f"For scale: two images of {named(shown.teacher)} of one prompt from different noise lie {apart}.")
    read = [gap for gap in shown.worst if gap.teacher_reading and gap.student_reading]
    if read:
        changed = sum(gap.teacher_reading != gap.student_reading for gap in read)
        found.append(
            f"In {changed} of these {len(read)} the reader sees something else than in that of {named(shown.teacher)}."
        )
    return found


def memory(report: Report) -> list[str]:
    """Whether a model's images are copies of real ones."""
    found = report.neighbours
    if not found:
        return []
    sides = (
        f"The images of {named(found.model)} lie {number(found.median)} from the nearest real one (median), a real "
        f"image {number(found.real_median)} from the nearest other"
    )
    verdicts = (
        "nearer than real images to one another: look for copies.",
        "as near as real images to one another.",
        "farther than real images from one another: most of them are no copies of these.",
    )
    return [f"{sides}; {verdicts[1 + comparison(found.median, found.real_median)]}"]


def _with_straightness(report: Report, of: Row) -> Row | None:
    """A model's row that has S(Z), relative, in whatever number of steps."""
    rows = [row for row in report.rows if row.label == of.label]
    return next((row for row in rows if is_number(row.straightness_relative)), None)
