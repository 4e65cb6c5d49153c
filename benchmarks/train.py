"""Training samples a second and peak memory, against the loop that a user of diffusers would write.

    python -m benchmarks.train                          reflow of the digits' architecture, on this machine
    python -m benchmarks.train --loss distill           distillation by L2
    python -m benchmarks.train --loss lpips             distillation by LPIPS on AlexNet, at random weights
    python -m benchmarks.train --architecture sd15      Stable Diffusion 1.5's, at random weights

All sides train the same network on the same shards with the same loss, batch, precision and optimizer, in turns, each
in a process of its own, whose peak memory is the side's. The user's side follows diffusers' train_text_to_image.py:
accelerate, a DataLoader over webdataset, the text encoder on each batch, clipping, AdamW, EMAModel. Ours is a stage's
own training with its loader, average, checks and log, as it is and with the network compiled. No side writes
checkpoints. What counts is the ratio; the rates are this machine's of this hour.
"""

import json
import math
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch
import torchvision
from torch import Tensor
from torch.nn import functional

from benchmarks.measuring import build, in_turns, manifest_of, matmul_flops, profiler, ratios_to, shares_of
from benchmarks.memory import peak_memory
from instaflow.couplings.generate import Made, make_records, write_records
from instaflow.couplings.loader import Couplings
from instaflow.couplings.manifest import read_manifest, write_manifest
from instaflow.couplings.shards import tar_path
from instaflow.digits.captions import TRAINED
from instaflow.flow.views import VelocityView
from instaflow.methods import DistillStage
from instaflow.models.device import device, set_up_cpu
from instaflow.models.sampling import network_flops
from instaflow.models.settings import ModelSettings
from instaflow.models.text_to_image import TextToImage
from instaflow.rundir import StageFolder
from instaflow.sections import FlowPhase, Perceptual
from instaflow.stages import FlowStage, ReflowStage
from instaflow.training.losses import DistillLoss, FlowLoss, ReflowLoss
from instaflow.training.perceptual import PerceptualDistance, load_lpips
from instaflow.world import hardware
from pipelines.on_couplings import Material, train_on

LEARNING_RATE, WEIGHT_DECAY, CLIPPING, DECAY = 1e-5, 0.01, 1.0, 0.9999
CAPTIONS = sorted(TRAINED)


@dataclass(frozen=True)
class Options:
    """What is trained, and how much of it a turn is."""

    architecture: str
    loss: str
    batch_size: int
    micro_batch_size: int
    dtype: str
    steps: int
    rounds: int
    stock_workers: int
    couplings: Path

    @property
    def backbone(self) -> Path:
        """AlexNet's weights."""
        return self.couplings / "alexnet.pth"


