"""The distill stage by method dmd: a generator whose images are distributed as its teacher's."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch

from instaflow.couplings.loader import Couplings
from instaflow.couplings.noise import coupled_noise
from instaflow.errors import ConfigError
from instaflow.evaluation.wording import steps
from instaflow.flow.views import EdmView, EpsilonView
from instaflow.interruption import Stop
from instaflow.models.device import device
from instaflow.models.loading import load_model
from instaflow.models.model import Model
from instaflow.models.pixels import PixelModel
from instaflow.models.settings import ModelSettings
from instaflow.models.stacked import StackedUNet
from instaflow.prompt_sources import Prompts
from instaflow.rundir import StageFolder
from instaflow.training.dmd import Discriminator, FakeScoreLoss, Generator, MatchingLoss
from instaflow.training.draws import draws
from instaflow.training.loop import Critic, Job, as_tensors, train
from instaflow.training.start_checks import StartCheck, parity
from instaflow.world import world
from pipelines.exporting import scheduler_of, settings_of
from pipelines.on_couplings import (
    FEW,
    compile_networks,
    copied,
    describing,
    guided,
    lineage_behind,
    lineage_of,
    mean_loss,
    open_couplings,
    open_distance,
    tell_checks,
    tell_maker,
    to_check,
    write_both,
)
from pipelines.previews import Previews


@dataclass(frozen=True)
class Parts:
    """What the stage works with."""

    generator: Model
    teacher: Model
    fake: Model
    """The teacher once more, to be trained."""
    prompts: list[str]
    pairs: Couplings | None
    """The regression's."""
    real: Couplings | None
    """The discriminator's."""


def run(stage: StageFolder, stop: Stop) -> Callable[[], str]:
    """Train generator and fake score in turns; write the generator with EMA and raw weights.

    A sample's noise and prompt, the noise and the time at which its data are judged, all follow from seed, stage and
    the sample's position.
    """
    settings = stage.stage
    parts = open_parts(stage)
    model, fake = parts.generator, parts.fake
    if parts.pairs:
        tell_maker(stage, settings.regression.couplings, parts.pairs, settings.teacher)
    for network in (model.unet, fake.unet) if settings.gradient_checkpointing else ():
        network.enable_gradient_checkpointing()
    if settings.compile:
        compile_networks(stage, model, parts.teacher, fake)
    matching, fake_score = make_losses(stage, parts)
    exported = settings_of(settings, model)
    job = make_job(stage, parts, matching, fake_score, exported)
    if to_check(stage):
        tell_checks(stage, first_checks(stage, parts, job))
    model.unet.requires_grad_(True)
    fake.unet.requires_grad_(True)
    trained = train(job, stage, stop)
    summary = (
        f"{steps(settings.num_steps)} by matching {settings.teacher} at guidance {settings.guidance_scale:g}, "
        f"{trained.samples_seen:,} training samples"
    )
    entry = {"stage": stage.name, "kind": "distill", "summary": summary, "samples_seen": trained.samples_seen}
    sources = [couplings for couplings in (parts.pairs, parts.real) if couplings]
    taught = parts.teacher.settings.lineage
    if parts.pairs:
        taught = [*taught, *lineage_behind(stage, settings.regression.couplings, parts.pairs)]
    lineage = lineage_of(model.settings.lineage, taught, sources, entry)
    scheduler = scheduler_of(settings, model)
    return write_both(stage, model, trained, replace(exported, lineage=lineage), scheduler)


def open_parts(stage: StageFolder) -> Parts:
    """Load networks and couplings. Raises ConfigError or DataError if they do not go together."""
    settings = stage.stage
    model = load_model(stage.locate(settings.init), device=device())
    if settings.teacher == settings.init:
        teacher = copied(model)
    else:
        teacher = load_model(stage.locate(settings.teacher), device=device())
    if teacher.latent_shape != model.latent_shape:
        raise ConfigError(
            f"Stage '{stage.name}': the teacher '{settings.teacher}' makes latents of shape {teacher.latent_shape}, "
            f"'{settings.init}' {model.latent_shape}",
            "Let init be the teacher, or a student of it",
        )
    if settings.num_steps > 1 and not isinstance(model.view(), EpsilonView):
        kind = "an EDM" if isinstance(model.view(), EdmView) else "a velocity flow"
        raise ConfigError(
            f"Stage '{stage.name}': '{settings.init}' is {kind}, and diffusers has no sampler that adds noise between "
            "the steps of such a one",
            "Choose num_steps: 1, or a Stable Diffusion for init",
        )
    if settings.guidance_scale > 1 and isinstance(teacher.view(), EdmView):
        raise ConfigError(
            f"Stage '{stage.name}': '{settings.teacher}' is an EDM, of which guidance_scale knows nothing",
            "Write guidance_scale: 1",
        )
    if teacher.settings.kind == "student":
        raise ConfigError(
            f"Stage '{stage.name}': '{settings.teacher}' is a student, which knows the data behind noise at its own "
            "timesteps alone, and matching asks at all of them",
            "Choose the teacher that it was distilled from",
        )
    if settings.gan and (isinstance(teacher.unet, StackedUNet) or teacher.unet.mid_block is None):
        held = "two U-Nets in series" if isinstance(teacher.unet, StackedUNet) else "a U-Net without one"
        raise ConfigError(
            f"Stage '{stage.name}': the discriminator reads a U-Net's bottleneck, and '{settings.teacher}' is {held}",
            "Leave out gan, or choose another teacher",
        )
    prompts = list(Prompts(settings.prompts))
    for asked in (model, teacher):
        if isinstance(asked, PixelModel):
            for prompt in dict.fromkeys(prompts):
                asked.number_of(prompt)  # raises DataError for one that is no class
    pairs, real = (
        open_couplings(stage, settings.sections[key], model) if key in settings.sections else None
        for key in ("regression.couplings", "gan.real")
    )
    return Parts(model, teacher, copied(teacher), prompts, pairs, real)


