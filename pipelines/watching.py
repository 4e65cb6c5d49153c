"""Watching: while a model of a report is still trained, its checkpoints are scored as they come.

REPORT/watch/scores.jsonl    a line a checkpoint: samples seen, figures with their card, what training and scoring took
REPORT/watch/watch.html      the scores against training samples, written anew after each
REPORT/watch/held/           the weights that are being scored: training may remove its own meanwhile
REPORT/watch/observed/       what was seen of their images, for a stopped watch to go on

Nothing is written into the folder of the stage that trains.
"""

import shlex
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from instaflow.config import Experiment
from instaflow.errors import ConfigError, Interrupted, NotFiniteError
from instaflow.evaluation.card import Card
from instaflow.evaluation.observations import Observations
from instaflow.evaluation.report import Report, Row, labelled, plain
from instaflow.evaluation.scores import FILE, WATCH, diverged, score_curves, scored, training_of
from instaflow.evaluation.watch_page import write_watch_page
from instaflow.evaluation.wording import duration, joined, named, number, percent, steps
from instaflow.interruption import Stop
from instaflow.models.device import device, set_up_cpu
from instaflow.rundir import StageFolder, append_stats, locked, read_json, stage_folders
from instaflow.sections import EvaluatedModel
from instaflow.stages import NetworkStage
from instaflow.world import as_any_sees, as_the_leader_sees, hardware, numbers_of_the_leader, world
from pipelines.evaluate import reference_of, subjects_of
from pipelines.experiment import check_inputs, say
from pipelines.exporting import scheduler_of, settings_of
from pipelines.judging import Judging, Seen, look_at_models
from pipelines.measuring import Measure, protocol_words, versions
from pipelines.observing import Measured, Subject, leave_if, observe
from pipelines.trainings import checkpoints_of, cost_at, hold, model_at, model_before

POLL = 3.0
"""Seconds between two looks at what training wrote."""
WAIT, OVER = -1, -2
"""What a look comes to where no checkpoint is due: training goes on, or all trainings are done."""


def run(experiment: Experiment, name: str | None, stop: Stop) -> None:
    """Score the checkpoints of all trainings among the models of a report, until the trainings are done.

    Raises ConfigError where there is nothing to watch, Interrupted when told to stop.
    """
    stages = stage_folders(experiment)
    stage = stages[name or only_report(experiment)]
    courses = [
        Course(entry, stages[entry.model])
        for entry in stage.stage.models
        if entry.model in stages and isinstance(stages[entry.model].stage, NetworkStage)
    ]
    if not courses:
        models = ", ".join(f"'{entry.model}'" for entry in stage.stage.models)
        raise ConfigError(
            f"Stage '{stage.name}' has nothing to watch: of its models ({models}) none is made by a reflow or distill "
            "stage of this experiment",
            "Name such a stage among its models, or leave out --watch",
        )
    check_inputs({stage.name: stage})
    set_up_cpu()
    try:
        with locked(stage.folder / WATCH) if world().leads else nullcontext():
            Watch(stage, stages, courses).until_done(stop)
    except Interrupted as error:
        words = ["instaflow", "evaluate", *experiment.arguments(), "--stage", stage.name, "--watch"]
        error.hint = f"To go on: {shlex.join(words)}"
        raise


def only_report(experiment: Experiment) -> str:
    """The experiment's evaluate stage. Raises ConfigError if it has none or several."""
    found = [name for name, stage in stage_folders(experiment).items() if stage.stage.kind == "evaluate"]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"'{experiment.source}' has several reports: {', '.join(found)}", "Say which: --stage NAME")
    raise ConfigError(f"'{experiment.source}' has no stage of kind 'evaluate'", "A watch scores by such a stage")


@dataclass
class Course:
    """A model of the report on its way."""

    entry: EvaluatedModel
    training: StageFolder
    """Of the stage that makes it."""
    begun: str | None = None
    """Which training of that stage it is, once there is one."""
    kind: str = ""
    """"flow" or "student"."""
    cards: list[Card] = field(default_factory=list)
    """Of its rows; the content is the training's."""
    waiting: set[int] = field(default_factory=set)
    """The samples at checkpoints that were there at the last look, not scored yet."""
    turns: int = 0

    @property
    def name(self) -> str:
        return f"{self.training.name} (raw)" if self.entry.weights == "raw" else self.training.name

    @property
    def total(self) -> int:
        """Samples of the whole training."""
        return sum(phase.seen for phase in self.training.stage.phases)