@click.command()
@click.option("--architecture", type=click.Choice(["digits", "sd15"]), default="digits", show_default=True)
@click.option("--loss", type=click.Choice(["reflow", "distill", "lpips"]), default="reflow", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--micro-batch-size", type=click.IntRange(1), help="Through the network at a time.  [default: all]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=30, show_default=True, help="Of each side a round.")
@click.option("--rounds", type=click.IntRange(1), default=11, show_default=True)
@click.option("--records", type=click.IntRange(1), default=2000, show_default=True, help="Couplings to train on.")
@click.option("--stock-workers", type=click.IntRange(0), default=0, show_default=True, help="Of the user's DataLoader.")
@click.option("--profile", is_flag=True, help="Say where the time of our sides goes.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the result as JSON.")
def main(
    architecture: str,
    loss: str,
    batch_size: int,
    micro_batch_size: int | None,
    dtype: str,
    steps: int,
    rounds: int,
    records: int,
    stock_workers: int,
    profile: bool,
    output: Path | None,
) -> None:
    """Measure samples a second and memory of training against stock diffusers, in turns; print them and their ratio."""
    set_up_cpu()
    with tempfile.TemporaryDirectory() as place:
        model = TextToImage(build(architecture), ModelSettings(), architecture)
        couplings = make_couplings(Path(place), model.latent_shape, prompts_of(architecture), records)
        micro = min(micro_batch_size or batch_size, batch_size)
        options = Options(architecture, loss, batch_size, micro, dtype, steps, rounds, stock_workers, couplings)
        if loss == "lpips":
            torch.manual_seed(0)
            torch.save(torchvision.models.alexnet(weights=None).state_dict(), options.backbone)
        sides = {name: Side(name, options) for name in SIDES}
        seconds = in_turns({name: side.run for name, side in sides.items()}, rounds)
        memory = {name: side.ask("memory") for name, side in sides.items()}
        shares = {name: side.ask("profile") for name, side in sides.items()} if profile else {}
        losses = {name: side.ask("end") for name, side in sides.items()}
    rates = {name: batch_size * steps / statistics.median(taken) for name, taken in seconds.items()}
    ratios = ratios_to("stock", seconds)
    result: dict[str, Any] = {
        **{key: value for key, value in asdict(options).items() if key != "couplings"},
        "records": records,
        "hardware": hardware(),
        "samples_per_second": rates,
        "ratio": ratios,
        "peak_memory_gib": {name: held / 2**30 for name, held in memory.items()},
        "mean_loss": losses,
        "seconds": seconds,
        "shares_of_time": shares,
        "versions": {
            "Python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "accelerate", "deepspeed", "webdataset")},
        },
    }
    if torch.cuda.is_available():
        peak = matmul_flops(device(), getattr(torch, dtype))
        flops = 3 * network_flops(model)  # the way back costs twice the way there
        result["matmul_fraction"] = {name: flops * rate / peak for name, rate in rates.items()}
    for name, rate in rates.items():
        ratio = f"{ratios[name]:6.2f} times stock, the median of {rounds} rounds" if name in ratios else ""
        click.echo(f"{name:>9}: {rate:9.1f} samples/s {memory[name] / 2**30:7.2f} GiB {ratio}".rstrip())
    for name, fraction in result.get("matmul_fraction", {}).items():
        click.echo(f"{name:>9}: {fraction:8.1%} of the rate of one large matrix product")
    for name, found in shares.items():
        click.echo(f"\n{name}")
        for operation, share in found.items():
            click.echo(f"{share:11.1%} {operation}")
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")


def prompts_of(architecture: str) -> list[str]:
    """The digits' captions; for the large network as many prompts as its users have, no two alike."""
    if architecture == "digits":
        return CAPTIONS
    return [f"{CAPTIONS[number % len(CAPTIONS)]}, number {number}" for number in range(100_000)]


def make_couplings(folder: Path, latent_shape: tuple[int, int, int], prompts: list[str], count: int) -> Path:
    """Couplings whose latents are random, written as a couple stage writes its own."""
    manifest = manifest_of(latent_shape, count, 250)
    write_manifest(folder, manifest)
    for shard in range(manifest.plan.num_shards):
        records = make_records(folder, shard, manifest, prompts, lambda indices, noise, texts: lambda: Made(-noise))
        assert records is not None
        write_records(folder, shard, manifest, records)
    return folder


# --- sides ------------------------------------------------------------------------------------------------------------


class Side:
    """One side in a process of its own, which waits for its turns."""

    def __init__(self, name: str, options: Options) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(name, options, theirs))
        self.process.start()
        theirs.close()

    def ask(self, what: str) -> Any:
        """Have it "run" a round, which gives the seconds, "profile" one, tell its "memory", or "end": its mean loss."""
        self.pipe.send(what)
        return self.pipe.recv()

    def run(self, turn: int) -> float:
        return float(self.ask("run"))


def serve(name: str, options: Options, pipe: Connection) -> None:
    """A side's process."""
    set_up_cpu()
    SIDES[name](options, Turns(pipe, options.steps))


