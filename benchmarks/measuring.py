"""What the benchmarks share: networks with random weights, sides that take turns, and where their time goes."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from instaflow.digits.networks import build_autoencoder, build_scheduler, build_text_encoder, build_unet
from instaflow.digits.tokenizer import build_tokenizer


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
