"""Which stages run, in which order, and what is said about those that wait."""

import importlib
import importlib.util
import shlex
import sys
from contextlib import suppress
from pathlib import Path

from instaflow import world
from instaflow.config import Experiment
from instaflow.errors import ConfigError, InstaFlowError, Interrupted
from instaflow.image_files import ImageFiles
from instaflow.interruption import Stop
from instaflow.meeting import check_launch
from instaflow.methods import DmdStage, ProgressiveStage
from instaflow.places import check_network, check_perceptual, find_model, kind_of_extractor
from instaflow.prompt_sources import Prompts
from instaflow.rundir import StageFolder, locked, stage_folders
from instaflow.sections import BACKBONES, DIGITS, FEATURES, share_of
from instaflow.stages import CoupleStage, EvaluateStage, FlowStage, Stage
from instaflow.stores import Store
from instaflow.weights import find
from instaflow.world import ALONE, Worker


def run_all(experiment: Experiment, stop: Stop) -> None:
    """Run every stage that is not done, in order. Raises Interrupted when told to stop, as all of these do."""
    stages = stage_folders(experiment)
    check_inputs(stages)
    if any(isinstance(stage, FlowStage | DmdStage) and stage.perceptual for stage in experiment.stages.values()):
        from pipelines.plan import check_crops

        check_crops(experiment)
    try:
        for stage in stages.values():
            run_stage(stage, stop)
    except Interrupted as error:
        error.hint = f"To go on: {shlex.join(['instaflow', 'run', *experiment.arguments()])}"
        raise
    tell_results(stages)


def tell_results(stages: dict[str, StageFolder]) -> None:
    """Where a run's reports are, and how to draw with what it made."""
    tell_reports(stages)
    if told := how_to_sample(stages):
        say(told)


def tell_reports(stages: dict[str, StageFolder]) -> None:
    for stage in stages.values():
        if stage.stage.kind == "evaluate" and stage.is_done():
            say(f"The report: {stage.folder / 'report.html'}")


def how_to_sample(stages: dict[str, StageFolder]) -> str | None:
    """The command that draws with the report's best one-step model; without a report, with what was distilled last."""
    from instaflow.evaluation.findings import best_in_one_step
    from instaflow.evaluation.saved import read_report

    for stage in list(stages.values())[::-1]:
        report = stage.folder / "report.json"
        if stage.stage.kind == "evaluate" and report.is_file():
            with suppress(InstaFlowError):  # a damaged report, or a model that is gone, spoils no run that is done
                if best := best_in_one_step(read_report(report)):
                    place = shlex.quote(stage.locate_weights(best.model, best.weights))
                    more = " --num-steps 1" if best.kind == "flow" else ""  # its folder recommends several
                    return f'Images in one step, by the report\'s best: instaflow sample {place}{more} --prompt "..."'
    for stage in list(stages.values())[::-1]:
        if stage.stage.kind == "distill":
            count = num_steps_of(stage.stage)
            said = "one step" if count == 1 else f"{count} steps"
            return f'Images in {said}: instaflow sample {shlex.quote(str(stage.model))} --prompt "..."'
    return None


def run_kind(experiment: Experiment, kind: str, stop: Stop, worker: Worker = ALONE) -> None:
    """Run the stages of one kind whose parents are done. Raises InstaFlowError if nothing could run and some wait."""
    stages = stage_folders(experiment, worker)
    mine = {name: stage for name, stage in stages.items() if stage.stage.kind == kind}
    if not mine:
        kinds = ", ".join(f"{name} ({stage.stage.kind})" for name, stage in stages.items())
        raise ConfigError(f"'{experiment.source}' has no stage of kind '{kind}'", f"Its stages: {kinds}")
    check_inputs(mine)
    ran, waiting = False, {}
    for name, stage in mine.items():
        missing = missing_parents(experiment, stages, name)
        if missing:
            waiting[name] = f"'{name}' waits for {' and '.join(repr(parent) for parent in missing)}"
        else:
            ran = run_stage(stage, stop) or ran
    if waiting and not ran:
        raise InstaFlowError("; ".join(waiting.values()), run_first(experiment, stages, next(iter(waiting))))
    for line in waiting.values():
        say(line)
    tell_reports(mine)


