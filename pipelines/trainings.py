"""A stage's training as others see it: its checkpoints, the model that one of them is, what it cost so far."""

import errno
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from instaflow.files import NO_LINKS, remove_leftovers, write_file
from instaflow.methods import ProgressiveStage
from instaflow.models.loading import load_model
from instaflow.models.model import Model
from instaflow.models.stacked import stack
from instaflow.rundir import StageFolder
from instaflow.training.checkpoint import complete_checkpoints
from pipelines.exporting import scheduler_of, settings_of

PARTS = {"ema": "ema.safetensors", "raw": "model.safetensors"}
"""Which file of a checkpoint holds a model's weights."""


def jobs_of(training: StageFolder) -> list[tuple[str, int]]:
    """The names of a stage's trainings, one after the other, each with the samples that those before it saw."""
    if not isinstance(training.stage, ProgressiveStage):
        return [("", 0)]
    found, seen = [], 0
    for phase in training.stage.phases:
        found.append((phase.job, seen))
        seen += phase.seen
    return found


def checkpoints_of(training: StageFolder, weights: str) -> dict[int, Path]:
    """Each whole checkpoint's file of weights, "ema" or "raw", by the samples that the stage had seen."""
    return {
        before + int(folder.name): folder / PARTS[weights]
        for job, before in jobs_of(training)
        for folder in complete_checkpoints(training.folder / "checkpoints" / job)
    }


def hold(file: Path, place: Path) -> bool:
    """Keep a checkpoint's file at `place`, whoever removes it at its own; False where it is gone already.

    It is linked, which takes neither time nor room; where a store or its rights allow no links, copied.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(place)
    try:
        try:
            os.link(file, place)
        except FileExistsError:
            return True
        except OSError as error:
            if error.errno not in (*NO_LINKS, errno.EXDEV):
                raise
            with open(file, "rb") as content:
                write_file(place, iter(lambda: content.read(2**24), b""))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return False
        raise
    return True


def model_before(training: StageFolder, device: torch.device, dtype: torch.dtype = torch.float32) -> Model:
    """What a stage begins to train, but for a sign that it turns."""
    settings = training.stage
    model = load_model(training.locate(settings.init), device=device, dtype=dtype)
    if getattr(settings, "stacked", False):
        model.unet = stack(model.unet).to(model.dtype)
    return model


def model_at(training: StageFolder, file: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Model:
    """The model that the stage's folder would hold, had training ended with the weights in `file`."""
    model = model_before(training, device, dtype)
    weights = load_file(file)
    model.unet.load_state_dict({name.removeprefix("unet."): value for name, value in weights.items()})
    settings, scheduler = settings_of(training.stage, model), scheduler_of(training.stage, model)
    settings.class_names.extend(model.settings.class_names)
    model.settings, model.scheduler = settings, scheduler
    return model


def cost_at(training: StageFolder, samples: int) -> dict[str, Any]:
    """The updates up to a checkpoint, and the seconds, as the last line of figures before it tells them."""
    job, before = next((job, before) for job, before in reversed(jobs_of(training)) if before < samples)
    lines = [line for line in training.stats() if line.get("job") == job]
    seconds = [line["seconds"] for line in lines if line.get("samples_seen", samples) <= samples - before]
    updates, left = 0, samples
    for phase in training.stage.phases:
        here = min(left, phase.seen)
        updates, left = updates + here // phase.global_batch_size, left - here
    return {"updates": updates, "training_seconds": max(seconds, default=None)}
