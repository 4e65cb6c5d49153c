"""A rehearsal: a whole experiment with tiny models and a thousandth of everything, by the code that runs it in earnest.

A model that no stage makes (a hub name, a folder, a single file) is swapped for a tiny one of its architecture;
couplings that no stage makes are made by an added one.
"""

import math
import shlex
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from instaflow.config import Experiment, in_order, parse_stage
from instaflow.digits.tokenizer import build_tokenizer
from instaflow.errors import ConfigError, Interrupted
from instaflow.files import json_text, write_file
from instaflow.image_files import images_exist
from instaflow.interruption import Stop
from instaflow.methods import DmdStage
from instaflow.models.families import architecture_of
from instaflow.models.tiny import write_tiny
from instaflow.prompt_sources import choice_of, exists
from instaflow.rundir import read_done, stage_folders
from instaflow.sections import DIGITS, share_of
from instaflow.stages import NUM_SAMPLES, CoupleStage, EvaluateStage, FlowStage, Stage, TrainingStage
from instaflow.training.perceptual import write_tiny_network
from instaflow.world import barrier, world
from pipelines.experiment import check_inputs, run_stage, say
from pipelines.plan import Plan, check_crops

LESS = 1000
FEWEST_BATCHES = 2  # of a training phase, and of a couple stage
FEWEST_SHARDS, MOST_SHARDS = 2, 8
MOST_CHECKPOINTS = 4
MOST_STEPS = 50  # of a sampler
FEWEST_IMAGES = 128  # for a Fréchet distance
FEWEST_PATHS = 8
TINY_MICRO_BATCH = 256  # tiny networks take as long for few samples as for many
TOKENS = 77
MOST_DIGITS = 1000  # there are 1,797
PERCEPTUAL = "perceptual"
CAPTIONS = ["a lighthouse at dusk", "two cups of tea on a wooden table", "a red bicycle against a wall"]


@dataclass
class Rehearsal:
    """An experiment made small."""

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The stages', by name."""
    models: dict[str, Path] = field(default_factory=dict)
    """Where the tiny models go, by the place of what they stand for."""
    perceptual: bool = False
    """Whether a tiny perceptual network is wanted."""
    changes: list[str] = field(default_factory=list)
    """What is otherwise, in words; counts are not told."""

    def swap(self, place: str, folder: Path) -> str:
        """The tiny model that stands for the one at `place`."""
        if place not in self.models:
            self.models[place] = folder / ".tiny" / place.replace("/", "--")
            self.changes.append(f"a tiny random model of its format in place of '{place}'")
        return str(self.models[place])

    def add_couplings(self, name: str, model: str, prompts: list[str]) -> str:
        """The stage `name`, which makes some couplings of a model."""
        settings = {"kind": "couple", "model": model, "prompts": prompts, "num_steps": 2, "guidance_scale": 1.0}
        self.settings[name] = settings | {"count": 32, "records_per_shard": 16}
        return name

    def stages(self) -> dict[str, Stage]:
        return in_order({name: parse_stage(name, settings) for name, settings in self.settings.items()})