def run_one(experiment: Experiment, name: str, stop: Stop, worker: Worker = ALONE) -> None:
    """Run one stage. Raises InstaFlowError if a parent is not done."""
    stages = stage_folders(experiment, worker)
    stage = stages[name]
    check_inputs({name: stage})
    missing = missing_parents(experiment, stages, name)
    if missing:
        message = f"Stage '{name}' builds on '{missing[0]}', which is not done"
        raise InstaFlowError(message, run_first(experiment, stages, name))
    run_stage(stage, stop)
    tell_reports({name: stage})


def missing_parents(experiment: Experiment, stages: dict[str, StageFolder], name: str) -> list[str]:
    """The stages that `name` waits for; a done one waits for none."""
    if stages[name].is_done():
        return []
    return [parent for parent in experiment.stage_parents(name) if not stages[parent].is_done()]


def run_first(experiment: Experiment, stages: dict[str, StageFolder], name: str) -> str:
    """A hint: the command for the first stage on the way to `name` that is not done and waits for nothing."""
    while missing := missing_parents(experiment, stages, name):
        name = missing[0]
    return f"Run first: {stages[name].command()}"


def check_inputs(stages: dict[str, StageFolder]) -> None:
    """Look at the launch, prompts, models, packages and batch sizes before a stage starts. Raises InstaFlowError."""
    check_launch(next(iter(stages.values())).run)
    for name, stage in stages.items():
        if stage.is_done() and not changes_of(stage):
            continue
        told = look_at_source(stage)
        if isinstance(stage.stage, CoupleStage) and stage.stage.output:
            Store(stage.stage.output).sizes("")
        look_at_models(stage)
        look_at_perception(stage)
        for line in with_warnings(name, told, look_at_measures(stage)):
            say(line)
        for parent in stage.stage.parents().values():
            if parent not in stage.stage_names and not Path(parent).is_dir():
                find_model(parent)
        for package, setting in stage.stage.packages().items():
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"'stages.{name}': {setting} needs {package}", f"pip install {package}")
        for entry in getattr(stage.stage, "models", ()):
            if entry.model not in stage.stage_names:
                stage.locate_weights(entry.model, entry.weights)
        for key in ("autoencoder_phases", "text_phases", "phases", "perceptual_phases"):
            for index, phase in enumerate(getattr(stage.stage, key, None) or ()):
                size = share_of(phase, stage.stage.micro_batch_size, world.world().size, f"stages.{name}.{key}.{index}")
                pairs = getattr(stage.stage, "regression", None)
                if pairs and not pairs.fits(size):
                    raise ConfigError(
                        f"'stages.{name}.regression.share': {pairs.share:g} of {size} samples, which a process takes "
                        "at a time, is no whole number"
                    )


def check_files(experiment: Experiment, name: str | None, kind: str | None) -> None:
    """What a dry run looks at: the files that these stages read, where no network is asked for them.

    What is to be said of them goes to the standard error: the output is the experiment's, or its scripts'.
    Raises ConfigError and DataError.
    """
    for stage in stage_folders(experiment).values():
        is_meant = stage.name == name if name else kind in (None, stage.stage.kind)
        changes = changes_of(stage) if is_meant and stage.is_done() else []
        if changes:
            print(f"{stage.name}: would be made anew, for {'; '.join(changes)}", file=sys.stderr)
        if is_meant and (changes or not stage.is_done()):
            told = look_at_source(stage) if "://" not in place_of_source(stage) else None
            look_at_models(stage)
            look_at_perception(stage)
            for line in with_warnings(stage.name, told, look_at_measures(stage)):
                print(line, file=sys.stderr)