class Turns:
    """Called before each step, like a `Stop`: after a round of steps reports it, and waits for the next turn."""

    signal = None

    def __init__(self, pipe: Connection, steps: int) -> None:
        self.pipe, self.steps, self.done = pipe, steps, 0
        self.report: Callable[[], Any] | None = None
        self.losses: Callable[[], list[float]] = list
        """Those logged so far: that they are alike shows that the sides do the same work."""

    def __call__(self) -> bool:
        if self.done % self.steps == 0:
            self.turn()
        self.done += 1
        return False

    def turn(self) -> None:
        finish()
        if self.report:
            self.pipe.send(self.report())
        while (what := self.pipe.recv()) == "memory":
            self.pipe.send(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory())
        if what == "end":
            self.pipe.send(statistics.fmean(self.losses() or [math.nan]))
            raise SystemExit
        if what == "profile":
            profile = profiler()
            profile.start()

            def stop() -> dict[str, float]:
                profile.stop()
                return shares_of(profile)

            self.report = stop
        else:
            began = time.perf_counter()
            self.report = lambda: time.perf_counter() - began


def finish() -> None:
    """Wait for what the GPU still works on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(options: Options, turns: Turns, compiled: bool = False) -> None:
    """A stage's own training, from the couplings to the average and the log."""
    pipeline: Any = build(options.architecture).to(device())
    model = TextToImage(pipeline, ModelSettings(), options.architecture)
    samples = options.batch_size * max(1000, options.steps * (options.rounds + 2))  # a log's density is a stage's
    settings: dict[str, Any] = {
        "init": options.architecture,
        "couplings": "pairs",
        "phases": [FlowPhase(samples=samples, global_batch_size=options.batch_size, learning_rate=LEARNING_RATE)],
        "micro_batch_size": options.micro_batch_size,
        "mixed_precision": None if options.dtype == "float32" else options.dtype,
        "ema_decay": DECAY,
        "weight_decay": WEIGHT_DECAY,
        "gradient_clipping": CLIPPING,
        "checkpoint_every": samples,
        "compile": compiled,
        "preview": None,
    }
    stage: FlowStage
    loss: FlowLoss
    if options.loss == "reflow":
        stage = ReflowStage(kind="reflow", caption_dropout=0.0, **settings)
        loss = ReflowLoss(model.unet, VelocityView(), model.encode, 0.0)
    else:
        distance = None
        if options.loss == "lpips":
            distance = PerceptualDistance(model.vae, load_lpips("alex", options.backbone).to(model.device))
            settings["phases"] = [FlowPhase(**{**settings["phases"][0].model_dump(), "loss": "lpips"})]
            settings["perceptual"] = Perceptual(weights=str(options.backbone))
        stage = DistillStage(kind="distill", **settings)
        loss = DistillLoss(model.unet, VelocityView(), model.encode, distance)
    model.unet.requires_grad_(True)
    folder = StageFolder(options.couplings / "run", "compiled" if compiled else "ours", stage, 0, (), "", ())
    folder.folder.mkdir(parents=True)
    folder.start_clock()
    turns.losses = lambda: [line["loss"] for line in folder.stats()]
    material = Material(model, Couplings(options.couplings, 0), VelocityView())
    train_on(folder, turns, material, loss, ModelSettings())


def ours_compiled(options: Options, turns: Turns) -> None:
    ours(options, turns, compiled=True)