class Watch:
    """The scoring of several courses for one report. All processes of a launch do the same at once."""

    protocol: Judging
    measure: Measure
    """The leader's."""

    def __init__(self, stage: StageFolder, stages: dict[str, StageFolder], courses: list[Course]) -> None:
        self.stage, self.stages, self.courses = stage, stages, courses
        self.folder = stage.folder / WATCH
        self.reference: Measured | None = None
        self.compared: list[Row] = []
        """The reference's row, once it is there."""
        self.states: dict[str, str] = {}
        """What was last told of each training."""

    def until_done(self, stop: Stop) -> None:
        """Look, and score or wait. Raises Interrupted."""
        say(f"{self.stage.name}: watching {', '.join(course.name for course in self.courses)}")
        while not as_the_leader_sees(self.can_begin()):
            self.rest(stop)
        origins = [
            course.entry.model_copy(update={"model": self.origin(course), "weights": "ema"}) for course in self.courses
        ]
        self.protocol, _ = look_at_models(with_models(self.stage, origins))
        real = self.protocol.reference_features(self.folder / "observed", lambda: leave_if(stop, self.stage))
        if world().leads:
            self.measure = Measure.by(self.protocol, real, None)
            for course in self.courses:
                self.begin(course)  # what was scored before is drawn from the first page on
        while True:
            self.see_reference(stop)
            place, samples = numbers_of_the_leader(*(self.look() if world().leads else (WAIT, 0)))
            if place == OVER:
                break
            if place == WAIT:
                self.rest(stop)
            else:
                self.score(self.courses[place], samples, stop)
        if world().leads:
            self.draw(over=True)
            for name in ("held", "observed"):  # whatever killed watches left there
                shutil.rmtree(self.folder / name, ignore_errors=True)
            lost = [{seen for card in one.cards for seen in self.lost(card)} for one in self.courses]
            counts = [
                f"{course.name} was scored at {len(self.scored(course) - without)} checkpoints"
                + (f" and in part or not at all at {len(without)}" if without else "")
                for course, without in zip(self.courses, lost, strict=True)
            ]
            say(f"{self.stage.name}: {', '.join(counts)}; {self.folder / 'watch.html'}")

    def rest(self, stop: Stop) -> None:
        if as_any_sees(stop()):
            raise Interrupted(f"Stage '{self.stage.name}' watches no longer ({stop.signal or 'another process'})")
        time.sleep(POLL)

    # --- trainings ----------------------------------------------------------------------------------------------------

    def origin(self, course: Course) -> str:
        """The model that a course comes from, as far back as stages are not done."""
        name = course.training.name
        while name in self.stages and not self.stages[name].is_done():
            settings = self.stages[name].stage
            if not isinstance(settings, NetworkStage):
                break
            name = settings.init
        return name

    def can_begin(self) -> bool:
        """Whether there is a model of each course to look at."""
        for course in self.courses:
            self.tell_state(course)
        origins = [self.origin(course) for course in self.courses]
        return all(name not in self.stages or self.stages[name].is_done() for name in origins)

    def look(self) -> tuple[int, int]:
        """Which course has a checkpoint due, and at how many samples; its weights are held from now on.

        The newest goes first: where scoring is slower than training, older ones are scored if they stay so long.
        """
        going_on = False
        for place in sorted(range(len(self.courses)), key=lambda place: self.courses[place].turns):
            course = self.courses[place]
            is_done = course.training.is_done()  # asked first: what is found after that is all that there will be
            self.tell_state(course)
            going_on = going_on or not is_done
            if not self.begin(course):
                continue
            found, scored = checkpoints_of(course.training, course.entry.weights), self.scored(course)
            held = {int(file.stem) for file in self.held(course, 0).parent.glob("[0-9]*.safetensors")}
            there = {*found, *held} - scored
            for samples in sorted(course.waiting - there - scored):
                gone = "its checkpoint was removed before it could be scored"
                say(f"{self.stage.name}: {course.name} at {samples:,} of {course.total:,} samples: {gone}")
            for samples in held & scored:  # a watch was killed between the score and this
                self.held(course, samples).unlink(missing_ok=True)
            course.waiting = there
            for samples in sorted(there, reverse=True):
                if samples in held or hold(found[samples], self.held(course, samples)):
                    return place, samples
        return (WAIT if going_on else OVER), 0

    def begin(self, course: Course) -> bool:
        """Know a course's rows; whether its training was begun. Raises ConfigError where that has other settings."""
        training, begun = course.training, training_of(course.training.folder)
        if begun in (None, course.begun):
            return begun is not None
        training.check_identity()
        model = model_before(training, torch.device("cpu"))
        settings = settings_of(training.stage, model)
        seen = Seen(
            latent_shape=model.latent_shape,
            image_size=model.image_size,
            guidance_scale=settings.guidance_scale,
            sampler=type(scheduler_of(training.stage, model)).__name__,
            kind=settings.kind,
        )
        origin = course.entry.model_copy(update={"model": training.stage.init, "weights": "ema"})
        cards = [subject.card for subject in subjects_of(with_models(self.stage, [origin]), self.protocol, [seen])]
        name, weights = course.entry.model, course.entry.weights
        course.cards = [replace(card, model=name, model_content=begun, weights=weights) for card in cards]
        course.begun, course.kind = begun, settings.kind
        return True

    def scored(self, course: Course) -> set[int]:
        """The samples at which all rows of a course were scored, or can't be."""
        report, keys = self.stage.folder, [card.key() for card in course.cards]
        found = [{*scored(report, key, self.beside), *diverged(report, key)} for key in keys]
        return set.intersection(*found) if found else set()

    def lost(self, card: Card) -> set[int]:
        """The samples at which a row has no score, since it drew no images."""
        return diverged(self.stage.folder, card.key())

    @property
    def beside(self) -> Card | None:
        """The reference's card, once it is there."""
        return self.reference.subject.card if self.reference else None

    def held(self, course: Course, samples: int) -> Path:
        return self.folder / "held" / f"{course.begun}-{course.entry.weights}" / f"{samples:012d}.safetensors"

    def tell_state(self, course: Course) -> None:
        """Say how a training stands, when that has changed."""
        file, state = course.training.folder / "state.json", "not begun"
        if file.is_file():
            found = read_json(file)
            state = f"{found['state']} ({found['reason']})" if found.get("reason") else found["state"]
        name = course.training.name
        if state != self.states.get(name):
            self.states[name] = state
            say(f"{self.stage.name}: the training of {name} is {state}")

    # --- scores -------------------------------------------------------------------------------------------------------

    def see_reference(self, stop: Stop) -> None:
        """Sample the reference's images once its model is there, as the report will. Raises Interrupted."""
        asked = self.stage.stage.reference
        if self.reference or not as_the_leader_sees(self.stage.is_here(asked.model)):
            return
        entry = next(
            entry
            for entry in self.stage.stage.models
            if (entry.model, entry.weights) == (asked.model, "ema") and asked.num_steps in entry.num_steps
        )
        alone = with_models(self.stage, [entry.model_copy(update={"num_steps": [asked.num_steps]})])
        _, seen = look_at_models(alone)
        subject = replace(reference_of(alone, subjects_of(alone, self.protocol, seen), seen), paths=None)
        observe(self.stage, stop, self.protocol, [subject])
        self.reference = Measured(subject)
        if world().leads:
            self.measure = Measure.by(self.protocol, self.measure.real, self.reference, seen[0].kind)
            self.compared = [self.measure.row(self.reference, seen[0].kind)]
            self.draw()

    def score(self, course: Course, samples: int, stop: Stop) -> None:
        """Sample a held checkpoint and note its figures. Raises Interrupted."""
        began = time.monotonic()
        self.begin(course)  # the leader has, the others have not looked yet
        file = self.held(course, samples)
        settings = self.stage.stage.model_copy(update={"compared_samples": 2})  # no image of it is shown
        load = partial(model_at, course.training, file, device())
        subjects = []
        for card in course.cards:
            own = replace(card, model_content=f"{course.begun} at {samples}")
            images = Observations(self.folder / "observed" / own.key(), settings.count, settings.batch)
            subjects.append(Subject(course.entry, own, images, None, load))
        course.turns += 1
        faults = self.sample(replace(self.stage, stage=settings), subjects, stop)
        if world().leads:
            cost = cost_at(course.training, samples)
            told = {**cost, "scoring_seconds": round(time.monotonic() - began, 3), "at": now()}
            for card, subject, fault in zip(course.cards, subjects, faults, strict=True):
                if samples in {*scored(self.stage.folder, card.key(), self.beside), *self.lost(card)}:
                    continue  # a watch was killed before it came to the next row
                if fault:
                    line = {"samples_seen": samples, "curve": card.key(), "diverged": fault, "at": now()}
                    append_stats(self.folder / FILE, line)
                    say(f"{self.stage.name}: at {samples:,} of {course.total:,} samples {fault}")
                    continue
                row = self.measure.row(Measured(subject), course.kind)
                marks = {"curve": card.key(), "reference": self.beside and self.beside.subject()}
                line = {"samples_seen": samples, **row.plain(), **told, **marks}
                append_stats(self.folder / FILE, plain(line))
                seen = f"{row.label} at {samples:,} of {course.total:,} samples, {steps(row.num_steps)}"
                say(f"{self.stage.name}: {seen}: {in_words(row)}; {after(told)}".replace("\N{NO-BREAK SPACE}", " "))
            for subject in subjects:
                shutil.rmtree(subject.images.folder)
            file.unlink()
            self.draw()

    def sample(self, stage: StageFolder, subjects: list[Subject], stop: Stop) -> list[str]:
        """Sample a checkpoint's rows; of each why it draws no images, or nothing. Raises Interrupted."""
        try:
            observe(stage, stop, self.protocol, subjects, quiet=True)
        except NotFiniteError as error:
            if len(subjects) == 1:
                return [error.message]
            return [fault for subject in subjects for fault in self.sample(stage, [subject], stop)]
        return [""] * len(subjects)

    def draw(self, *, over: bool = False) -> None:
        """Write the page anew. over: all trainings are done."""
        said, curves, rows = [], [], [*self.compared]
        for course in self.courses:
            own = score_curves(self.stage.folder, [card.key() for card in course.cards], self.beside)
            some = own or any(self.lost(card) for card in course.cards)
            said += [] if some else [f"{named(course.name)} has no score yet."]
            for curve in own:
                row, seen = curve.rows[-1], curve.samples_seen[-1]
                at = f"after {seen:,} of {course.total:,} training samples, in {steps(row.num_steps)}"
                said.append(f"{named(curve.label)} {at}: {in_words(row)}.")
                rows += [row] if seen == course.total else []
            for card in course.cards:
                if lost := joined([f"{seen:,}" for seen in sorted(self.lost(card))]):
                    scale = card.guidance_scale if len(course.entry.scales) > 1 else None
                    name = f"{named(labelled(card.model, card.weights, scale))} in {steps(card.num_steps)}"
                    said.append(f"{name} has no score after {lost} training samples: its images were not finite.")
            curves += own
        for row in self.compared:
            said.append(f"To compare with, {named(row.label)} in {steps(row.num_steps)}: {in_words(row)}.")
        report = Report(
            title=f"{Path(self.stage.source).stem}, {'as it trained' if over else 'while it trains'}",
            config=Path(self.stage.source).name,
            seed=self.stage.seed,
            hardware=hardware(),
            protocol=replace(protocol_words(self.stage, self.protocol, self.reference), straightness=""),
            rows=rows,
            versions=versions(),
            scores=curves,
        )
        write_watch_page(self.folder / "watch.html", report, said, now())


def with_models(stage: StageFolder, entries: list[EvaluatedModel]) -> StageFolder:
    """A report's stage as if it were of these models."""
    return replace(stage, stage=stage.stage.model_copy(update={"models": entries}))


def in_words(row: Row) -> str:
    """A row's main figures."""
    found = [f"Fréchet distance {number(row.frechet_distance_real)} to the real images"]
    if row.frechet_distance_teacher:
        found.append(f"{number(row.frechet_distance_teacher)} to the {row.compared_with}'s")
    if row.prompt_accuracy is not None:
        found.append(f"{percent(row.prompt_accuracy)} drawn right")
    if row.clip_score is not None:
        found.append(f"CLIP score {number(row.clip_score)}")
    return ", ".join(found)


def after(told: dict) -> str:
    """What a score took."""
    trained = told["training_seconds"]
    return f"scored in {duration(told['scoring_seconds'])}" + (f", trained for {duration(trained)}" if trained else "")


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
