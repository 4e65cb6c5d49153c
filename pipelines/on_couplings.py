"""What reflow and distill share: a network, couplings, checks before the start, training, two model folders."""

import math
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instaflow.couplings.loader import Couplings
from instaflow.couplings.manifest import Manifest
from instaflow.couplings.mixture import Mixture
from instaflow.errors import ConfigError
from instaflow.files import fingerprint_of, write_json
from instaflow.flow.views import EpsilonView, VelocityView, View
from instaflow.interruption import Stop
from instaflow.models.device import device
from instaflow.models.export import save_model
from instaflow.models.loading import load_model
from instaflow.models.model import Model
from instaflow.models.samplers import flow_scheduler
from instaflow.models.sampling import compiling
from instaflow.models.settings import ModelSettings, read_settings
from instaflow.models.stacked import StackedUNet, stack
from instaflow.models.text_to_image import negate_output
from instaflow.models.vae import load_tiny
from instaflow.places import backbone_file
from instaflow.rundir import StageFolder
from instaflow.sections import BACKBONES, check_crop
from instaflow.training.draws import draws
from instaflow.training.loop import Job, Trained, as_tensors, train
from instaflow.training.losses import FlowLoss
from instaflow.training.perceptual import PerceptualDistance, load_lpips, load_network
from instaflow.training.progressive import Teacher
from instaflow.training.start_checks import StartCheck, coupling_distance, parity
from instaflow.world import world
from pipelines.previews import Previews

CHECK_SIZE = 256  # couplings that the checks before the start look at
FEW = 16  # of them are sampled
CHECKS = "start_checks.json"


@dataclass(frozen=True)
class Material:
    """What a stage trains: the initial model, its couplings, and the network's view as the stage will read it."""

    model: Model
    couplings: Couplings
    view: View
    mixture: Mixture | None = None
    """The couplings with real ones among them, which training sees in their place."""


def open_parts(stage: StageFolder) -> tuple[Model, Couplings]:
    """Load the initial model and open the couplings. Raises ConfigError if they do not go together."""
    settings = stage.stage
    model = load_model(stage.locate(settings.init), device=device())
    couplings = open_couplings(stage, settings.couplings, model)
    return model, couplings


def open_material(stage: StageFolder) -> Material:
    """What a flow's or a one-step student's stage trains. Raises ConfigError if its parts do not go together."""
    settings = stage.stage
    model, couplings = open_parts(stage)
    mixed = getattr(settings, "real", None)
    mixture = None
    if mixed:
        real = open_couplings(stage, mixed.couplings, model)
        mixture = Mixture(couplings, real, mixed.share, seed=stage.seed, stage=stage.name)
    own = model.settings.parametrization
    if own == "edm":
        check_edm(stage)
    if own == "velocity" and (settings.keeps_view or settings.negate_output_at_start):
        raise ConfigError(
            f"Stage '{stage.name}': '{settings.init}' is a velocity flow already",
            "Leave out parametrization and negate_output_at_start",
        )
    if settings.stacked:
        if isinstance(model.unet, StackedUNet):
            raise ConfigError(
                f"Stage '{stage.name}': '{settings.init}' is two U-Nets in series already", "Leave out stacked"
            )
        model.unet = stack(model.unet)
    view = model.view() if settings.keeps_view else VelocityView()
    return Material(model, couplings, view, mixture)


def check_edm(stage: StageFolder) -> None:
    """Raises ConfigError where a stage asks of an EDM's network what only a Stable Diffusion's can do."""
    settings = stage.stage
    where = f"Stage '{stage.name}': '{settings.init}' is an EDM"
    if settings.parametrization != "epsilon":
        raise ConfigError(
            f"{where}, whose network was told ln(σ) / 4, from -1.6 to 1.1, and can't read timesteps to 1000",
            "Write parametrization: epsilon, and it stays the EDM that it is",
        )
    for key, asked, needed in (
        ("negate_output_at_start", settings.negate_output_at_start, "false"),
        ("stacked", settings.stacked, "false"),
        ("guidance_scale", getattr(settings, "guidance_scale", 0) > 1, "1"),
    ):
        if asked:
            raise ConfigError(f"{where}, of which {key} knows nothing", f"Write {key}: {needed}")


def open_couplings(stage: StageFolder, place: str, model: Model) -> Couplings:
    """The couplings of a stage or folder. Raises ConfigError if their latents are not of the model's shape."""
    couplings = Couplings(Path(stage.locate(place)), stage.seed, stage.stage.loader_workers)
    if tuple(couplings.manifest.latent_shape) != model.latent_shape:
        raise ConfigError(
            f"Stage '{stage.name}': the couplings '{place}' hold latents of shape "
            f"{tuple(couplings.manifest.latent_shape)}, the model '{stage.stage.init}' makes {model.latent_shape}"
        )
    return couplings


