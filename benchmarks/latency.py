"""Seconds from text to image, against stock diffusers' own one-step call and the teacher at 25 steps.

    python -m benchmarks.latency                         the digits' architecture, on this machine
    python -m benchmarks.latency --architecture sd15     Stable Diffusion 1.5's, at random weights

All sides have the same weights and precision, are called with prompts and noise, and end when the PIL images are there;
they take turns in one process. The user's side is `StableDiffusionPipeline.__call__`, in one step without guidance, and
as the teacher in 25 steps with it; ours is `instaflow.models.drawing`. A side's first call comes before all turns: ours
compiles and records in it, with the compiler's caches empty (unless TORCHINDUCTOR_CACHE_DIR names some). Of each call
the text encoder's, the U-Net's and the VAE's time is told apart, on a GPU as CUDA events see it; ours counts the
sampler's steps as the U-Net's, and making bytes of the pixels as the VAE's. The rest is Python, tokens, copies and PIL.
There is no safety checker, as in the papers. What counts is the ratio.
"""

import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from benchmarks.measuring import build, in_turns, matmul_flops, ratios_to
from instaflow.digits.captions import TRAINED
from instaflow.models.architecture import Architecture
from instaflow.models.device import device, set_up_cpu
from instaflow.models.drawing import Drawing
from instaflow.models.loading import DTYPES
from instaflow.models.samplers import flow_scheduler
from instaflow.models.settings import ModelSettings
from instaflow.models.text_to_image import TextToImage
from instaflow.world import hardware

PROMPTS = sorted(TRAINED)
TEACHER_STEPS, TEACHER_GUIDANCE = 25, 7.5
STUDENT = ModelSettings(kind="student", parametrization="velocity", num_steps=1, guidance_scale=1.0)
PARTS = ("text", "unet", "vae")
SETTING, CACHE = "TORCHINDUCTOR_", "TORCHINDUCTOR_CACHE_DIR"
WARM_UP = 3
"""Calls of each side, its first one and that of the turn that is not counted among them."""


@click.command()
@click.option("--architecture", type=click.Choice(["digits", "sd15"]), default="digits", show_default=True)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(1),
    multiple=True,
    default=(1, 8),
    show_default=True,
    help="Several may be given.",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="[default: bfloat16 on a GPU, float32 on a CPU]")
@click.option("--rounds", type=click.IntRange(2), default=30, show_default=True, help="Calls of each side.")
@click.option("--eager", is_flag=True, help="Do not compile our side.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the result as JSON.")
def main(
    architecture: str, batch_sizes: tuple[int, ...], dtype: str | None, rounds: int, eager: bool, output: Path | None
) -> None:
    """Measure a call's latency against stock diffusers, in turns; print the sides, their parts and their ratios."""
    set_up_cpu()
    on_gpu = device().type == "cuda"
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    teacher: Any = build(architecture)
    teacher.to(device(), DTYPES[dtype])
    teacher.set_progress_bar_config(disable=True)
    one_step = with_scheduler(teacher, flow_scheduler("velocity", None))
    student = TextToImage(copy.deepcopy(one_step), STUDENT, architecture)
    watch, networks = Watch(), {"text": teacher.text_encoder, "unet": teacher.unet, "vae": teacher.vae.decoder}
    for part, network in networks.items():
        network.forward = watch.around(part, network.forward)
    flops = flops_of_parts(teacher)
    result: dict[str, Any] = {
        "architecture": architecture,
        "image_size": student.image_size,
        "hardware": hardware(),
        "dtype": dtype,
        "ours": {
            "compiled": not eager,
            "channels_last": not eager,
            "cuda_graphs": on_gpu,
            "compiler": {key: value for key, value in os.environ.items() if key.startswith(SETTING) and key != CACHE},
            "compiler_caches": "kept" if CACHE in os.environ else "empty",
        },
        "protocol": {
            "num_steps": {"ours": 1, "stock": 1, "teacher": TEACHER_STEPS},
            "guidance_scale": {"ours": 1.0, "stock": 1.0, "teacher": TEACHER_GUIDANCE},
            "warm_up_calls": WARM_UP,
            "rounds": rounds,
            "clock": "perf_counter, from prompts and noise until the PIL images are on the host",
            "parts": "CUDA events" if on_gpu else "perf_counter",
        },
        "flops_per_image": flops,
        "batches": {},
        "versions": versions(),
    }
    rate = matmul_flops(device(), DTYPES[dtype]) if on_gpu else None
    with tempfile.TemporaryDirectory() as caches:
        os.environ.setdefault(CACHE, caches)
        for batch_size in batch_sizes:
            builds: dict[str, Callable[[], Draw]] = {
                "stock": partial(stock, one_step, 1, 1.0),
                "teacher": partial(stock, teacher, TEACHER_STEPS, TEACHER_GUIDANCE),
                "ours": partial(ours, student, batch_size, watch, compiled=not eager),
            }
            shape = (batch_size, *student.latent_shape)
            found = measure({name: Side(build, shape, watch) for name, build in builds.items()}, rounds)
            if rate:
                found["limit"] = batch_size * sum(flops.values()) / rate
            result["batches"][batch_size] = found
            tell(batch_size, found)
            if output:  # after each: what takes minutes may be cut off
                output.write_text(json.dumps(result, indent=2) + "\n")