def run(experiment: Experiment, run_dir: str | None, stop: Stop) -> None:
    """Run the experiment's rehearsal; go on where it stopped. Raises what a run raises, and Interrupted."""
    folder = run_dir or f"{experiment.run.rstrip('/')}-rehearsal"
    made = rehearsal_of(experiment, Path(folder))
    if not made.settings:
        said = f"'{experiment.source}' has no stage to rehearse: of evaluations on real images tiny models say nothing"
        raise ConfigError(said, "Try an evaluation with few samples: --set stages.NAME.num_samples=50")
    check_crops(experiment)
    for name, settings in experiment.stages.items():
        if isinstance(settings, TrainingStage):
            for index, phase in enumerate(settings.phases):
                share_of(phase, settings.micro_batch_size, world().size, f"stages.{name}.phases.{index}")
    settle(Path(folder), made)
    architectures = {place: architecture_of(place) for place in made.models}
    say(f"A rehearsal of {experiment.source} in {folder}: every count is a thousandth, or the least that works")
    for line in made.changes:
        say(f"  {line}")
    if world().leads:
        tokenizer = build_tokenizer()
        tokenizer.model_max_length = TOKENS
        for place, architecture in architectures.items():
            write_tiny(made.models[place], architecture, tokenizer)
        if made.perceptual:
            write_tiny_network(Path(folder) / ".tiny" / PERCEPTUAL)
    barrier()
    stages = stage_folders(replace(experiment, run=folder, stages=made.stages()))
    check_inputs(stages)
    try:
        for stage in stages.values():
            run_stage(stage, stop)
    except Interrupted as error:
        words = ["instaflow", "rehearse", experiment.source, *(["--run-dir", run_dir] if run_dir else [])]
        words += [word for change in experiment.overrides for word in ("--set", change)]
        error.hint = f"To go on: {shlex.join(words)}"
        raise
    seconds = {name: read_done(stage.folder)["seconds"] for name, stage in stages.items()}
    say("")
    say(f"The rehearsal went well: {len(stages)} stages in {sum(seconds.values()):,.0f} s. It says nothing of quality.")
    width = max(map(len, stages))
    for name, stage in stages.items():
        say(f"  {name:<{width}}  {stage.stage.kind:<8}  {seconds[name]:>6,.1f} s")


def settle(folder: Path, made: Rehearsal) -> None:
    """Take the folder for this rehearsal: what another one left there is worth nothing and goes.

    Raises ConfigError if a stage lies there that no rehearsal made.
    """
    if not world().leads:
        return
    mark = folder / ".rehearsal.json"
    stages = [path.parent for path in folder.glob("*/stage.json")]
    if stages and not mark.is_file():
        raise ConfigError(
            f"'{folder}' holds a run, not a rehearsal: its stage '{stages[0].name}' would be in the way",
            "Choose another --run-dir, or none",
        )
    text = json_text(made.settings)
    if mark.is_file() and mark.read_text(encoding="utf-8") != text:
        for stage in stages:
            shutil.rmtree(stage)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(mark, text)


def rehearsal_of(experiment: Experiment, folder: Path) -> Rehearsal:
    """The experiment with tiny models and small counts, to be run in `folder`; nothing is written."""
    made = Rehearsal()
    for name, stage in experiment.stages.items():
        if isinstance(stage, EvaluateStage) and stage.of_images:
            made.changes.append(f"{name}: left out, for tiny models draw nothing that real images say anything about")
            continue
        settings = shrunk(stage.model_dump())
        outside = {key: place for key, place in stage.parents().items() if place not in experiment.stages}
        for key, place in outside.items():
            if key == "perceptual.network":
                continue
            if stage.parent_keys.get(key) == "couplings":
                added = f"{name}-{key.replace('.', '-')}"
                while added in experiment.stages:
                    added += "-"
                maker = "teacher" if isinstance(stage, DmdStage) else "init"
                put(
                    settings,
                    key,
                    made.add_couplings(added, settings[maker], made_up(experiment, stage.parents()[maker])),
                )
                made.changes.append(f"{name}: couplings of a tiny model in place of '{place}'")
            else:
                put(settings, key, made.swap(place, folder))
        if (
            isinstance(stage, FlowStage | DmdStage | EvaluateStage)
            and stage.perceptual
            and stage.perceptual.network not in experiment.stages
        ):
            settings["perceptual"] = {"network": str(folder / ".tiny" / PERCEPTUAL)}
            made.perceptual = True
            made.changes.append(f"{name}: a tiny random perceptual network in place of '{stage.perceptual.network}'")
        if isinstance(stage, EvaluateStage) and stage.reference.model in made.models:
            settings["reference"]["model"] = str(made.models[stage.reference.model])
        prompts = stage.prompts if isinstance(stage, CoupleStage | DmdStage) else None
        if prompts is not None and not isinstance(prompts, list) and not exists(prompts):
            made.changes.append(f"{name}: made-up captions, for '{choice_of(prompts).path}' is not here")
            settings["prompts"] = made_up(
                experiment, stage.teacher if isinstance(stage, DmdStage) else stage.parents()["model"]
            )
        if isinstance(stage, CoupleStage) and stage.data and not images_exist(stage.data):
            made.changes.append(f"{name}: digits in place of the images of '{stage.data}', which are not here")
            settings["data"] = DIGITS
            settings["count"] = min(settings["count"], MOST_DIGITS)
        if isinstance(stage, CoupleStage) and stage.output:
            made.changes.append(f"{name}: shards stay in the rehearsal's folder and do not go to {stage.output}")
            settings["output"] = None
        made.settings[name] = settings
    return made