def tell_maker(stage: StageFolder, place: str, couplings: Couplings, learned: str) -> None:
    """Print a warning where another model made the couplings than the one to learn from, or one that it came from.

    No error: the same weights have another fingerprint in a folder than by their hub name.
    """
    manifest = couplings.manifest
    if world().leads and manifest.model_fingerprint not in stage.ancestry(learned):
        print(
            f"{stage.name}: warning: the couplings '{place}' were made by another model ({manifest.model}) than "
            f"'{learned}', which this stage learns from, or any that it came from",
            flush=True,
        )


def open_distance(stage: StageFolder, model: Model) -> PerceptualDistance | None:
    """What the stage's perceptual losses measure by, if it has some.

    Raises ConfigError or DataError if its parts do not go together with each other or the model.
    """
    settings = stage.stage.perceptual
    if settings is None:
        return None
    channels, *sides = model.latent_shape
    check_crop(settings, min(sides), stage.name)
    if settings.network in BACKBONES:
        network = load_lpips(settings.network, backbone_file(settings))
    else:
        network = load_network(stage.locate_network(settings.network))
    vae = model.vae
    if settings.decoder and vae is None:
        raise ConfigError(
            f"Stage '{stage.name}': '{stage.stage.init}' makes pixels, which no decoder is for", "Leave it out"
        )
    if settings.decoder:
        vae = load_tiny(Path(settings.decoder), device=model.device)
        if vae.config.latent_channels != channels:
            raise ConfigError(
                f"Stage '{stage.name}': the decoder '{settings.decoder}' takes latents of "
                f"{vae.config.latent_channels} channels, and '{stage.stage.init}' makes {channels}"
            )
    if stage.stage.gradient_checkpointing and vae is not None:
        vae.enable_gradient_checkpointing()
    return PerceptualDistance(vae, network.to(model.device), settings.crop)


def prepare(stage: StageFolder, material: Material, make_loss: Callable[[View], FlowLoss]) -> FlowLoss:
    """The loss over the initial network with the sign that the stage asks for, measured, printed and stored first.

    `make_loss` builds the stage's loss for a view of the network. What is measured here is its squared error, whatever
    the phases' losses are.
    """
    model, manifest = material.model, material.couplings.manifest
    loss, own = make_loss(material.view), make_loss(model.view())
    check = to_check(stage)
    checks: list[StartCheck] = []
    if check:
        batch = material.couplings.batch(0, min(CHECK_SIZE, len(material.couplings)))
        noise, data = as_tensors(model.device, batch.noise, batch.latent)
        arguments = (noise, data, batch.prompts, draws(stage.seed, f"{stage.name}/start", 0, len(noise)))
        scale, prompts = manifest.guidance_scale, batch.prompts[:FEW]
        if isinstance(material.view, EpsilonView):
            checks.append(parity(model, noise[:FEW], prompts, scale))
        if not isinstance(material.view, VelocityView):
            checks.append(
                coupling_distance(
                    model, noise[:FEW], data[:FEW], prompts, num_steps=manifest.num_steps, guidance_scale=scale
                )
            )
        exact = mean_loss(own, arguments)
    if stage.stage.negate_output_at_start:
        negate_output(model.unet)
    if check:
        of_data = stage.stage.parametrization == "rectified-diffusion"  # its loss is, the others are of velocities
        zero = float((data if of_data else data - noise).square().mean())
        new = isinstance(material.view, VelocityView) and isinstance(model.view(), EpsilonView)
        expected = "high: a teacher's network does not answer with velocities yet" if new else "falls in training"
        checks.append(StartCheck("first loss", mean_loss(loss, arguments), expected))
        guess = f"loss of {'data' if of_data else 'a velocity'} of zero"
        checks.append(StartCheck(guess, zero, "a trained network is below"))
        checks.append(
            StartCheck("loss of the initial model's own velocity", exact, "where an exact reading would begin")
        )
        tell_checks(stage, checks)
    model.unet.requires_grad_(True)
    return loss


def to_check(stage: StageFolder) -> bool:
    """Whether this process is to measure what a stage starts from: once, before its first update."""
    return world().leads and not (stage.folder / CHECKS).exists()


def tell_checks(stage: StageFolder, checks: list[StartCheck]) -> None:
    """Print and store what was measured before the start."""
    if all(math.isfinite(entry.value) for entry in checks):  # else there is no training, and a next time
        write_json(stage.folder / CHECKS, [asdict(entry) for entry in checks])
    for entry in checks:
        print(f"{stage.name}: before the start, {entry.what}: {entry.value:.4g} ({entry.expected})", flush=True)


def mean_loss(loss: nn.Module, arguments: tuple[Any, ...]) -> float:
    with torch.no_grad():
        return float(loss(*arguments))


