"""What the benchmarks share: networks with random weights, sides that take turns, and where their time goes."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from instaflow.couplings.manifest import Manifest
from instaflow.digits.networks import build_autoencoder, build_scheduler, build_text_encoder, build_unet
from instaflow.digits.tokenizer import build_tokenizer
from instaflow.models.families import SD1


def networks(architecture: str, tokenizer: Any) -> tuple[Any, Any, Any]:
    """U-Net, autoencoder and text encoder of the architecture."""
    if architecture == "digits":
        return build_unet(), build_autoencoder(), build_text_encoder(tokenizer)
    return SD1.build_unet(), SD1.build_vae(), SD1.build_text_encoders()[0]


def build(architecture: str) -> StableDiffusionPipeline:
    """A pipeline of the architecture with random weights."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    if architecture != "digits":
        tokenizer.model_max_length = 77
    unet, vae, text_encoder = networks(architecture, tokenizer)
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


def manifest_of(latent_shape: tuple[int, int, int], count: int, records_per_shard: int, **changes: Any) -> Manifest:
    """What a couple stage of these couplings would say of itself."""
    settings: dict[str, Any] = {
        "stage": "pairs",
        "seed": 0,
        "prompts_hash": "",
        "model": "",
        "model_fingerprint": "",
        "sampler": {},
        "num_steps": 25,
        "guidance_scale": 1.0,
        "timestep_spacing": "trailing",
        "dtype": "float32",
        "batch_size": records_per_shard,
        "hardware": {},
    }
    settings |= {"latent_shape": latent_shape, "count": count, "records_per_shard": records_per_shard}
    return Manifest(**settings | changes)


def in_turns(sides: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Each side's seconds a round; the first round is not counted, and who begins alternates."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            taken = sides[name](turn)
            if turn:
                seconds[name].append(taken)
    return seconds


def timed(work: Callable[[int], object]) -> Callable[[int], float]:
    """The same work, which says how many seconds it took."""

    def take(turn: int) -> float:
        began = time.perf_counter()
        work(turn)
        return time.perf_counter() - began

    return take


def ratios_to(reference: str, seconds: dict[str, list[float]]) -> dict[str, float]:
    """How many times as fast as `reference` each other side is: the median over the rounds."""
    return {
        name: statistics.median(theirs / own for own, theirs in zip(taken, seconds[reference], strict=True))
        for name, taken in seconds.items()
        if name != reference
    }


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The floating-point operations a second of one large matrix product."""
    size, repeats = 8192, 20
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        a @ a
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - began)


def profiler() -> Any:
    """Hears what the device works on while it is a context; `shares_of` reads it."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    return profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])


def shares_of(profile: Any) -> dict[str, float]:
    """The operations that take most of the device's time, each with its share, the largest first."""
    times = {
        event.key[:60]: event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        for event in profile.key_averages()
    }
    largest = sorted(times, key=lambda name: times[name], reverse=True)[:12]
    return {name: times[name] / sum(times.values()) for name in largest}