def stock(options: Options, turns: Turns) -> None:
    """diffusers' examples/text_to_image/train_text_to_image.py with reflow's or distillation's loss on couplings."""
    import webdataset
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torch.utils.data import DataLoader

    half = options.dtype == "bfloat16"
    accelerator = Accelerator(
        gradient_accumulation_steps=options.batch_size // options.micro_batch_size,
        mixed_precision="bf16" if half else "no",
    )
    weight_dtype = torch.bfloat16 if half else torch.float32
    pipeline = build(options.architecture)
    unet, text_encoder, tokenizer = pipeline.unet, pipeline.text_encoder, pipeline.tokenizer
    text_encoder.requires_grad_(False).to(accelerator.device, weight_dtype)
    unet.train()
    ema = EMAModel(unet.parameters(), decay=DECAY, model_cls=type(unet), model_config=unet.config)
    ema.to(accelerator.device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scheduler = get_scheduler("constant", optimizer)

    def sample_of(record: dict[str, Any]) -> dict[str, Tensor]:
        length = tokenizer.model_max_length
        tokens = tokenizer(
            record["json"]["prompt"], max_length=length, padding="max_length", truncation=True, return_tensors="pt"
        )
        return {
            "noise": torch.from_numpy(record["noise.npy"]).float(),
            "latent": torch.from_numpy(record["latent.npy"]).float(),
            "input_ids": tokens.input_ids[0],
        }

    shards = read_manifest(options.couplings).plan.num_shards
    tars = [str(tar_path(options.couplings, shard)) for shard in range(shards)]
    dataset = webdataset.WebDataset(tars, shardshuffle=shards, seed=0).shuffle(1000).decode().map(sample_of)
    context = "fork" if options.stock_workers else None
    loader = DataLoader(
        dataset.repeat(),
        batch_size=options.micro_batch_size,
        num_workers=options.stock_workers,
        multiprocessing_context=context,
    )
    unet, optimizer, loader, scheduler = accelerator.prepare(unet, optimizer, loader, scheduler)
    distance = stock_distance(options, pipeline.vae.to(accelerator.device)) if options.loss == "lpips" else None
    batches = iter(loader)
    losses: list[float] = []
    turns.losses = lambda: losses
    while not turns():
        train_loss = 0.0
        accumulated = False
        while not accumulated:
            batch = next(batches)
            with accelerator.accumulate(unet):
                noise, data = batch["noise"], batch["latent"]
                hidden = text_encoder(batch["input_ids"], return_dict=False)[0]
                if options.loss == "reflow":
                    t = torch.rand(len(noise), device=noise.device)
                    x = (1 - t.view(-1, 1, 1, 1)) * noise + t.view(-1, 1, 1, 1) * data
                    timesteps, target = 1000 * (1 - t), noise - data
                else:
                    x, timesteps = noise, torch.full((len(noise),), 999, device=noise.device)
                    target = (noise - data) / 0.999
                output = unet(x, timesteps, hidden, return_dict=False)[0]
                if options.loss == "lpips":
                    loss = distance(noise - 0.999 * output.float(), data)
                else:
                    loss = functional.mse_loss(output.float(), target.float(), reduction="mean")
                average = accelerator.gather(loss.repeat(options.micro_batch_size)).mean()
                train_loss += average.item() / accelerator.gradient_accumulation_steps
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), CLIPPING)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            accumulated = accelerator.sync_gradients
        ema.step(unet.parameters())
        accelerator.log({"train_loss": train_loss})
        losses.append(train_loss)
        loss.detach().item(), scheduler.get_last_lr()[0]  # what the example's progress bar shows


def stock_distance(options: Options, vae: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS of decoded latents, by its authors' package, as its page has it: small images are enlarged first."""
    import lpips

    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = torch.load(options.backbone, weights_only=True)
    for part in network.net.children():
        own = {name: state[f"features.{name}"] for name in part.state_dict()}
        part.load_state_dict(own)
    network.to(vae.device).requires_grad_(False)
    vae.requires_grad_(False)

    def image(latents: Tensor) -> Tensor:
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            decoded: Tensor = vae.decode(latents / vae.config.scaling_factor).sample
        return decoded if min(decoded.shape[2:]) > 64 else functional.interpolate(decoded, size=224, mode="bilinear")

    def distance(latents: Tensor, data: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = image(data)
        found: Tensor = network(image(latents), wanted).mean()
        return found

    return distance


SIDES: dict[str, Callable[[Options, Turns], None]] = {"ours": ours, "compiled": ours_compiled, "stock": stock}

if __name__ == "__main__":
    main()
