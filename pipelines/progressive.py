"""The distill stage by method progressive: a student of half the steps, again and again."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from instaflow.couplings.noise import coupled_noise
from instaflow.errors import ConfigError
from instaflow.evaluation.wording import steps
from instaflow.flow.views import EdmView, EpsilonView, View
from instaflow.interruption import Stop
from instaflow.models.model import Model
from instaflow.rundir import StageFolder
from instaflow.sections import HalvingPhase
from instaflow.training.draws import draws
from instaflow.training.loop import Job, as_tensors, train
from instaflow.training.progressive import HalvingLoss
from instaflow.training.start_checks import StartCheck, parity
from pipelines.exporting import settings_of
from pipelines.on_couplings import (
    FEW,
    Material,
    compile_networks,
    copied,
    describing,
    guided,
    mean_loss,
    open_parts,
    save_both,
    tell_checks,
    tell_maker,
    to_check,
)

CHECKED = 64  # samples that the first loss is measured on


def run(stage: StageFolder, stop: Stop) -> Callable[[], str]:
    """Halve the steps phase by phase, each a training with checkpoints of its own; write the last student.

    The data are the couplings' latents, with their prompts. A sample's noise is not the coupled one, from which the
    teacher's path to that latent is known, but drawn anew: it follows from seed, stage and the sample's position. The
    first teacher is guided and the students are not, so the first phase learns to halve the steps and to do without
    guidance at once; Meng et al. (arXiv 2210.03142) give the latter a stage of its own, for many scales.
    """
    settings, seen, guidance = stage.stage, 0, stage.stage.guidance_scale
    model, couplings = open_parts(stage)
    material = Material(model, couplings, model.view())
    check_grids(stage, material.view)
    if not couplings.manifest.data:  # real images are the method's own data, whoever inverted them
        tell_maker(stage, settings.couplings, couplings, settings.init)
    teacher = copied(model)
    if settings.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if settings.compile:
        compile_networks(stage, model, teacher)
    for phase in settings.phases:
        loss = HalvingLoss(model.unet, material.view, model.encode, guided(teacher, guidance), phase.num_steps)
        job = halving(stage, material, loss, phase, start=seen)
        if seen == 0 and to_check(stage):
            tell_checks(stage, first_checks(stage, model, job))
        model.unet.requires_grad_(True)
        trained = train(job, stage, stop)
        seen, guidance = seen + trained.samples_seen, 1.0
        weights = {name.removeprefix("unet."): value for name, value in trained.ema.items()}
        for network in (teacher.unet, model.unet):
            network.load_state_dict(weights)
    first, last = 2 * settings.phases[0].num_steps, settings.phases[-1].num_steps
    return save_both(
        stage,
        material,
        replace(trained, samples_seen=seen),
        settings_of(settings, model),
        summary=f"{steps(last)} by halving {first}, {seen:,} training samples with latents of {settings.couplings}",
    )


def halving(stage: StageFolder, material: Material, loss: HalvingLoss, phase: HalvingPhase, *, start: int) -> Job:
    """The training of one phase, whose samples begin at position `start` of the whole stage."""
    model, couplings = material.model, material.couplings
    describe = describing(couplings, stage.stage.couplings)

    def batch(position: int, size: int) -> tuple[Tensor, Tensor, list[str]]:
        records = couplings.batch(start + position, size)
        places = range(start + position, start + position + size)
        noise = coupled_noise(stage.seed, stage.name, places, model.latent_shape)
        fresh, data = as_tensors(model.device, noise, records.latent)
        return fresh, data, records.prompts

    return Job(
        name=phase.job,
        loss=loss,
        batch=batch,
        describe=lambda position, size: describe(start + position, size),
        phases=[phase],
        settings=stage.stage,
        by_time=loss.by_time,
    )


def first_checks(stage: StageFolder, model: Model, job: Job) -> list[StartCheck]:
    """What the first phase starts from: how its first teacher is read, and how far a copy of it is from the task."""
    numbers = draws(stage.seed, f"{stage.name}/start", 0, CHECKED)
    count, checks, losses = stage.stage.phases[0].num_steps, [], []
    for place in range(0, CHECKED, FEW):
        noise, data, prompts = job.batch(place, FEW)
        if place == 0 and isinstance(model.view(), EpsilonView):
            checks.append(parity(model, noise, prompts, stage.stage.guidance_scale))
        losses.append(mean_loss(job.loss, (noise, data, prompts, numbers[place : place + FEW])))
    said = f"first loss, of {steps(count)} against {2 * count} of its teacher"
    return [*checks, StartCheck(said, sum(losses) / len(losses), "falls in training: the student is still its teacher")]


def check_grids(stage: StageFolder, view: View) -> None:
    """Raises ConfigError where a student's grid is not every other point of its teacher's, or the last is no sampler's.

    Both hold for a velocity flow at any number of steps, and the first for no EDM.
    """
    if isinstance(view, EdmView):
        raise ConfigError(
            f"Stage '{stage.name}': '{stage.stage.init}' is an EDM, whose grid of N noise levels is not every other "
            "one of its grid of 2 N: method progressive can't halve it",
            "Distill it by method instaflow",
        )
    for index, phase in enumerate(stage.stage.phases):
        count = phase.num_steps
        if not torch.equal(view.grid(2 * count)[0][::2], view.grid(count)[0]):
            raise ConfigError(
                f"'stages.{stage.name}.phases.{index}': the timesteps of {steps(count)} are not every other one of "
                f"{2 * count}, for their places among 1000 are rounded",
                "Choose fewer steps, or another number of them, such as a divisor of 500",
            )
    if isinstance(view, EpsilonView) and 1000 % count:
        raise ConfigError(
            f"'stages.{stage.name}.phases.{index}': a diffusion is sampled by DDIM in strides of 1000 // {count} "
            "timesteps, which would stop short of the data",
            "Let the last phase have a divisor of 1000 for num_steps, such as 1, 2, 4, 5 or 8",
        )