def changes_of(stage: StageFolder) -> list[str]:
    """For what a done stage is made anew, in words; of one that is refused instead, nothing."""
    return stage.changes() if stage.stage.remade else []


def with_warnings(name: str, told: str | None, warnings: list[str]) -> list[str]:
    """What is said of a stage's inputs before it begins."""
    return [*([f"{name}: {told}"] if told else []), *(f"{name}: warning: {line}" for line in warnings)]


def look_at_models(stage: StageFolder) -> None:
    """The folders that a stage takes models from, where they are here. Raises DataError for one that holds no model."""
    for key, place in stage.stage.parents().items():
        if key in ("model", "init", "teacher") and place not in stage.stage_names and Path(place).is_dir():
            find_model(place)


def look_at_measures(stage: StageFolder) -> list[str]:
    """The files that an evaluation wants, its weights too; what makes of its figures others than the published.

    Raises ConfigError and DataError.
    """
    from instaflow.evaluation.card import check_alike
    from instaflow.evaluation.presets import PRESETS, captions_of, look_at_real
    from instaflow.evaluation.saved import read_report

    settings = stage.stage
    if not isinstance(settings, EvaluateStage):
        return []
    asked = {
        "protocol": settings.protocol,
        "num_samples": settings.count,
        "seed": stage.seed,
        "dtype": settings.dtype,
    }
    for key, place in settings.files().items():
        if key != "features" and not Path(place).is_file():
            raise ConfigError(f"'stages.{stage.name}.{key}' names '{place}', which is no file here", "Check the path")
        if key.startswith("beside"):
            earlier = read_report(
                Path(place), "Name the report.json of an earlier evaluation, or leave it out of 'beside'"
            )
            for row in earlier.rows:  # as far as the settings tell; by what is left once models and images are there
                own = {name: value for name, value in asked.items() if name in row.card}
                check_alike([(f"'{stage.name}'", {**row.card, **own}), (f"'{row.model}' in '{place}'", row.card)])
    if not settings.of_images:
        return []

    preset, told = PRESETS[settings.protocol], []
    if settings.captions:
        told.append(captions_of(settings.captions, preset, settings.count, settings.captions_seed)[1])
    if few := preset.told_of_samples(settings.count):
        told.append(f"{settings.count:,} samples, {few}")
    told.append(look_at_real(Path(settings.real or ""), preset))
    if folder := settings.features_folder:
        if not Path(folder).is_dir():
            said = f"'stages.{stage.name}.features' names '{folder}', which is no folder here"
            raise ConfigError(said, f"Check the path, or choose one of {', '.join(FEATURES)}")
        kind_of_extractor(Path(folder))
    elif settings.features != "pixels":
        find("inception")
    if settings.clip and settings.captions:
        find(settings.clip)
    return [line for line in told if line]


def place_of_source(stage: StageFolder) -> str:
    """The path or URL that a stage's prompts or images lie at; empty where it has none."""
    settings = stage.stage
    prompts = getattr(settings, "prompts", None)
    return str(getattr(settings, "data", None) or getattr(prompts, "path", prompts) or "")


def look_at_source(stage: StageFolder) -> str | None:
    """Read a stage's prompts to their end, unless it keeps its copy of them, and say which are left out.

    Of real images so the captions. Raises ConfigError where they can't be read, or are too few.
    """
    settings = stage.stage
    if not isinstance(settings, CoupleStage | DmdStage) or (stage.folder / "prompts.json").exists():
        return None
    if isinstance(settings, CoupleStage) and settings.data:
        return look_at_images(settings.data, settings.count, stage.name)
    assert settings.prompts is not None  # a couple stage has one of the two
    prompts = Prompts(settings.prompts)
    for _ in prompts:
        pass
    return str(prompts) if prompts.dropped else None


