"""Couplings a second, against the loop that a user of diffusers would write.

    python benchmarks/couple.py                          the digits' architecture, on this machine
    python benchmarks/couple.py --architecture sd15      Stable Diffusion 1.5's, at random weights

All sides sample the same prompts with the same network, scheduler, steps, guidance, batch and precision, in turns, in
one process. The user's side is `StableDiffusionPipeline.__call__` with `output_type="latent"` and nothing written; ours
draws the noise, samples and writes whole shards, as it is and with the network compiled (`compile: true`; on a CPU a
stage of some minutes or more does so by itself). What counts is the ratio; the rates are this machine's of this hour.
"""

import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from instaflow.couplings.generate import Sampler, make_records, write_records
from instaflow.couplings.manifest import Manifest
from instaflow.couplings.prompts import prompt_of
from instaflow.digits.captions import TRAINED
from instaflow.digits.networks import build_autoencoder, build_scheduler, build_text_encoder, build_unet
from instaflow.digits.tokenizer import build_tokenizer
from instaflow.models.device import device, set_up_cpu
from instaflow.models.samplers import coupling_scheduler
from instaflow.models.sampling import network_flops
from instaflow.models.settings import ModelSettings
from instaflow.models.text_to_image import TextToImage
from instaflow.world import hardware
from pipelines.couple import DTYPES, sampler

PROMPTS = sorted(TRAINED)


@click.command()
@click.option("--architecture", type=click.Choice(["digits", "sd15"]), default="digits", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--num-steps", type=click.IntRange(1, 1000), default=25, show_default=True)
@click.option("--guidance-scale", type=float, default=4.0, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--batches", type=click.IntRange(1), default=2, show_default=True, help="Of each side a round: a shard.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--profile", is_flag=True, help="Say where the time of our compiled side goes.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the result as JSON.")
def main(
    architecture: str,
    batch_size: int,
    num_steps: int,
    guidance_scale: float,
    dtype: str,
    batches: int,
    rounds: int,
    profile: bool,
    output: Path | None,
) -> None:
    """Measure couplings a second against stock diffusers, in turns; print both and their ratio."""
    set_up_cpu()
    pipeline: Any = build(architecture)
    pipeline.to(device(), DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    model = TextToImage(pipeline, ModelSettings(), architecture)
    scheduler = coupling_scheduler(model)
    pipeline.scheduler = type(scheduler).from_config(scheduler.config)
    per_round = batch_size * batches
    manifest = Manifest(
        stage="bench",
        seed=0,
        count=per_round * (rounds + 1),
        records_per_shard=per_round,
        latent_shape=model.latent_shape,
        prompts_hash="",
        model=architecture,
        model_fingerprint="",
        sampler={},
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        timestep_spacing="trailing",
        dtype=dtype,
        batch_size=batch_size,
        hardware={},
    )
    plain = sampler(model, scheduler, manifest)
    began = time.perf_counter()
    compiling = TextToImage(copy.copy(pipeline), ModelSettings(), architecture)
    compiling.unet = copy.deepcopy(pipeline.unet)
    compiled = sampler(compiling, scheduler, manifest.model_copy(update={"compiled": True}))
    seconds_to_compile = time.perf_counter() - began

    def stock(turn: int) -> None:
        for batch in manifest.plan.batches(turn, batch_size):
            noise = torch.randn(len(batch), *model.latent_shape, generator=torch.Generator().manual_seed(batch[0]))
            pipeline(
                [prompt_of(PROMPTS, index) for index in batch],
                latents=noise.to(device(), DTYPES[dtype]),
                num_inference_steps=num_steps,
                guidance_scale=guidance_scale,
                output_type="latent",
            ).images.cpu()

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)

        def ours(sample: Sampler) -> Callable[[int], object]:
            def make(turn: int) -> None:
                records = make_records(place, turn, manifest, PROMPTS, sample)
                if records:
                    write_records(place, turn, manifest, records)

            return make

        seconds = in_turns({"ours": ours(plain), "compiled": ours(compiled), "stock": stock}, rounds)
        shares = shares_of_time(lambda: ours(compiled)(0)) if profile else {}
    rates = {name: per_round / statistics.median(taken) for name, taken in seconds.items()}
    ratios = {
        name: statistics.median(theirs / own for own, theirs in zip(seconds[name], seconds["stock"], strict=True))
        for name in ("ours", "compiled")
    }
    result: dict[str, Any] = {
        "architecture": architecture,
        "hardware": hardware(),
        "batch_size": batch_size,
        "num_steps": num_steps,
        "guidance_scale": guidance_scale,
        "dtype": dtype,
        "pairs_per_second": rates,
        "ratio": ratios,
        "seconds_to_compile": seconds_to_compile,
        "seconds": seconds,
        "shares_of_compiled_time": shares,
        "versions": {"Python": platform.python_version(), **{n: version(n) for n in ("torch", "diffusers")}},
    }
    if torch.cuda.is_available():
        result["matmul_fraction"] = {
            name: matmul_fraction(model, rates[name], num_steps, guidance_scale) for name in ratios
        }
    for name, rate in rates.items():
        ratio = f"{ratios[name]:6.2f} times stock, the median of {rounds} rounds" if name in ratios else ""
        click.echo(f"{name:>9}: {rate:8.2f} pairs/s {ratio}".rstrip())
    for name, fraction in result.get("matmul_fraction", {}).items():
        click.echo(f"{name:>9}: {fraction:8.1%} of the rate of one large matrix product")
    click.echo(f"compiling: {seconds_to_compile:8.1f} s")
    for name, share in shares.items():
        click.echo(f"{share:11.1%} {name}")
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")


def build(architecture: str) -> StableDiffusionPipeline:
    """A pipeline of the architecture with random weights."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    if architecture == "digits":
        unet, vae, text_encoder = build_unet(), build_autoencoder(), build_text_encoder(tokenizer)
    else:
        tokenizer.model_max_length = 77
        unet, vae, text_encoder = sd15_networks()
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd15_networks() -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """U-Net, autoencoder and text encoder of Stable Diffusion 1.5."""
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=8,
        cross_attention_dim=768,
    )
    vae = AutoencoderKL(
        sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    return unet, vae, CLIPTextModel(text)


def in_turns(sides: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Each side's seconds a round; the first round is not counted, and who begins alternates."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            sides[name](turn)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def matmul_fraction(model: TextToImage, rate: float, num_steps: int, guidance_scale: float) -> float:
    """The U-Net's floating-point operations at `rate` pairs a second, as a share of what one large product reaches."""
    flops = network_flops(model) * num_steps * (2 if guidance_scale > 1 else 1) * rate
    size, repeats = 8192, 20
    a = torch.randn(size, size, device=model.device, dtype=model.dtype)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        a @ a
    torch.cuda.synchronize()
    return flops / (2 * size**3 * repeats / (time.perf_counter() - began))


def shares_of_time(work: Callable[[], object]) -> dict[str, float]:
    """The operations that take most of the device's time, each with its share, the largest first."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        work()
    times = {
        event.key[:60]: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in found.key_averages()
    }
    largest = sorted(times, key=lambda name: times[name], reverse=True)[:12]
    return {name: times[name] / sum(times.values()) for name in largest}


if __name__ == "__main__":
    main()