def make_losses(stage: StageFolder, parts: Parts) -> tuple[MatchingLoss, FakeScoreLoss]:
    """The generator's and the fake score's, each of which asks the other's network."""
    settings, model, teacher, fake = stage.stage, parts.generator, parts.teacher, parts.fake
    gan, discriminator = settings.gan, None
    if gan:
        config = fake.unet.config
        torch.manual_seed(stage.seed)
        discriminator = Discriminator(config.block_out_channels[-1], config.norm_num_groups).to(fake.device)
    score_view = teacher.view()
    fake_score = FakeScoreLoss(
        fake.unet,
        score_view,
        fake.encode,
        lambda noise, numbers: matching.generate(noise, numbers),
        discriminator,
        weight=gan.fake_weight if gan else 0.0,
    )
    matching = MatchingLoss(
        Generator(model.unet, model.view(), model.encode, settings.num_steps),
        prompts=parts.prompts,
        view=score_view,
        real=guided(teacher, settings.guidance_scale),
        fake=guided(fake, 1.0),
        noise_range=settings.noise_range,
        regression=settings.regression,
        distance=open_distance(stage, model),
        judged=fake_score.judged if gan else None,
        gan_weight=gan.weight if gan else 0.0,
    )
    return matching, fake_score


def make_job(
    stage: StageFolder, parts: Parts, matching: MatchingLoss, fake_score: FakeScoreLoss, exported: ModelSettings
) -> Job:
    """The training of both."""
    settings, model, pairs, real = stage.stage, parts.generator, parts.pairs, parts.real
    share = settings.regression.exact_share if pairs else 0
    describe_pairs = describing(pairs, settings.regression.couplings) if pairs else None
    describe_real = describing(real, settings.gan.real) if real else None

    def noise_of(name: str, position: int, size: int) -> Any:
        shape = (settings.num_steps + 1, *model.latent_shape)
        return coupled_noise(stage.seed, name, range(position, position + size), shape)

    def of_pairs(position: int, size: int) -> tuple[int, int]:
        first = int(position * share)
        return first, int((position + size) * share) - first

    def batch(position: int, size: int) -> tuple[Any, ...]:
        (noise,) = as_tensors(model.device, noise_of(stage.name, position, size))
        if pairs is None or not matching.takes_pairs:
            return noise, None, None, []
        records = pairs.batch(*of_pairs(position, size))
        return noise, *as_tensors(model.device, records.noise, records.latent), records.prompts

    def critic_batch(position: int, size: int) -> tuple[Any, ...]:
        (noise,) = as_tensors(model.device, noise_of(f"{stage.name}/fake", position, size))
        if real is None or not fake_score.takes_real:
            return noise, None, []
        records = real.batch(position, size)
        return noise, *as_tensors(model.device, records.latent), records.prompts

    def describe(position: int, size: int) -> str:
        said = f"the prompts and noise of samples {position:,} to {position + size - 1:,}"
        told = describe_pairs if matching.takes_pairs else None
        return f"{said}, {told(*of_pairs(position, size))}" if told else said

    def describe_critic(position: int, size: int) -> str:
        said = f"the generator's data of the fake score's samples {position:,} to {position + size - 1:,}"
        told = describe_real if fake_score.takes_real else None
        return f"{said}, {told(position, size)}" if told else said

    def begin(phase: Any) -> None:
        matching.begin(phase)
        if fake_score.discriminator:
            fake_score.discriminator.rests = not matching.gan_weight

    preview = settings.preview
    previews = Previews(stage, model, pairs, exported) if preview and pairs and world().leads else None
    critic = Critic(
        fake_score,
        critic_batch,
        describe_critic,
        settings.fake.updates,
        settings.fake.learning_rate_scale,
        at_times=fake_score.discriminator,
    )
    return Job(
        name="",
        loss=matching,
        batch=batch,
        describe=describe,
        phases=settings.phases,
        settings=settings,
        means=[matching.means, fake_score.means],
        critic=critic,
        begin=begin,
        preview_every=preview.every if preview else None,
        preview=previews,
    )


def first_checks(stage: StageFolder, parts: Parts, job: Job) -> list[StartCheck]:
    """How the teacher is read, and what both networks begin with."""
    assert job.critic
    size = max(FEW, ceil(1 / stage.stage.regression.exact_share)) if parts.pairs else FEW  # with a pair at least
    numbers = draws(stage.seed, f"{stage.name}/start", 0, size)
    arguments, checks = job.batch(0, size), []
    if isinstance(parts.teacher.view(), EpsilonView):
        prompts = [parts.prompts[place % len(parts.prompts)] for place in range(FEW)]
        checks.append(parity(parts.teacher, arguments[0][:FEW, 0], prompts, stage.stage.guidance_scale))
    first, fake = (
        mean_loss(loss, (*given, numbers))
        for loss, given in ((job.loss, arguments), (job.critic.loss, job.critic.batch(0, size)))
    )
    checks.append(StartCheck("first loss of the generator", first, "the sum of its terms, reported only"))
    checks.append(StartCheck("first loss of the fake score", fake, "falls as it gets to know the generator"))
    return checks