def look_at_images(data: str, count: int, name: str) -> str | None:
    """How many images are taken and left out, if some are. Raises ConfigError if stage `name` wants more than that."""
    if data == DIGITS:
        from instaflow.digits.images import real_digits

        files, held = None, len(real_digits()[0])
    else:
        files = ImageFiles(data)
        held = sum(1 for _ in files)
    if held < count:
        held_at = f"'{data}' holds {held:,} images" if files is None else f"of '{data}', {files}"
        raise ConfigError(f"'stages.{name}.count' is {count:,}; {held_at}", "Each is inverted once: ask for no more")
    return str(files) if files and files.dropped else None


def look_at_perception(stage: StageFolder) -> None:
    """Raises DataError where a perceptual network to measure by is not there, but for what another stage makes."""
    settings = stage.stage
    if isinstance(settings, FlowStage | DmdStage | EvaluateStage) and (perceptual := settings.perceptual):
        check_perceptual(perceptual)
        if perceptual.network not in {*BACKBONES, *stage.stage_names}:
            check_network(Path(perceptual.network))


def run_stage(stage: StageFolder, stop: Stop) -> bool:
    """Run or resume one stage; False if it was done before. All processes of a launch come here together.

    A couple stage's folder is shared with other commands that work on it; any other stage's is held by one.
    """
    place = world.world()
    if world.as_any_sees(stop()):
        why = stop.signal or "another process was told to"
        raise Interrupted(f"Stopped before stage '{stage.name}' ({why})", f"To go on: {stage.command()}")
    if world.as_the_leader_sees(stage.is_done()):
        stage.check_identity()
        changes = changes_of(stage)
        if not world.as_the_leader_sees(bool(changes)):
            say(f"{stage.name}: done before, in {stage.folder}")
            return False
        say(f"{stage.name}: made anew, for {'; '.join(changes)}")
        if place.leads:
            (stage.folder / "done.json").unlink()
            stage.forget_stats(lambda line: False)  # its seconds were those of what it was
    module = importlib.import_module(f"pipelines.{module_of(stage.stage)}")
    if place.leads:
        with locked(stage.folder, shared=isinstance(stage.stage, CoupleStage)) as is_alone:
            if stage.is_done() and place.size == 1:  # by another command, a moment ago
                return run_stage(stage, stop)
            stage.begin()
            world.barrier()
            try:
                work(module, stage, stop)
            except BaseException as error:
                stopped = isinstance(error, Interrupted | KeyboardInterrupt)
                with suppress(OSError):  # the disk may be what failed
                    if is_alone():
                        reason = str(error) or type(error).__name__
                        stage.set_state("interrupted" if stopped else "failed", reason=reason)
                raise
            if is_alone() and not stage.is_done():
                stage.set_state("unfinished", reason="what is left belongs to other workers")
    else:
        world.barrier()
        stage.start_clock()
        work(module, stage, stop)
    world.barrier()
    return True


def module_of(stage: Stage) -> str:
    """Which module of this folder does a stage's work: that of its kind, or of its method."""
    method: str | None = getattr(stage, "method", None)
    kind: str = stage.kind  # type: ignore[attr-defined]
    return kind if method in (None, "instaflow", "latent") else method


def num_steps_of(stage: Stage) -> int:
    """The steps of a distill stage's student."""
    if isinstance(stage, ProgressiveStage):
        return stage.phases[-1].num_steps
    return stage.num_steps if isinstance(stage, DmdStage) else 1


def work(module: object, stage: StageFolder, stop: Stop) -> None:
    """The stage's own work, and its done mark when all processes have come to the end and nothing is left."""
    from instaflow.models.device import set_up_cpu

    set_up_cpu()
    fingerprint = module.run(stage, stop)  # type: ignore[attr-defined]
    world.barrier()
    if not world.world().leads:
        return
    content = fingerprint()
    if content is None:
        say(f"{stage.name}: what this worker had to make is made; other workers are not done yet")
    elif stage.finish(content, processes=world.world().size, hardware=world.hardware()):
        say(f"{stage.name}: done in {stage.seconds():,.0f} s")
    else:
        say(f"{stage.name}: done; another worker was the first to mark it so")


def say(line: str) -> None:
    if world.world().leads:
        print(line, flush=True)
