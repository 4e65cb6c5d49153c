"""What an experiment will cost, stage by stage, before any of it runs: no weights are read, and no network is asked."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import nn

from instaflow.config import Experiment
from instaflow.cost import (
    PAPER_DAYS,
    Memory,
    Record,
    checkpoint_bytes,
    num_checkpoints,
    shards_bytes,
    training_memory,
)
from instaflow.digits.captions import WORDS
from instaflow.digits.data import DATA
from instaflow.digits.images import SIZE
from instaflow.digits.networks import (
    PERCEPTUAL,
    build_autoencoder,
    build_pixel_unet,
    build_text_encoder,
    build_unet,
)
from instaflow.digits.stream import ClassifierLoss
from instaflow.digits.tokenizer import build_tokenizer
from instaflow.methods import DistillStage, DmdStage, ProgressiveStage
from instaflow.models.architecture import Architecture, backward_memory, flops_of, num_parameters, read_config
from instaflow.models.families import SD1, architecture_of
from instaflow.models.loading import DTYPES
from instaflow.models.samplers import NOISY
from instaflow.sections import BACKBONES, PERCEPTUAL_LOSSES, FlowPhase, Phase, check_crop, share_of
from instaflow.stages import (
    CoupleStage,
    EdmTeacherStage,
    EvaluateStage,
    FlowStage,
    NetworkStage,
    ReflowStage,
    TeacherStage,
)
from instaflow.training.dmd import Discriminator, bottleneck
from instaflow.training.perceptual import TAPS, PerceptualDistance, PerceptualNetwork, backbone, small_layers
from pipelines.plan_tables import Cost, table_of_days, table_of_memory, table_of_stages
from pipelines.previews import BATCH as PREVIEWED

INCEPTION_BYTES = 4 * 2048  # an image's features
BACKWARD = 2  # a backward pass counts as two forward passes, and gradient checkpointing as a third
DECODED = 8  # images at a time, where they are kept or shown
DECODINGS = 3  # a coupled latent, and a student's there and back; of a flow the perceptual network is not counted


def run(experiment: Experiment, *, gpus: int, utilization: float | None) -> list[str]:
    """Lines that tell what each stage costs, on so many GPUs at a share of their datasheets' rate.

    Raises InstaFlowError where a model's networks are not known, or a batch cannot be shared out.
    """
    plan = Plan(experiment, gpus)
    costs = [plan.cost_of(name) for name in experiment.stages]
    return [
        *table_of_stages(experiment, costs, gpus),
        "",
        *table_of_memory(costs, gpus),
        "",
        *table_of_days(costs, gpus, utilization),
    ]


class Plan:
    """Counts an experiment's stages, each with the networks of the stages that it builds on."""

    def __init__(self, experiment: Experiment, gpus: int) -> None:
        self.stages, self.gpus = experiment.stages, gpus
        self.found: dict[str, Architecture] = {}

    def architecture(self, place: str) -> Architecture:
        """What a stage's model, or one that was made elsewhere, is made of. Raises DataError."""
        stage = self.stages.get(place)
        if place not in self.found:
            if isinstance(stage, NetworkStage):
                init = self.architecture(stage.init)
                self.found[place] = init.stacked() if isinstance(stage, FlowStage) and stage.stacked else init
            elif isinstance(stage, TeacherStage):
                self.found[place] = digits_architecture(stage.data)
            elif isinstance(stage, EdmTeacherStage):
                self.found[place] = pixel_architecture(stage)
            else:
                self.found[place] = architecture_of(place)
        return self.found[place]

    def guidance(self, place: str) -> float:
        """The guidance scale that a model's folder recommends."""
        stage = self.stages.get(place)
        if isinstance(stage, TeacherStage | ReflowStage):
            return stage.guidance_scale
        one = isinstance(stage, DistillStage | ProgressiveStage | DmdStage | EdmTeacherStage)
        return 1.0 if one else self.architecture(place).settings.guidance_scale

    def is_flow(self, place: str) -> bool:
        stage = self.stages.get(place)
        return isinstance(stage, NetworkStage) or (
            stage is None and self.architecture(place).settings.kind != "teacher"
        )

    def is_noisy(self, place: str) -> bool:
        """Whether a model draws noise between its steps, and so follows no path."""
        stage = self.stages.get(place)
        if isinstance(stage, NetworkStage):
            return isinstance(stage, DmdStage) and stage.num_steps > 1
        return self.architecture(place).scheduler.get("_class_name") == NOISY

    def cost_of(self, name: str) -> Cost:
        stage: Any = self.stages[name]
        if isinstance(stage, TeacherStage):
            return self.teacher(name, stage)
        if isinstance(stage, EdmTeacherStage):
            return self.edm_teacher(name, stage)
        if isinstance(stage, CoupleStage):
            return self.couple(name, stage)
        if isinstance(stage, FlowStage):
            return self.flow(name, stage)
        if isinstance(stage, ProgressiveStage):
            return self.progressive(name, stage)
        if isinstance(stage, DmdStage):
            return self.dmd(name, stage)
        return self.evaluate(name, stage)

    def couple(self, name: str, stage: CoupleStage) -> Cost:
        model, dtype = self.architecture(stage.model), DTYPES[stage.dtype]
        branches = 2 if stage.guidance_scale > 1 else 1
        calls = stage.count * branches * network_calls(stage, is_flow=self.is_flow(stage.model), is_edm=model.is_edm)
        flops, parameters = model.flops(), model.parameters()
        images = stage.keep.images if stage.keep else None
        decoded = -(-stage.count // images.every) if images else 0
        activations = model.sampling_memory(stage.batch_size * branches, dtype)
        if images or stage.data:  # the encoder takes no more than the decoder
            activations = max(activations, model.decoding_memory(min(DECODED, stage.batch_size), dtype))
        record = Record(model.latent_shape, model.image_size, model.embedding_shape, model.pooled_size)
        return Cost(
            name=name,
            kind="couple",
            pairs=stage.count,
            flops=calls * flops["unet"]
            + stage.count * (flops["text"] + (flops["encode"] if stage.data else 0))
            + decoded * flops["decode"],
            disk=shards_bytes(stage, record),
            memory=Memory(frozen=dtype.itemsize * sum(parameters.values()), activations=activations),
            half=dtype.itemsize == 2,
            paper_days=calls * PAPER_DAYS["couple"] if is_of_the_paper(model) else None,
        )

    def flow(self, name: str, stage: FlowStage) -> Cost:
        kind = "reflow" if isinstance(stage, ReflowStage) else "distill"
        model = self.architecture(name)
        if stage.perceptual:
            check_crop(stage.perceptual, min(model.latent_shape[1:]), name)
        flops, parameters = model.flops(), model.parameters()
        samples = samples_of(stage.phases)
        passes = 1 + BACKWARD + stage.gradient_checkpointing
        activations = model.training_memory(
            largest_share(stage.phases, stage, self.gpus, f"stages.{name}.phases"),
            bfloat16=stage.mixed_precision is not None,
            checkpointing=stage.gradient_checkpointing,
        )
        trained, compute = parameters["unet"], samples * (passes * flops["unet"] + flops["text"])
        seen = [phase for phase in stage.phases if phase.loss in PERCEPTUAL_LOSSES]
        if seen and stage.perceptual and not stage.perceptual.decoder:  # what a tiny one takes is next to nothing
            crop, sides = stage.perceptual.crop, model.latent_shape[1:]
            share = crop**2 / (sides[0] * sides[1]) if crop else 1.0
            decodings = DECODINGS + stage.gradient_checkpointing
            compute += round(decodings * samples_of(seen) * share * flops["decode"])
            activations += model.perceptual_memory(
                largest_share(seen, stage, self.gpus, f"stages.{name}.phases"),
                bfloat16=stage.mixed_precision is not None and kind == "distill",  # reflow's is float32
                checkpointing=stage.gradient_checkpointing,
                crop=crop,
            )
        if stage.preview:  # which samples with a network of its own, while no activations are held
            rows = PREVIEWED * (2 if isinstance(stage, ReflowStage) and stage.guidance_scale > 1 else 1)
            sampling = model.sampling_memory(rows, torch.float32)
            activations = max(activations, 4 * trained + max(sampling, model.decoding_memory(DECODED, torch.float32)))
        return Cost(
            name=name,
            kind=kind,
            samples=samples,
            flops=compute,
            disk=2 * model_bytes(parameters) + num_checkpoints(stage, stage.phases) * checkpoint_bytes(stage, trained),
            while_saving=checkpoint_bytes(stage, trained),
            memory=training_memory(
                stage,
                trained,
                frozen=parameters["vae"] + parameters["text"],
                activations=activations,
                gpus=self.gpus,
            ),
            half=stage.mixed_precision is not None,
            paper_days=paper_days(kind, stage.phases) if is_of_the_paper(model) else None,
        )

    def progressive(self, name: str, stage: ProgressiveStage) -> Cost:
        """Its trainings one after the other, each beside a frozen teacher that is called twice a sample."""
        model = self.architecture(name)
        flops, parameters, bfloat16 = model.flops(), model.parameters(), stage.mixed_precision is not None
        samples, trained = samples_of(stage.phases), parameters["unet"]
        branches = 2 if stage.guidance_scale > 1 else 1  # in the first phase alone
        passes = 1 + BACKWARD + stage.gradient_checkpointing
        calls = 2 * (samples + (branches - 1) * samples_of(stage.phases[:1]))
        shares = [
            largest_share([phase], stage, self.gpus, f"stages.{name}.phases.{index}")
            for index, phase in enumerate(stage.phases)
        ]
        training = model.training_memory(max(shares), bfloat16=bfloat16, checkpointing=stage.gradient_checkpointing)
        teaching = max(branches * shares[0], *shares)
        return Cost(
            name=name,
            kind="distill",
            samples=samples,
            flops=(passes * samples + calls) * flops["unet"] + 2 * samples * flops["text"],
            disk=2 * model_bytes(parameters)
            + sum(num_checkpoints(stage, [phase]) for phase in stage.phases) * checkpoint_bytes(stage, trained),
            while_saving=checkpoint_bytes(stage, trained),
            memory=training_memory(
                stage,
                trained,
                frozen=sum(parameters.values()),
                activations=max(training, model.sampling_memory(teaching, torch.float32)),
                gpus=self.gpus,
            ),
            half=bfloat16,
        )

    def dmd(self, name: str, stage: DmdStage) -> Cost:
        """Generator and fake score, trained in turns beside a frozen teacher; a term of weight 0 costs nothing.

        The discriminator's passes count as whole ones, though they leave the network in its middle.
        """
        where = f"stages.{name}.phases"
        model, teacher = self.architecture(name), self.architecture(stage.teacher)
        flops, parameters, bfloat16 = model.flops(), model.parameters(), stage.mixed_precision is not None
        judge, judge_parameters = teacher.flops()["unet"], teacher.parameters()["unet"]
        samples, trained = samples_of(stage.phases), parameters["unet"]
        passes = 1 + BACKWARD + stage.gradient_checkpointing
        branches = 2 if stage.guidance_scale > 1 else 1
        share, matched = (stage.regression.share, stage.regression.matched) if stage.regression else (0.0, False)
        regressed, judged = (
            [phase for phase in stage.phases if stage.weight(term, phase)] for term in ("regression", "gan")
        )
        paired = stage.phases if matched else regressed
        pairs = share * samples_of(paired)
        before = (stage.num_steps - 1) / 2  # steps on the way to the one that is trained
        generator = (passes * (samples + pairs) + before * samples) * flops["unet"]
        generator += (samples + (pairs if matched else 0)) * (branches + 1) * judge
        fake = samples * ((1 + before) * flops["unet"] + passes * judge)
        generator += samples_of(judged) * passes * judge
        fake += samples_of(judged) * passes * judge
        micro, of_pairs = (
            largest_share(phases, stage, self.gpus, where) if phases else 0 for phases in (stage.phases, paired)
        )
        activations = model.training_memory(
            max(micro, round(of_pairs * (1 + share))), bfloat16=bfloat16, checkpointing=stage.gradient_checkpointing
        ) + max(
            teacher.sampling_memory(branches * micro, torch.float32),
            self.judging(stage, largest_share(judged, stage, self.gpus, where)) if judged else 0,
        )
        frozen = judge_parameters + parameters["vae"] + parameters["text"]
        if stage.teacher != stage.init:
            frozen += teacher.parameters()["vae"] + teacher.parameters()["text"]
        if stage.perceptual:
            compared = largest_share(regressed, stage, self.gpus, where) if regressed else 0
            pair, held, alive = self.perceptual(stage, round(compared * share))
            generator += share * samples_of(regressed) * pair
            frozen, activations = frozen + held, activations + alive
        both = trained + judge_parameters
        if stage.gan:
            channels = teacher.unet["block_out_channels"][-1]
            with torch.device("meta"):
                both += sum(part.numel() for part in Discriminator(channels, groups=1).parameters())
        memory = training_memory(
            stage,
            both,
            frozen=frozen,
            activations=activations,
            gpus=self.gpus,
        )
        return Cost(
            name=name,
            kind="distill",
            samples=samples,
            flops=round(generator + stage.fake.updates * fake + samples * (2 + stage.fake.updates) * flops["text"]),
            disk=2 * model_bytes(parameters) + num_checkpoints(stage, stage.phases) * checkpoint_bytes(stage, both),
            while_saving=checkpoint_bytes(stage, both),
            memory=replace(memory, buckets=2 * memory.buckets),  # each network has its own
            critic=True,
            half=bfloat16,
        )

    def judging(self, stage: DmdStage, batch: int) -> int:
        """Bytes alive while a discriminator looks at a batch: the judge's pass to its middle, and the way back."""
        teacher = self.architecture(stage.teacher)

        def build() -> Any:
            unet = teacher.build_unet()
            if stage.gradient_checkpointing:
                unet.enable_gradient_checkpointing()
            return unet

        def work(unet: Any) -> torch.Tensor:
            noise, timestep = torch.empty(batch, *teacher.latent_shape), torch.zeros(batch)
            return bottleneck(unet, noise, timestep, teacher.text(batch))

        return backward_memory(build, work, bfloat16=stage.mixed_precision is not None)

    def perceptual(self, stage: DmdStage, pairs: int) -> tuple[int, int, int]:
        """What LPIPS takes of one pair, and of so many at a time.

        FLOPs of a pair, parameters that are held beside the model's own, bytes alive while `pairs` are compared.
        """
        model, settings, checkpointing = self.architecture(stage.init), stage.perceptual, stage.gradient_checkpointing
        assert settings
        channels, *sides = model.latent_shape
        shape = (channels, settings.crop, settings.crop) if settings.crop else (channels, *sides)

        def build() -> Any:
            vae = build_tiny(settings.decoder, channels) if settings.decoder else model.build_vae()
            if checkpointing and not model.is_edm:
                vae.enable_gradient_checkpointing()
            return nn.ModuleList([vae, self.perceptual_network(settings.network)]).requires_grad_(False)

        def distance(parts: Any) -> PerceptualDistance:
            vae, network = parts
            return PerceptualDistance(None if model.is_edm else vae, network)

        def work(parts: Any) -> torch.Tensor:
            latents = torch.empty(pairs, *shape, requires_grad=True)
            return distance(parts)(latents, latents.detach(), np.empty(0))

        with torch.device("meta"):
            parts = build()
            decode, network = distance(parts).decode, parts[1]
            latents, images = torch.empty(1, *shape), decode(torch.empty(1, *shape))
        decoding, looking = flops_of(lambda: decode(latents)), flops_of(lambda: network(images))
        held = sum(map(num_parameters, parts if settings.decoder else [network]))
        alive = backward_memory(build, work, bfloat16=stage.mixed_precision is not None) if pairs else 0
        return DECODINGS * (decoding + looking) + checkpointing * decoding, held, alive

    def perceptual_network(self, place: str) -> PerceptualNetwork:
        """One that compares images, at random weights; a folder's that is not here is taken for the digits'."""
        if place in BACKBONES:
            return PerceptualNetwork(backbone(place), TAPS[place], of_imagenet=True)
        file = Path(place) / "config.json"
        form = read_config(file) if place not in self.stages and file.is_file() else PERCEPTUAL
        layers = small_layers(form["channels"], form["strides"])
        return PerceptualNetwork(layers, range(2, len(layers) + 1, 2), of_imagenet=False)

    def teacher(self, name: str, stage: TeacherStage) -> Cost:
        """The digits' trainings, one after the other: autoencoder, U-Net with text encoder, perceptual network.

        What the last one computes, and holds while it trains, is next to nothing and not counted; nor is what the text
        encoder computes and holds that trains alone.
        """
        model = self.architecture(name)
        flops, parameters, bfloat16 = model.flops(), model.parameters(), stage.mixed_precision is not None
        first, second = samples_of(stage.autoencoder_phases), samples_of(stage.phases)
        encoded = second if stage.data == "digits-grid" else 0  # single digits are encoded once
        trained = {"autoencoder": parameters["vae"], "denoiser": parameters["unet"] + parameters["text"]}
        phases = {"autoencoder": stage.autoencoder_phases, "denoiser": stage.phases}
        shares = {
            job: largest_share(phases[job], stage, self.gpus, f"stages.{name}.{key}")
            for job, key in (("autoencoder", "autoencoder_phases"), ("denoiser", "phases"))
        }
        activations = {
            "autoencoder": model.autoencoder_memory(shares["autoencoder"], bfloat16=bfloat16),
            "denoiser": model.training_memory(shares["denoiser"], bfloat16=bfloat16),
        }
        everything = sum(parameters.values())
        memories = [
            training_memory(
                stage, trained[job], frozen=everything - trained[job], activations=activations[job], gpus=self.gpus
            )
            for job in trained
        ]
        samples, disk = first + second, 2 * model_bytes(parameters)
        if stage.text_phases:
            trained["text"], phases["text"] = parameters["text"], stage.text_phases
            samples += samples_of(stage.text_phases)
        if stage.perceptual_phases:
            layers, classifier = perceptual_parameters(stage.data)
            trained["perceptual"], phases["perceptual"] = classifier, stage.perceptual_phases
            samples, disk = samples + samples_of(stage.perceptual_phases), disk + 4 * layers
        saved = {job: checkpoint_bytes(stage, count) for job, count in trained.items()}
        return Cost(
            name=name,
            kind="teacher",
            samples=samples,
            flops=(1 + BACKWARD)
            * (first * (flops["encode"] + flops["decode"]) + second * (flops["unet"] + flops["text"]))
            + encoded * flops["encode"],
            disk=disk + sum(num_checkpoints(stage, phases[job]) * size for job, size in saved.items()),
            while_saving=max(saved.values()),
            memory=max(memories, key=lambda memory: memory.total),
            half=bfloat16,
        )

    def edm_teacher(self, name: str, stage: EdmTeacherStage) -> Cost:
        model, bfloat16 = self.architecture(name), stage.mixed_precision is not None
        trained, samples = model.parameters()["unet"], samples_of(stage.phases)
        share = largest_share(stage.phases, stage, self.gpus, f"stages.{name}.phases")
        saved = checkpoint_bytes(stage, trained)
        return Cost(
            name=name,
            kind="teacher",
            samples=samples,
            flops=(1 + BACKWARD) * samples * model.flops()["unet"],
            disk=2 * model_bytes(model.parameters()) + num_checkpoints(stage, stage.phases) * saved,
            while_saving=saved,
            memory=training_memory(
                stage,
                trained,
                frozen=0,
                activations=model.training_memory(share, bfloat16=bfloat16),
                gpus=self.gpus,
            ),
            half=bfloat16,
        )

    def evaluate(self, name: str, stage: EvaluateStage) -> Cost:
        images, flops, activations, frozen, disk, dtype = 0, 0, 0, 0, 0, DTYPES[stage.dtype]
        for entry in stage.models:
            model = self.architecture(entry.model)
            scales = [self.guidance(entry.model) if scale is None else scale for scale in entry.scales]
            branches = sum(2 if scale > 1 else 1 for scale in scales)
            drawn = stage.count * len(entry.num_steps) * len(scales)
            calls = stage.count * sum(entry.num_steps)
            if max(entry.num_steps) > 1 and not self.is_noisy(entry.model):
                calls += min(stage.straightness_samples, stage.count) * stage.straightness_steps
            counted = model.flops()
            flops += branches * calls * counted["unet"] + drawn * (counted["text"] + counted["decode"])
            images += drawn
            if stage.of_images:  # those of digits take some megabytes
                features = INCEPTION_BYTES if stage.features.startswith("inception") else 0
                kept = min(stage.compared_samples, stage.count) * math.prod((3, *model.image_size))
                disk += len(entry.num_steps) * len(scales) * (stage.count * features + kept)
            frozen = max(frozen, dtype.itemsize * sum(model.parameters().values()))  # one model after the other
            batch = min(stage.batch, stage.count)
            activations = max(
                activations,
                model.sampling_memory((2 if max(scales) > 1 else 1) * batch, dtype),
                model.decoding_memory(batch, dtype),
            )
        memory = Memory(frozen=frozen, activations=activations)
        return Cost(
            name=name, kind="evaluate", samples=images, flops=flops, disk=disk, memory=memory, half=dtype.itemsize == 2
        )


# --- parts of a stage's cost ------------------------------------------------------------------------------------------


def digits_architecture(data: str = "digits") -> Architecture:
    """What the teacher stage makes; its scheduler costs nothing."""
    with torch.device("meta"):
        tokenizer = build_tokenizer(data)
        unet, vae, text_encoder = cast(
            list[Any], [build_unet(), build_autoencoder(), build_text_encoder(tokenizer, data)]
        )
    return Architecture(dict(unet.config), dict(vae.config), (text_encoder.config.to_dict(),), {})


def pixel_architecture(stage: EdmTeacherStage) -> Architecture:
    """What the teacher stage makes by method edm."""
    with torch.device("meta"):
        unet: Any = build_pixel_unet(len(WORDS) if stage.classes else None)
    return Architecture(dict(unet.config), None, (), {})


def build_tiny(folder: str, channels: int) -> Any:
    """The tiny decoder in a folder, at random weights; one that is not here is taken for Stable Diffusion's."""
    here = Path(folder).is_dir()
    config = AutoencoderTiny.load_config(folder) if here else {"latent_channels": channels}
    return AutoencoderTiny.from_config({key: config[key] for key in config if key != "block_out_channels"})  # its own


def perceptual_parameters(data: str) -> tuple[int, int]:
    """Of the digits' perceptual network, without and with the head that it is trained with."""
    size = SIZE // DATA[data].side
    with torch.device("meta"):
        layers = small_layers(**PERCEPTUAL)
        classifier = ClassifierLoss(layers, layers(torch.empty(1, 3, size, size)).numel())
    first, second = (sum(p.numel() for p in network.parameters()) for network in (layers, classifier))
    return first, second


def network_calls(stage: CoupleStage, *, is_flow: bool, is_edm: bool = False) -> int:
    """How often a record's sampling calls the network, guidance's second branch not counted."""
    if stage.data and is_edm:
        return 2 * stage.num_steps - 1
    if stage.data:  # Heun's method, and from a diffusion's data one step more
        return 2 * stage.num_steps + (not is_flow)
    if not is_flow and (stage.sampler == "heun" or (is_edm and stage.sampler is None)):
        return 2 * stage.num_steps - 1
    return stage.num_steps + (stage.sampler == "pndm")


def is_of_the_paper(model: Architecture) -> bool:
    """Whether a model has the U-Net and the latents that InstaFlow's figures are of."""
    same = model.parameters()["unet"] == SD1.parameters()["unet"]
    return same and model.latent_shape == SD1.latent_shape


def paper_days(kind: str, phases: Sequence[FlowPhase]) -> float | None:
    """A100-days of the paper's for as many samples; None where it trained with no such loss."""
    ways = [kind if phase.loss == "l2" else f"{kind} by {phase.loss.upper()}" for phase in phases]
    if not set(ways) <= set(PAPER_DAYS):
        return None
    return sum(samples_of([phase]) * PAPER_DAYS[way] for way, phase in zip(ways, phases, strict=True))


def check_crops(experiment: Experiment) -> None:
    """Raises ConfigError where a stage compares squares that are larger than its latents."""
    plan = Plan(experiment, gpus=1)
    for name, stage in experiment.stages.items():
        if isinstance(stage, FlowStage | DmdStage) and stage.perceptual:
            check_crop(stage.perceptual, min(plan.architecture(name).latent_shape[1:]), name)


def samples_of(phases: Sequence[Phase]) -> int:
    """The samples of all phases, in whole global batches."""
    return sum(phase.seen for phase in phases)


def largest_share(phases: Sequence[Phase], stage: Any, gpus: int, where: str) -> int:
    """The largest micro batch of a training. Raises ConfigError if a global batch cannot be shared out."""
    return max(share_of(phase, stage.micro_batch_size, gpus, f"{where}.{index}") for index, phase in enumerate(phases))


def model_bytes(parameters: dict[str, int]) -> int:
    """A model folder's weights, in float32."""
    return 4 * sum(parameters.values())