def made_up(experiment: Experiment, model: str) -> list[str]:
    """Prompts that a model takes."""
    architecture = Plan(experiment, gpus=1).architecture(model)
    if not architecture.is_edm:
        return CAPTIONS
    return ["0"] if architecture.unet.get("num_class_embeds") else [""]


def shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """A stage's settings with each count a thousandth, or the least with which all of the code still has work.

    Global batches stay, and those of sampling; micro batches become larger where they are small. Where a fake score is
    trained as well, two updates of it and one batch a phase are enough.
    """
    small, batches = dict(settings), FEWEST_BATCHES
    if fake := settings.get("fake"):
        small["fake"], batches = fake | {"updates": min(fake["updates"], 2)}, 1
    for key in ("phases", "autoencoder_phases", "text_phases", "perceptual_phases"):
        if settings.get(key):
            small[key] = [shrunk_phase(phase, batches) for phase in settings[key]]
    if "phases" in settings:
        some = max(sum(phase["samples"] for phase in small["phases"]) // MOST_CHECKPOINTS, 1)
        for key in ("checkpoint_every", "keep_checkpoint_every"):
            small[key] = settings[key] and max(settings[key] // LESS, some)
    if settings.get("micro_batch_size"):
        shares = [phase["global_batch_size"] for phase in small["phases"]]
        small["micro_batch_size"] = max(settings["micro_batch_size"], math.gcd(TINY_MICRO_BATCH, *shares))
    if settings["kind"] == "couple":
        small["num_steps"] = min(settings["num_steps"], MOST_STEPS)
        small["count"] = less(settings["count"], FEWEST_BATCHES * settings["batch_size"])
        fewest, most = (-(-small["count"] // shards) for shards in (MOST_SHARDS, FEWEST_SHARDS))
        small["records_per_shard"] = min(settings["records_per_shard"], max(fewest, min(settings["batch_size"], most)))
    if settings["kind"] == "evaluate":
        small["num_samples"] = less(settings["num_samples"] or NUM_SAMPLES[settings["protocol"]], FEWEST_IMAGES)
        small["straightness_samples"] = less(settings["straightness_samples"], FEWEST_PATHS)
    return small


def shrunk_phase(phase: dict[str, Any], batches: int) -> dict[str, Any]:
    """With so many `batches` at least, and where that is one, no more."""
    least = batches * phase["global_batch_size"]
    samples = less(phase["samples"], least) if batches > 1 else least
    return phase | {"samples": samples, "warmup_samples": min(phase["warmup_samples"] // LESS, samples // 2)}


def less(count: int, least: int) -> int:
    """A thousandth of a count, but not less than `least`, unless the count is."""
    return max(count // LESS, min(count, least))


def put(settings: dict[str, Any], path: str, value: str) -> None:
    """Set what a dotted path names, `models.0.model`."""
    node: Any = settings
    *above, last = path.split(".")
    for key in above:
        node = node[int(key) if isinstance(node, list) else key]
    node[last] = value
