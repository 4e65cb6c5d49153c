"""What a couple stage keeps besides pairs: images, embeddings, states of the sampler's path."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from instaflow.couplings.generate import Made, Sampler
from instaflow.couplings.output import NO_PROMPT
from instaflow.couplings.records import Kept, KeptImages
from instaflow.errors import ConfigError
from instaflow.files import write_new
from instaflow.models.model import Model
from instaflow.models.pixels import PixelModel
from instaflow.models.sampling import Sampling, fetched
from instaflow.models.states import nearest_states
from instaflow.sections import Keep


def announced(keep: Keep | None, model: Model, scheduler: Any, num_steps: int) -> Kept | None:
    """What the records will hold, with this model's shapes and the times that this sampler visits.

    Raises ConfigError where two of the trajectory's times come to the same state.
    """
    if keep is None:
        return None
    kept: dict[str, Any] = {}
    if keep.images:
        kept["images"] = KeptImages(every=keep.images.every, format=keep.images.format, size=model.image_size)
    if keep.embeddings:
        if isinstance(model, PixelModel):
            raise ConfigError(f"'keep.embeddings' is of text, and '{model.name}' knows none", "Leave it out")
        hidden, pooled = model.embed([None])
        kept |= {"embedding": tuple(hidden.shape[1:]), "pooled": None if pooled is None else tuple(pooled.shape[1:])}
    if keep.trajectory:
        kept["trajectory"] = tuple(state.time for state in nearest_states(scheduler, num_steps, keep.trajectory))
    return Kept(**kept)


def keeping(sampling: Sampling, kept: Kept | None) -> Sampler:
    """A sampler for records that hold `kept` besides; its copies from the GPU run beside the next batch's work."""
    kept = kept or Kept()
    states = nearest_states(sampling.scheduler, sampling.num_steps, kept.trajectory or ())

    def sample(indices: Sequence[int], noise: np.ndarray, texts: list[str]) -> Callable[[], Made]:
        sampled = sampling.sampled(torch.from_numpy(noise), texts, states)
        latents, extras = fetched(sampled.latents), {}
        hidden, pooled = sampled.embedded
        if kept.embedding:
            extras["embedding.npy"] = indices, fetched(hidden.half())
        if kept.pooled and pooled is not None:
            extras["pooled.npy"] = indices, fetched(pooled.half())
        if states:
            extras["trajectory.npy"] = indices, fetched(torch.stack(sampled.states, 1))
        rows = [row for row, index in enumerate(indices) if kept.images and index % kept.images.every == 0]
        if kept.images and rows:
            pictures = sampling.model.pictures(torch.stack([sampled.latents[row] for row in rows]))
            extras[f"image.{kept.images.format}"] = [indices[row] for row in rows], fetched(pictures)

        def wait() -> Made:
            held = {name: dict(zip(of, values(), strict=True)) for name, (of, values) in extras.items()}
            return Made(latents(), held)

        return wait

    return sample


def keep_no_prompt(folder: Path, model: Model) -> None:
    """Put the embeddings of no prompt, which guidance and caption dropout take, into the stage's folder, if absent.

    `no-prompt.npz` holds `embedding`, [L, D] float16, and for Stable Diffusion XL `pooled`, [P] float16.
    """
    hidden, pooled = model.embed([None])
    content, embedding = io.BytesIO(), hidden[0].half().cpu().numpy()
    if pooled is None:
        np.savez(content, embedding=embedding)
    else:
        np.savez(content, embedding=embedding, pooled=pooled[0].half().cpu().numpy())
    write_new(folder / NO_PROMPT, content.getvalue())
