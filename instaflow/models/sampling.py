"""Sampling in earnest: batch after batch of one model with the same steps and guidance."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from instaflow.errors import InstaFlowError, reason_of
from instaflow.models.architecture import unet_flops
from instaflow.models.states import State

if TYPE_CHECKING:
    from instaflow.models.model import Embedded, Model, Text


WORTH_COMPILING = 2e13
"""Floating-point operations a thread: six to eight minutes of a small network (43 to 55 GFLOP/s on an AMD EPYC)."""


@dataclass(frozen=True)
class Sampled:
    """What sampling B records gives, on the model's device."""

    latents: Tensor  # [B, C, H, W] float32, scaled
    embedded: "Embedded"  # of the prompts
    states: list[Tensor]  # [B, C, H, W] float16 each: points of the flow


class Sampling:
    """A model set up to sample; what all batches share is computed once.

    The network computes in its own precision, the sampler in float32. On a GPU a call returns when its work is
    queued: nothing is copied between the devices from the first step to the last (but by UniPC, whose stock code does).
    `compiled_for` is the batch size that a compiled network is made for; smaller batches are filled up to it. Raises
    InstaFlowError where it can't be compiled.
    """

    def __init__(
        self,
        model: "Model",
        *,
        num_steps: int,
        guidance_scale: float,
        scheduler: Any = None,
        compiled_for: int | None = None,
    ) -> None:
        own = scheduler or model.scheduler
        self.model, self.guidance_scale, self.compiled_for = model, guidance_scale, compiled_for
        self.no_prompt = model.embed([None]) if guidance_scale > 1 else None
        self.scheduler = type(own).from_config(own.config)
        self.num_steps = num_steps
        self.scheduler.set_timesteps(num_steps)  # on the CPU, where it looks its own numbers up
        self.timesteps = self.scheduler.timesteps.to(model.device)
        if compiled_for:
            self._compile(compiled_for)

    def __call__(self, noise: Tensor, prompts: list[str]) -> Tensor:
        """Scaled latents [B, C, H, W], float32, of unit-variance noise [B, C, H, W], as stock diffusers would make."""
        return self.sampled(noise, prompts).latents

    def sampled(self, noise: Tensor, prompts: list[str], states: Sequence[State] = ()) -> Sampled:
        """The latents, the prompts' embeddings, and the flow's points at these states of the path."""
        return self.of_embedded(noise, self.model.embed(prompts), states)

    @torch.no_grad()
    def of_embedded(self, noise: Tensor, embedded: "Embedded", states: Sequence[State] = ()) -> Sampled:
        """The same of prompts that are embedded."""
        batch = len(noise)
        noise, text, draws = self._prepared(noise, embedded)
        scales, kept = {state.step: state.scale for state in states}, []
        for step, x in enumerate(self.path(noise, text, **draws)):
            if step in scales:
                kept.append((x[:batch] / scales[step]).half())
        return Sampled(x[:batch], embedded, kept)

    def steps(self, noise: Tensor, prompts: list[str]) -> Iterator[Tensor]:
        """The states of a call one by one, for those who do something else between two steps; the last: the latents."""
        noise, text, draws = self._prepared(noise, self.model.embed(prompts))
        return self.path(noise, text, **draws)

    @torch.no_grad()
    def _prepared(self, noise: Tensor, embedded: "Embedded") -> tuple[Tensor, "Text", dict[str, list[torch.Generator]]]:
        """What `path` takes: noise on the device, filled up as the text is, and what draws numbers."""
        filling = max((self.compiled_for or 0) - len(noise), 0)
        noise, (hidden, pooled) = filled(noise, filling), embedded
        whole = filled(hidden, filling), None if pooled is None else filled(pooled, filling)
        text = self.model.joined(self.no_prompt, whole)
        # A folder's own sampler may draw numbers: then each sample its own, however batches are cut.
        draws = {"generator": [generator_of(one) for one in noise]} if draws_noise(self.scheduler) else {}
        return sent(noise.float(), self.model.device), text, draws

    @torch.no_grad()
    def path(self, noise: Tensor, text: "Text", **draws: Any) -> Iterator[Tensor]:
        """The sampler's states [B, C, H, W] float32, from noise on the model's device to its last one, the latents."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)  # it holds state: one for each call
        scheduler.set_timesteps(self.num_steps)
        x = noise * scheduler.init_noise_sigma
        yield x
        for timestep, on_device in zip(scheduler.timesteps, self.timesteps, strict=True):
            scaled = scheduler.scale_model_input(x, timestep)
            if self.compiled_for:
                torch.compiler.cudagraph_mark_step_begin()
            output = self.model.predict(scaled, on_device, text, self.guidance_scale)
            if self.compiled_for:
                output = output.clone()  # a replayed graph writes to the same memory again
            x = scheduler.step(output, timestep, x, **draws, return_dict=False)[0]
            yield x

    def _compile(self, batch: int) -> None:
        """Compile the network for batches of this size, and call it once."""
        model = self.model
        model.unet.to(memory_format=torch.channels_last)
        with compiling(f"The network of '{model.name}'"):
            model.unet.compile(dynamic=False, mode="reduce-overhead" if model.device.type == "cuda" else None)
            self(torch.zeros(batch, *model.latent_shape), [model.any_prompt] * batch)


def pays_to_compile(model: "Model", calls: int) -> bool:
    """Whether compiling the network earns its cost in a stage of so many calls, each of one record.

    A rule of the work alone, not of a clock: who asks again gets the same answer. On two CPU threads compiling took 10
    to 40 s (Stable Diffusion's U-Net: 80 s), and made the digits' network 1.4 times as fast, one four times as wide
    1.1 times, Stable Diffusion's 1.03 times; so it pays from some minutes of work on. On a GPU it was not measured, and
    is left to the user.
    """
    if model.device.type != "cpu" or calls * network_flops(model) < WORTH_COMPILING * torch.get_num_threads():
        return False
    try:
        with compiling("A sine"):
            torch.compile(torch.sin)(torch.zeros(8))
    except InstaFlowError:
        return False
    return True


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """What first calls something compiled. Raises InstaFlowError where it can't be."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no GPU
    try:
        yield
    except Exception as error:  # the compiler's own kinds, and those of the compiler that it calls
        reason = reason_of(error)
        raise InstaFlowError(
            f"{what} cannot be compiled here: {reason}",
            "On a CPU that takes a C++ compiler and Python's headers; or set compile: false",
        ) from error


def network_flops(model: "Model") -> int:
    """Floating-point operations of one call of the network for one record, counted without computing."""
    return unet_flops(type(model.unet), model.unet.config, model.latent_shape, model.encode([model.any_prompt]))


def filled(rows: Tensor, count: int) -> Tensor:
    """With `count` more rows at the end, like the first one."""
    return torch.cat([rows, *[rows[:1]] * count]) if count else rows


def draws_noise(scheduler: Any) -> bool:
    return "generator" in signature(scheduler.step).parameters


def generator_of(noise: Tensor) -> torch.Generator:
    """What draws a sample's noise between its steps: a function of the bits of its first one [C, H, W]."""
    digest = hashlib.sha256(noise.float().cpu().numpy().tobytes()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU on `device`, without waiting for what it computes."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def fetched(values: Tensor) -> Callable[[], np.ndarray]:
    """Begin to copy `values` from the GPU beside its further work; returns what waits for the copy, and gives it."""
    if values.device.type != "cuda":
        return values.numpy
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    stream = torch.cuda.Stream(values.device)
    stream.wait_stream(torch.cuda.current_stream(values.device))
    with torch.cuda.stream(stream):
        copy.copy_(values, non_blocking=True)
    values.record_stream(stream)

    def wait() -> np.ndarray:
        stream.synchronize()
        return copy.numpy()

    return wait
