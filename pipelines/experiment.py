"""Which stages run, in which order, and what is said about those that wait."""

import importlib

from instaflow import world
from instaflow.config import Experiment, nearest
from instaflow.errors import ConfigError, InstaFlowError, Interrupted
from instaflow.interruption import listening
from instaflow.rundir import StageFolder, locked, stage_folders


def run_all(experiment: Experiment) -> None:
    """Run every stage that is not done, in order."""
    stages = stage_folders(experiment)
    check_inputs(stages)
    for stage in stages.values():
        run_stage(stage)


def run_kind(experiment: Experiment, kind: str) -> None:
    """Run the stages of one kind whose parents are done. Raises InstaFlowError if nothing could run and some wait."""
    stages = stage_folders(experiment)
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
            ran = run_stage(stage) or ran
    if waiting and not ran:
        raise InstaFlowError("; ".join(waiting.values()), run_first(experiment, stages, next(iter(waiting))))
    for line in waiting.values():
        say(line)


def run_one(experiment: Experiment, kind: str, name: str) -> None:
    """Run one stage. Raises InstaFlowError if a parent is not done."""
    stages = stage_folders(experiment)
    if name not in stages:
        raise ConfigError(f"'{experiment.source}' has no stage '{name}'", nearest(name, stages))
    stage = stages[name]
    if stage.stage.kind != kind:
        raise ConfigError(f"Stage '{name}' is of kind '{stage.stage.kind}'", f"Run: {stage.command()}")
    check_inputs({name: stage})
    missing = missing_parents(experiment, stages, name)
    if missing:
        message = f"Stage '{name}' builds on '{missing[0]}', which is not done"
        raise InstaFlowError(message, run_first(experiment, stages, name))
    run_stage(stage)


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
    """Look at everything outside the run that stages will need, before the first of them starts."""
    from instaflow.couplings.prompts import read_prompts

    for stage in stages.values():
        if stage.stage.kind == "couple" and not stage.is_done():
            read_prompts(stage.stage.prompts)


def run_stage(stage: StageFolder) -> bool:
    """Run or resume one stage; False if it was done before. All processes of a launch come here together."""
    place = world.world()
    if stage.is_done():
        stage.check_identity()
        say(f"{stage.name}: done before, in {stage.folder}")
        return False
    module = importlib.import_module(f"pipelines.{stage.stage.kind}")
    if place.leads:
        with locked(stage.folder):
            stage.begin()
            world.barrier()
            try:
                work(module, stage)
            except BaseException as error:
                stopped = isinstance(error, Interrupted | KeyboardInterrupt)
                stage.set_state("interrupted" if stopped else "failed", reason=str(error) or type(error).__name__)
                raise
    else:
        world.barrier()
        stage.start_clock()
        work(module, stage)
    world.barrier()
    return True


def work(module: object, stage: StageFolder) -> None:
    """The stage's own work, and its done mark when all processes have come to the end."""
    from instaflow.models.device import set_up_cpu

    set_up_cpu()
    with listening() as stop:
        fingerprint = module.run(stage, stop)  # type: ignore[attr-defined]
    world.barrier()
    if world.world().leads:
        stage.finish(fingerprint())
        say(f"{stage.name}: done in {stage.seconds():,.0f} s")


def say(line: str) -> None:
    if world.world().leads:
        print(line, flush=True)