def measure(sides: dict[str, "Side"], rounds: int) -> dict[str, Any]:
    """What the sides' calls take; all times in seconds."""
    first = {name: side.first() for name, side in sides.items()}
    for _ in range(WARM_UP - 2):
        for side in sides.values():
            side(0)
    seconds = in_turns(sides, rounds)
    parts = {name: side.parts[-rounds:] for name, side in sides.items()}
    return {
        "first_call": first,
        "median": {name: statistics.median(taken) for name, taken in seconds.items()},
        "quartiles": {name: statistics.quantiles(taken, n=4)[::2] for name, taken in seconds.items()},
        "parts": {
            name: {part: statistics.median(of_call[part] for of_call in parts[name]) for part in (*PARTS, "rest")}
            for name in sides
        },
        "ratio": {reference: ratios_to(reference, seconds)["ours"] for reference in ("stock", "teacher")},
        "levels_apart": levels_apart(sides["ours"], sides["stock"]),
        "seconds": seconds,
        "seconds_of_parts": parts,
    }


# --- sides ------------------------------------------------------------------------------------------------------------

Draw = Callable[[Tensor, list[str]], list[Image.Image]]


class Watch:
    """Tells how long a call spent in each part, which may come several times in it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, Any]] = []

    def around(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same work, watched."""

        def watched(*arguments: Any, **keywords: Any) -> Any:
            began = self.mark()
            result = work(*arguments, **keywords)
            self.seen.append((part, began, self.mark()))
            return result

        return watched

    def mark(self) -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> dict[str, float]:
        """The seconds since the last time, of calls that are over."""
        seconds = dict.fromkeys(PARTS, 0.0)
        for part, began, ended in self.seen:
            seconds[part] += began.elapsed_time(ended) / 1000 if torch.cuda.is_available() else ended - began
        self.seen.clear()
        return seconds


class Side:
    """One side at one batch size: a turn is a call of its own noise and prompts, and gives its seconds."""

    def __init__(self, build: Callable[[], Draw], shape: tuple[int, ...], watch: Watch) -> None:
        self.build, self.shape, self.watch = build, shape, watch
        self.parts: list[dict[str, float]] = []
        """Of each call but the first."""

    def first(self) -> float:
        """The seconds of setting it up and of its first call."""
        noise, prompts = self.given(0)
        began = time.perf_counter()
        self.draw = self.build()
        self.draw(noise, prompts)
        taken = time.perf_counter() - began
        self.watch.take()
        return taken

    def __call__(self, turn: int) -> float:
        noise, prompts = self.given(turn)
        began = time.perf_counter()
        self.draw(noise, prompts)
        taken = time.perf_counter() - began
        parts = self.watch.take()
        self.parts.append(parts | {"rest": taken - sum(parts.values())})
        return taken

    def given(self, turn: int) -> tuple[Tensor, list[str]]:
        noise = torch.randn(self.shape, generator=torch.Generator().manual_seed(turn))
        return noise.to(device()), [PROMPTS[(turn + place) % len(PROMPTS)] for place in range(len(noise))]


def ours(student: TextToImage, batch_size: int, watch: Watch, *, compiled: bool) -> Draw:
    drawing = Drawing(student, batch_size, compiled=compiled)
    drawing.encode = watch.around("text", drawing.encode)
    drawing.sample = watch.around("unet", drawing.sample)
    drawing.decode = watch.around("vae", drawing.decode)
    return lambda noise, prompts: [Image.fromarray(image) for image in drawing(noise, prompts)]


def stock(pipeline: Any, num_steps: int, guidance_scale: float) -> Draw:
    def draw(noise: Tensor, prompts: list[str]) -> list[Image.Image]:
        images: list[Image.Image] = pipeline(
            prompts,
            latents=noise.to(pipeline.dtype),
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
        ).images
        return images

    return draw


def with_scheduler(pipeline: Any, scheduler: Any) -> Any:
    """The same parts with another sampler."""
    other: Any = StableDiffusionPipeline(
        **pipeline.components | {"scheduler": scheduler}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    return other


def levels_apart(one: Side, other: Side) -> float:
    """The mean difference of the same images, in levels of 255: that it is small shows that they do the same work."""
    first, second = (np.stack([np.asarray(image) for image in side.draw(*side.given(0))]) for side in (one, other))
    return float(np.abs(first.astype(int) - second.astype(int)).mean())


# --- telling ----------------------------------------------------------------------------------------------------------


def flops_of_parts(pipeline: Any) -> dict[str, int]:
    """Floating-point operations of one image in one step without guidance."""
    encoder = pipeline.text_encoder.config.to_dict()
    flops = Architecture(dict(pipeline.unet.config), dict(pipeline.vae.config), (encoder,), {}).flops()
    return {"text": flops["text"], "unet": flops["unet"], "vae": flops["decode"]}


def versions() -> dict[str, str | None]:
    found = {"Python": platform.python_version(), "CUDA": torch.version.cuda, "cuDNN": None}
    if torch.cuda.is_available():
        found["cuDNN"] = str(torch.backends.cudnn.version())
    return found | {name: version(name) for name in ("torch", "diffusers", "transformers")}


def tell(batch_size: int, found: dict[str, Any]) -> None:
    click.echo(f"batch of {batch_size}, milliseconds: median (quartiles), of each part, and of the first call")
    for name, median in found["median"].items():
        low, high = (1000 * bound for bound in found["quartiles"][name])
        parts = ", ".join(f"{part} {1000 * taken:.2f}" for part, taken in found["parts"][name].items())
        first = 1000 * found["first_call"][name]
        click.echo(f"{name:>9}: {1000 * median:9.2f} ({low:.2f} to {high:.2f}): {parts}; first {first:.0f}")
    times = " and ".join(f"{ratio:.2f} times as fast as {name}" for name, ratio in found["ratio"].items())
    click.echo(f"     ours: {times}, medians over the rounds; {found['levels_apart']:.3f} of 255 levels from stock")
    if "limit" in found:
        click.echo(f"    limit: {1000 * found['limit']:9.2f}, its operations at the rate of one large matrix product")


if __name__ == "__main__":
    main()