def train_on(stage: StageFolder, stop: Stop, material: Material, loss: FlowLoss, exported: ModelSettings) -> Trained:
    """Train the loss's network on the couplings, with previews of the model that will be `exported`."""
    settings, couplings = stage.stage, material.couplings
    if settings.gradient_checkpointing:
        material.model.unet.enable_gradient_checkpointing()
    if settings.compile:
        compile_networks(stage, material.model)

    def batch(position: int, size: int) -> tuple[Tensor, Tensor, list[str]]:
        records = (material.mixture or couplings).batch(position, size)
        noise, data = as_tensors(material.model.device, records.noise, records.latent)
        return noise, data, records.prompts

    describe_alone = describing(couplings, settings.couplings)

    def describe(position: int, size: int) -> str:
        if material.mixture is None:
            return describe_alone(position, size)
        spans = material.mixture.spans(position, size)
        places = [settings.couplings if span.couplings is couplings else settings.real.couplings for span in spans]
        told = zip(spans, places, strict=True)
        return " and ".join(describing(span.couplings, place)(span.position, span.size) for span, place in told)

    preview = settings.preview
    previews = Previews(stage, material.model, couplings, exported) if preview and world().leads else None
    job = Job(
        name="",
        loss=loss,
        batch=batch,
        describe=describe,
        phases=settings.phases,
        settings=settings,
        by_time=getattr(loss, "by_time", None),
        begin=loss.begin,
        preview_every=preview.every if preview else None,
        preview=previews,
    )
    return train(job, stage, stop)


def copied(model: Model) -> Model:
    """The model with a network of its own; text encoder and VAE are shared."""
    other = copy(model)
    other.unet = deepcopy(model.unet)
    return other


def guided(model: Model, guidance_scale: float) -> Teacher:
    """A model's network as a loss asks for it: one call, or two of which guidance is made."""

    def of(prompts: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
        text = model.conditioning(prompts, guidance_scale)
        return lambda x, timestep: model.guided(x, timestep, text, guidance_scale)

    return of


def compile_networks(stage: StageFolder, *models: Model) -> None:
    """Compile each model's network at its first call. Raises InstaFlowError where nothing can be compiled."""
    if world().leads:
        print(f"{stage.name}: compiling the network, which may take a minute or two", flush=True)
    with compiling(f"The network of '{models[0].name}'"):
        torch.compile(torch.sin)(torch.zeros(8, device=models[0].device))
    torch._dynamo.config.recompile_limit = 64  # networks of one class share it, and 8 were soon used up
    for model in models:
        model.unet.compile(dynamic=False)


def describing(couplings: Couplings, place: str) -> Callable[[int, int], str]:
    """The samples from a position on in words: of which shards of the couplings at `place` they are."""

    def describe(position: int, size: int) -> str:
        indices = couplings.batch(position, size).indices
        shards = sorted({int(index) // couplings.manifest.records_per_shard for index in indices})
        many = "s" if shards[1:] else ""
        return f"records of shard{many} {', '.join(f'{shard:05d}' for shard in shards)} of '{place}'"

    return describe


def save_both(
    stage: StageFolder, material: Material, trained: Trained, settings: ModelSettings, summary: str
) -> Callable[[], str]:
    """Write model/ (EMA) and model-raw/; the content's fingerprint is asked for when all processes are done."""
    model = material.model
    entry = {"stage": stage.name, "kind": stage.stage.kind, "summary": summary, "samples_seen": trained.samples_seen}
    made_by = lineage_behind(stage, stage.stage.couplings, material.couplings)
    sources = [material.couplings, *([material.mixture.real] if material.mixture else [])]
    settings = replace(settings, lineage=lineage_of(model.settings.lineage, made_by, sources, entry))
    return write_both(stage, model, trained, settings, flow_scheduler(settings.parametrization, model.scheduler))


def lineage_behind(stage: StageFolder, place: str, couplings: Couplings) -> list[dict[str, Any]]:
    """The lineage of the model that made the couplings at `place`; empty where it isn't here."""
    folder = Path(stage.locate(place)).absolute() / couplings.manifest.model
    return read_settings(folder).lineage if folder.is_dir() else []


def lineage_of(
    before: list[dict[str, Any]], more: list[dict[str, Any]], sources: list[Couplings], entry: dict[str, Any]
) -> list[dict[str, Any]]:
    """The stages from the teacher to a model: its `init`'s, those of what else it learned from, couplings, its own."""
    coupled = [couple_entry(source.manifest) for source in sources]
    found: list[dict[str, Any]] = []
    for item in (*before, *more, *coupled, entry):
        if item not in found:
            found.append(item)
    return found


def write_both(
    stage: StageFolder, model: Model, trained: Trained, settings: ModelSettings, scheduler: Any
) -> Callable[[], str]:
    """The leader's: model/ and model-raw/ of what was trained, with the sampler that they carry."""
    settings = replace(settings, class_names=model.settings.class_names)
    if world().leads:
        for name, weights in (("model-raw", trained.raw), ("model", trained.ema)):
            model.unet.load_state_dict({key.removeprefix("unet."): value for key, value in weights.items()})
            save_model(
                stage.folder / name,
                **model.parts,
                scheduler=scheduler,
                settings=replace(settings, weights="ema" if name == "model" else "raw"),
            )
    return lambda: fingerprint_of(stage.model)


def couple_entry(manifest: Manifest) -> dict[str, str]:
    """A couple stage in a model's lineage."""
    what = "real images inverted" if manifest.data else "couplings"
    summary = f"{manifest.count:,} {what}, {manifest.num_steps} steps, guidance {manifest.guidance_scale:g}"
    return {"stage": manifest.stage, "kind": "couple", "summary": summary}
