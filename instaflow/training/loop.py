"""The training loop, the same for every stage that trains a network: progress is counted in samples."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from instaflow.errors import InstaFlowError, Interrupted
from instaflow.interruption import Stop
from instaflow.progress import Progress
from instaflow.rundir import StageFolder
from instaflow.sections import Phase, share_of
from instaflow.stages import TrainingStage
from instaflow.training.checkpoint import (
    CRITIC,
    PARTS,
    complete_checkpoints,
    damaged,
    load_checkpoint,
    save_checkpoint,
)
from instaflow.training.draws import draws
from instaflow.training.engine import Engine
from instaflow.training.figures import Figures, LossByTime, Means
from instaflow.training.trackers import Trackers
from instaflow.world import as_any_sees, barrier, world

LOG_LINES = 200  # in stats.jsonl, for one training run


@dataclass(frozen=True)
class Critic:
    """A second network, trained by an optimizer of its own before each update of the first (DMD's fake score)."""

    loss: nn.Module
    """As `Job.loss`."""
    batch: Callable[[int, int], tuple[Any, ...]]
    """As `Job.batch`; its positions count the critic's own samples."""
    describe: Callable[[int, int], str]
    """As `Job.describe`, at such positions."""
    updates: int
    """Each by a global batch as large as the first network's."""
    learning_rate_scale: float
    """Its learning rate in units of the first network's."""
    at_times: nn.Module | None = None
    """The part of `loss` that takes no step while its attribute `rests` is set."""


@dataclass(frozen=True)
class Job:
    """What is trained, on what, how."""

    name: str
    """Beside the stage's name, what the progress line says and the checkpoints' folder is called."""
    loss: nn.Module
    """Its parameters are trained; its forward takes `*batch, draws` to a scalar, the batch's mean loss."""
    batch: Callable[[int, int], tuple[Any, ...]]
    """The samples from a position on: (position, size) to the loss's arguments. Positions count over epochs."""
    describe: Callable[[int, int], str]
    """The samples from a position on in words, for the message of a loss that is not finite."""
    phases: Sequence[Phase]
    settings: TrainingStage
    """Everything else, as the experiment says it."""
    by_time: LossByTime | None = None
    """Where the loss notes its samples' losses by time, if it does."""
    means: Sequence[Means] = ()
    """Where the losses note what they are made of."""
    critic: Critic | None = None
    begin: Callable[[Any], None] | None = None
    """Told each phase as it begins, and as the training goes on in it."""
    preview_every: int | None = None
    """Samples between two previews, the last of them at the end; None for no previews."""
    preview: Callable[[dict[str, Tensor], int], Mapping[str, float | None]] | None = None
    """The leader's: (moving average of `loss`'s state dict, samples seen) to the figures of a preview."""


@dataclass(frozen=True)
class Trained:
    """The outcome: state dicts of `Job.loss`."""

    ema: dict[str, Tensor]
    raw: dict[str, Tensor]
    samples_seen: int


@dataclass(frozen=True)
class Span:
    """A phase's place in the whole: [start, end) in samples, in whole global batches."""

    phase: Phase
    start: int
    end: int
    micro_batch_size: int

    def learning_rate(self, position: int) -> float:
        """Warm-up from zero, then constant or a half cosine down to zero at the phase's end."""
        done = position - self.start
        rate = self.phase.learning_rate
        if done < self.phase.warmup_samples:
            return (
                rate
                * (done + self.phase.global_batch_size)
                / (self.phase.warmup_samples + self.phase.global_batch_size)
            )
        if self.phase.schedule == "constant":
            return rate
        rest = (done - self.phase.warmup_samples) / max(1, self.end - self.start - self.phase.warmup_samples)
        return rate * 0.5 * (1 + math.cos(math.pi * rest))


def spans_of(phases: Sequence[Phase], micro_batch_size: int | None, processes: int) -> list[Span]:
    """Where each phase begins and ends. Raises ConfigError if a global batch cannot be shared out."""
    spans: list[Span] = []
    for index, phase in enumerate(phases):
        micro = share_of(phase, micro_batch_size, processes, f"phases.{index}")
        start = spans[-1].end if spans else 0
        spans.append(Span(phase, start, start + phase.seen, micro))
    return spans


def train(job: Job, folder: StageFolder, stop: Stop) -> Trained:
    """Train to the end of the last phase, from the newest checkpoint if there is one.

    A resumed run makes the same numbers as one that never stopped, and on any number of processes the same up to
    rounding. Raises Interrupted after saving when `stop` is set, InstaFlowError if a loss is not finite.
    """
    place = world()
    label = f"{folder.name} {job.name}".strip()
    checkpoints = folder.folder / "checkpoints" / job.name
    spans = spans_of(job.phases, job.settings.micro_batch_size, place.size)
    total = spans[-1].end

    # State
    saved, position, told = load_checkpoint(checkpoints), 0, None
    try:
        if saved:
            job.loss.load_state_dict(saved.model)
            position, told = saved.state["samples_seen"], saved.state
            if job.critic:
                job.critic.loss.load_state_dict(saved.critic[0])
        batch = spans[0].micro_batch_size, spans[0].phase.global_batch_size
        engine = Engine(job.loss, job.settings, batch)
        critic = Engine(job.critic.loss, job.settings, batch, job.critic.at_times) if job.critic else None
        if saved:
            engine.load(saved.ema, saved.state["ema_updates"], saved.optimizer)
        if saved and critic:
            critic.load(saved.critic[1], saved.state["critic_ema_updates"], saved.critic[2])
    except (IndexError, KeyError, RuntimeError, TypeError) as error:
        if saved is None:
            raise
        lacks = "critic-model.safetensors" if isinstance(error, IndexError) else error
        raise damaged(saved.folder, f"it lacks {lacks}" if isinstance(error, LookupError) else str(error)) from error
    del saved
    if place.leads:
        folder.forget_stats(lambda line: line.get("job") != job.name or line.get("samples_seen", 0) <= position)
    last_saved = position

    def save() -> None:
        nonlocal last_saved
        if position > last_saved:
            state = {"samples_seen": position, "ema_updates": engine.ema.updates, **figures.state()}
            parts = dict(zip(PARTS, engine.parts(), strict=True))
            if critic:
                state["critic_ema_updates"] = critic.ema.updates
                parts |= dict(zip(CRITIC, critic.parts(), strict=True))
            if place.leads:
                keep, every = job.settings.keep_checkpoints, job.settings.keep_checkpoint_every
                save_checkpoint(checkpoints, parts, state, keep=keep, keep_every=every)
            else:
                for part in parts.values():
                    deque(part, maxlen=0)  # every process takes part in the gathering
            barrier()  # a launcher ends them all when the first one leaves, and the leader may still be writing
        last_saved = position

    # Steps
    job.loss.train()
    if job.critic:
        job.critic.loss.train()
    with (
        Progress(label, total=total, start=position, unit="samples", quiet=not place.leads) as progress,
        Trackers(job.settings.trackers if place.leads else (), folder.folder, job.name, position) as trackers,
    ):
        figures = Figures(job.by_time, told, job.means)
        for span in spans:
            if position >= span.end:
                continue
            size = span.phase.global_batch_size
            for each in filter(None, (engine, critic)):
                each.set_batch(span.micro_batch_size, size)
            if job.begin:
                job.begin(span.phase)
            log_every = max(1, (span.end - span.start) // size * len(spans) // LOG_LINES) * size
            while position < span.end:
                if as_any_sees(stop()):  # all leave at the same step
                    save()
                    why = stop.signal or "another process was told to"
                    raise Interrupted(
                        f"Stage '{label}' stopped at {position:,} of {total:,} samples ({why}); saved",
                        f"To go on: {folder.command()}",
                    )
                rate = span.learning_rate(position)
                if job.critic and critic:
                    critic_norm = train_critic(job, job.critic, critic, folder, span, position, checkpoints)
                numbers = draws(folder.seed, f"{folder.name}/{job.name}", position, size)
                loss = take_gradient(engine, job.batch, numbers, span, position)
                if not math.isfinite(loss):
                    fail(label, f"loss is {loss}", position, job.describe(position, size), checkpoints)
                gradient_norm = engine.step(rate)
                if not math.isfinite(gradient_norm):
                    found = f"gradient's norm is {gradient_norm}"
                    fail(label, found, position, job.describe(position, size), checkpoints)
                position += size
                figures.add(loss, size)
                progress.update(position, loss=figures.loss)

                # Report
                if (position - span.start) % log_every == 0 or position == span.end:
                    line = {
                        **figures.take(),
                        "gradient_norm": gradient_norm,
                        "learning_rate": rate,
                        "ema_distance": engine.ema_distance(),
                        "skipped_steps": engine.deepspeed.skipped_steps,
                    }
                    if critic:
                        line["critic_gradient_norm"] = critic_norm
                    if place.leads:
                        folder.log(job=job.name, samples_seen=position, phase=spans.index(span), **line)
                        trackers.log(position, line)

                # Preview
                every = job.preview_every
                if every and (position // every > (position - size) // every or position == total):
                    averages = {name: value.cpu() for name, value in engine.averages() if place.leads}
                    if job.preview:
                        seen = job.preview(averages, position)
                        folder.log(job=job.name, samples_seen=position, **seen)
                        trackers.log(position, dict(seen))
                    del averages
                    barrier()  # the others have nothing to do until the leader is back

                # Checkpoint
                if position - last_saved >= job.settings.checkpoint_every or position == total:
                    save()
    barrier()
    raw, ema = (
        {name: value.to("cpu", copy=True) for name, value in part} for part in (engine.weights(), engine.averages())
    )
    for each in filter(None, (engine, critic)):
        each.close()
    return Trained(ema, raw, position)


def train_critic(
    job: Job, critic: Critic, engine: Engine, folder: StageFolder, span: Span, position: int, checkpoints: Path
) -> float:
    """The critic's updates before the first network's at `position`; the gradient's last norm."""
    size, label, norm = span.phase.global_batch_size, f"{folder.name} {job.name}".strip(), 0.0
    for update in range(critic.updates):
        place = position * critic.updates + update * size
        numbers = draws(folder.seed, f"{folder.name}/{job.name}/critic", place, size)
        loss = take_gradient(engine, critic.batch, numbers, span, place)
        if not math.isfinite(loss):
            fail(label, f"critic's loss is {loss}", position, critic.describe(place, size), checkpoints)
        norm = engine.step(span.learning_rate(position) * critic.learning_rate_scale)
        if not math.isfinite(norm):
            fail(label, f"critic's gradient norm is {norm}", position, critic.describe(place, size), checkpoints)
    return norm


def take_gradient(
    engine: Engine, batch: Callable[[int, int], tuple[Any, ...]], numbers: np.ndarray, span: Span, position: int
) -> float:
    """Accumulate the gradient of the global batch at `position`; its mean loss over all processes."""
    place, size, micro = world(), span.phase.global_batch_size, span.micro_batch_size
    share = size // place.size
    losses = []
    end = (place.rank + 1) * share
    for start in range(place.rank * share, end, micro):
        arguments = batch(position + start, micro)
        losses.append(engine.accumulate(*arguments, numbers[start : start + micro], last=start + micro == end))
    mean = torch.stack(losses).mean().cpu()
    if place.size > 1:
        dist.all_reduce(mean)
        mean /= place.size
    return float(mean)


def fail(label: str, found: str, position: int, samples: str, checkpoints: Path) -> None:
    """Stop on a loss or gradient of these samples that is not finite: no good checkpoint is written over."""
    good = complete_checkpoints(checkpoints)
    last = f"the last good checkpoint is '{good[-1]}'" if good else "there is no checkpoint yet"
    raise InstaFlowError(
        f"Stage '{label}': the {found} at {position:,} samples, on {samples}; {last}",
        "A lower learning_rate or a longer warmup_samples usually helps; `instaflow verify` checks the data",
    )


def as_tensors(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """Arrays as float32 tensors on a device."""
    return [torch.from_numpy(array).to(device, torch.float32) for array in arrays]
