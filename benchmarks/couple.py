"""Couplings a second, against the loop that a user of diffusers would write.

    python benchmarks/couple.py                          the digits' architecture, on this machine
    python benchmarks/couple.py --architecture sd15      Stable Diffusion 1.5's, at random weights

Both sides sample the same prompts with the same network, scheduler, steps, guidance, batch and precision, in turns, in
one process. The user's side is `StableDiffusionPipeline.__call__` with `output_type="latent"` and nothing written; ours
draws the noise, samples and writes whole shards. What counts is the ratio; the rates are this machine's of this hour.
"""

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

from instaflow.couplings.generate import make_shard
from instaflow.couplings.manifest import Manifest
from instaflow.digits.captions import TRAINED
from instaflow.digits.networks import build_autoencoder, build_scheduler, build_text_encoder, build_unet
from instaflow.digits.tokenizer import build_tokenizer
from instaflow.models.device import device, set_up_cpu
from instaflow.models.samplers import coupling_scheduler
from instaflow.models.settings import ModelSettings
from instaflow.models.text_to_image import TextToImage
from instaflow.world import hardware
from pipelines.couple import sampler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROMPTS = sorted(TRAINED)


@click.command()
@click.option("--architecture", type=click.Choice(["digits", "sd15"]), default="digits", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--num-steps", type=click.IntRange(1, 1000), default=25, show_default=True)
@click.option("--guidance-scale", type=float, default=4.0, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="A batch of each side a round.")
@click.option("--profile", is_flag=True, help="Say where our side's time goes.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the result as JSON.")
def main(
    architecture: str,
    batch_size: int,
    num_steps: int,
    guidance_scale: float,
    dtype: str,
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
    manifest = Manifest(
        stage="bench",
        seed=0,
        count=batch_size * (rounds + 1),
        records_per_shard=batch_size,
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

    sample = sampler(model, scheduler, manifest)

    with tempfile.TemporaryDirectory() as folder:

        def ours(turn: int) -> None:
            make_shard(Path(folder), turn, manifest, PROMPTS, sample)

        def stock(turn: int) -> None:
            texts = [PROMPTS[index % len(PROMPTS)] for index in range(turn * batch_size, (turn + 1) * batch_size)]
            noise = torch.randn(batch_size, *model.latent_shape, generator=torch.Generator().manual_seed(turn))
            pipeline(
                texts,
                latents=noise.to(device(), DTYPES[dtype]),
                num_inference_steps=num_steps,
                guidance_scale=guidance_scale,
                output_type="latent",
            ).images.cpu()

        seconds = in_turns({"ours": ours, "stock": stock}, rounds)
        if profile:
            show_profile(lambda: ours(0))
    ratio = statistics.median(theirs / own for own, theirs in zip(seconds["ours"], seconds["stock"], strict=True))
    rates = {name: batch_size / statistics.median(taken) for name, taken in seconds.items()}
    result: dict[str, Any] = {
        "architecture": architecture,
        "hardware": hardware(),
        "batch_size": batch_size,
        "num_steps": num_steps,
        "guidance_scale": guidance_scale,
        "dtype": dtype,
        "pairs_per_second": rates,
        "ratio": ratio,
        "seconds": seconds,
        "versions": {"Python": platform.python_version(), **{n: version(n) for n in ("torch", "diffusers")}},
    }
    if torch.cuda.is_available():
        result["matmul_fraction"] = matmul_fraction(model, rates["ours"], num_steps, guidance_scale)
    for name, rate in rates.items():
        click.echo(f"{name:>6}: {rate:10.2f} pairs/s")
    click.echo(f" ratio: {ratio:10.2f}, the median of {rounds} rounds")
    if "matmul_fraction" in result:
        click.echo(f"matmul: {result['matmul_fraction']:10.1%} of the peak that a large product reaches here")
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


def in_turns(sides: dict[str, Callable[[int], None]], rounds: int) -> dict[str, list[float]]:
    """Each side's seconds, a batch a round; the first batch of each is not counted, and who begins alternates."""
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
    from torch.utils.flop_counter import FlopCounterMode

    noise = torch.zeros(1, *model.latent_shape, device=model.device, dtype=model.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.unet(noise, torch.tensor(999, device=model.device), **model.encode([""]))
    flops = counter.get_total_flops() * num_steps * (2 if guidance_scale > 1 else 1) * rate
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


def show_profile(work: Callable[[], None]) -> None:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as found:
        work()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    click.echo(found.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=48))


if __name__ == "__main__":
    main()
