"""Text in, images out, with the least latency: a model set up for batches of one size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler
from torch import Tensor

from instaflow.errors import ConfigError
from instaflow.models.sampling import Sampling, compiling, fetched, filled, sent
from instaflow.models.text_to_image import TextToImage

Work = Callable[..., Any]


class Drawing:
    """A text-to-image model set up to draw at most `batch_size` images at a time, again and again.

    With `compiled`, its text encoder, network and decoder are compiled for that size, in place: what a folder's model
    is loaded for is then drawing alone. On a GPU each of the three, with the sampler's steps around the network, is a
    CUDA graph: recorded once, and replayed without Python. The precision is the model's; steps, guidance and scheduler
    default to what its folder recommends. `encode`, `sample` and `decode` are the parts of a call. Raises ConfigError
    for a sampler that draws noise between its steps, InstaFlowError where the model can't be compiled.
    """

    def __init__(
        self,
        model: TextToImage,
        batch_size: int,
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: Any = None,
        compiled: bool = True,
    ) -> None:
        settings = model.settings
        self.model, self.batch_size = model, batch_size
        self.sampling = Sampling(
            model,
            num_steps=settings.num_steps if num_steps is None else num_steps,
            guidance_scale=settings.guidance_scale if guidance_scale is None else guidance_scale,
            scheduler=scheduler,
        )
        if not can_record(self.sampling.scheduler, self.sampling.num_steps):
            raise ConfigError(
                f"'{model.name}' draws noise between its steps, and a recorded drawing has none but its first",
                "Draw in one step, or with Model.sample",
            )
        if compiled:
            for part in (*model.text_encoders, model.unet, model.vae.decoder):
                part.to(memory_format=torch.channels_last)
                part.compile(dynamic=False)
        with compiling(f"'{model.name}'") if compiled else nullcontext(), tuned():
            tokens = model.tokens([model.any_prompt] * batch_size)
            noise = torch.zeros(batch_size, *model.latent_shape, device=model.device)
            self.encode, embedded = self._ready(model.embed_tokens, *tokens)
            self.sample, latents = self._ready(self._sample, noise, *embedded)
            self.decode, _ = self._ready(self._decode, latents)

    def __call__(self, noise: Tensor, prompts: list[str]) -> np.ndarray:
        """Images [B, H, W, 3], uint8, of unit-variance noise [B, C, H, W]: what `Model.sample` and `pictures` make."""
        filling = self.batch_size - len(prompts)
        noise = sent(filled(noise.float(), filling), self.model.device)
        embedded = self.encode(*self.model.tokens(prompts + prompts[:1] * filling))
        images = fetched(self.decode(self.sample(noise, *embedded)))
        self.model.count_truncated(prompts)  # while the GPU computes
        return images()[: len(prompts)]

    def _ready(self, work: Work, *inputs: Tensor | None) -> tuple[Work, Any]:
        """The work made ready for inputs of these shapes, and what it gives for these."""
        if self.model.device.type == "cuda":
            work = Recorded(work, *inputs)
        return work, work(*inputs)

    def _sample(self, noise: Tensor, hidden: Tensor, pooled: Tensor | None) -> Tensor:
        text = self.model.joined(self.sampling.no_prompt, (hidden, pooled))
        *_, latents = self.sampling.path(noise, text)
        return latents

    def _decode(self, latents: Tensor) -> Tensor:
        return self.model.pictures(latents, self.batch_size)


def can_record(scheduler: Any, num_steps: int) -> bool:
    """Whether a drawing in so many steps has all its noise at its start: not by a sampler that draws some between."""
    return num_steps == 1 or not isinstance(scheduler, LCMScheduler)


class Recorded:
    """Work on tensors of fixed shapes as a CUDA graph: recorded once; a call replays it, into the same memory again.

    `inputs` are its memory for what it is called with, unless that lies there already: another recorded work's output.
    """

    def __init__(self, work: Work, *inputs: Tensor | None) -> None:
        self.inputs = inputs
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is compiled, tuned or allocated at first is no part of the graph
            for _ in range(3):
                work(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = work(*inputs)

    def __call__(self, *inputs: Tensor | None) -> Any:
        for own, given in zip(self.inputs, inputs, strict=True):
            if own is not None and given is not None and given is not own:
                own.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.output


@contextmanager
def tuned() -> Iterator[None]:
    """Have each convolution's first call try the ways to compute it, and keep the fastest (cuDNN)."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
