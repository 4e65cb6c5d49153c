"""Couplings a second, against the loop that a user of diffusers would write.

    python -m benchmarks.couple                          the digits' architecture, on this machine
    python -m benchmarks.couple --architecture sd15      Stable Diffusion 1.5's, at random weights

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

from benchmarks.measuring import build, in_turns, manifest_of, matmul_flops, profiler, ratios_to, shares_of, timed
from instaflow.couplings.generate import Sampler, make_records, write_records
from instaflow.couplings.prompts import prompt_of
from instaflow.digits.captions import TRAINED
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
    manifest = manifest_of(
        model.latent_shape,
        per_round * (rounds + 1),
        per_round,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        dtype=dtype,
        batch_size=batch_size,
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

        def ours(sample: Sampler) -> Callable[[int], None]:
            def make(turn: int) -> None:
                records = make_records(place, turn, manifest, PROMPTS, sample)
                if records:
                    write_records(place, turn, manifest, records)

            return make

        sides = {"ours": ours(plain), "compiled": ours(compiled), "stock": stock}
        seconds = in_turns({name: timed(side) for name, side in sides.items()}, rounds)
        shares: dict[str, float] = {}
        if profile:
            with profiler() as found:
                sides["compiled"](0)
            shares = shares_of(found)
    rates = {name: per_round / statistics.median(taken) for name, taken in seconds.items()}
    ratios = ratios_to("stock", seconds)
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


def matmul_fraction(model: TextToImage, rate: float, num_steps: int, guidance_scale: float) -> float:
    """The U-Net's floating-point operations at `rate` pairs a second, as a share of what one large product reaches."""
    flops = network_flops(model) * num_steps * (2 if guidance_scale > 1 else 1) * rate
    return flops / matmul_flops(model.device, model.dtype)


if __name__ == "__main__":
    main()
